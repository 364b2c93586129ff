"""Messages between processes outside the training step, through jax's coordination service.

They need no program on the devices, so no collective operation times out while one process works.
"""

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from imagen_jax.distributed import startup
from imagen_jax.locks import only_process
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import absolute, as_path, file_size, read_object, write_json

# Twenty days. A lost process ends the wait earlier; watch.py names one that is stuck.
FOR_EVER_MS = 1000 * 60 * 60 * 24 * 20
SHOWN = 5  # facts of a process that a message names
PATIENCE_S = 60.0  # a network file system may show a new file late
_rounds = itertools.count()
Task = TypeVar("Task")


def is_first() -> bool:
    """Whether this is process 0, or the only one."""
    member = startup.member()
    return member is None or member.index == 0


def own_share(tasks: Sequence[Task]) -> list[Task]:
    """The tasks of this process: a run of consecutive ones, whatever the progress of others."""
    member = startup.member()
    if member is None:
        return list(tasks)
    bounds = [len(tasks) * i // member.count for i in (member.index, member.index + 1)]
    return list(tasks[bounds[0] : bounds[1]])


def gather(text: str = "") -> list[str]:
    """The texts of all processes, by process. A barrier: all call it in the same order."""
    member = startup.member()
    if member is None:
        return [text]
    store, number = startup.store(), next(_rounds)
    said = "imagen_jax/said/{}/".format
    store.key_value_set(f"{said(number)}{member.index}", text)
    store.wait_at_barrier(f"imagen_jax/round {number}", FOR_EVER_MS)
    texts = {
        int(key.rpartition("/")[2]): value for key, value in store.key_value_dir_get(said(number))
    }
    if member.index == 0 and number:
        store.key_value_delete(said(number - 1))  # all processes have read it
    return [texts[i] for i in range(member.count)]


def check(facts: Mapping[str, str]) -> None:
    """Raises ValueError in all processes unless {name: content} is the same in all.

    The message names the process and the facts that differ. All processes call it.
    """
    hosts = startup.hosts()
    own = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in facts.items()}
    first, *others = map(json.loads, gather(json.dumps(own)))
    faults = []
    for i, there in enumerate(others, 1):
        if names := [name for name in first | there if first.get(name) != there.get(name)]:
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            faults.append(
                f"process {i} ({hosts[i]}) differs from process 0 ({hosts[0]}) in: {shown}"
            )
    if faults:
        raise ValueError(
            f"the processes were not started alike: {'; '.join(faults)}; start the same command"
            " everywhere"
        )


def check_in_first(check: Callable[[], None]) -> None:
    """Calls `check` in process 0 and raises its ValueError in all processes. All call it."""
    fault = ""
    if is_first():
        try:
            check()
        except ValueError as error:
            fault = str(error)
    if fault := gather(fault)[0]:
        raise ValueError(fault)


def check_shared(directory: AnyPath, patience_s: float = PATIENCE_S) -> None:
    """Raises ValueError in all processes unless `directory` is the same directory for all.

    Process 0 writes hosts.json there, and the others look for it for up to `patience_s` seconds.
    """
    hosts, member = startup.hosts(), startup.member()
    if member is None:
        return
    path, token = directory / "hosts.json", os.urandom(8).hex()
    if member.index == 0:
        write_json(path, {"hosts": hosts, "start": token})
    token, end = gather(token)[0], time.monotonic() + patience_s
    while not (seen := _start(path) == token) and time.monotonic() < end:
        time.sleep(0.1)
    blind = [
        f"process {i} ({hosts[i]})"
        for i, said in enumerate(gather("seen" if seen else ""))
        if not said
    ]
    if blind:
        raise ValueError(
            f"{directory} is another directory on {', '.join(blind)} than on process 0"
            f" ({hosts[0]}): give one on a file system that all processes share"
        )


@contextlib.contextmanager
def agreed_output(output: AnyPath, settings: Mapping[str, Any]) -> Iterator[None]:
    """Locks the output directory for this run while the context lasts.

    Raises ValueError in all processes if they differ in `settings`, or in the directory.
    """
    facts = {name: json.dumps(value) for name, value in settings.items()}
    check({"--output": str(absolute(output))} | facts)
    with contextlib.ExitStack() as stack:
        if is_first():
            stack.enter_context(only_process(output, "using"))
        check_shared(output)
        yield


def _start(path: AnyPath) -> str:
    """The token in hosts.json; "" if the file is missing, or not yet all of it is visible."""
    try:
        return read_object(path, {"start": str})["start"]
    except (FileNotFoundError, ValueError):
        return ""


def share_files(written: Iterable[Path] = (), patience_s: float = PATIENCE_S) -> None:
    """A barrier after which all processes see the files that each has written, at full size.

    written: files of this process, complete, on a shared file system. Raises what `wait_for_files`
    raises.
    """
    if startup.member() is None:
        return
    own = {str(path.absolute()): path.stat().st_size for path in written}
    sizes: dict[str, int | None] = {}
    for text in gather(json.dumps(own)):
        sizes |= json.loads(text)
    _wait(sizes, patience_s)


def wait_for_files(files: Iterable[AnyPath], patience_s: float = PATIENCE_S) -> None:
    """Two barriers; between them each process waits until it sees `files`, written atomically.

    Does nothing in a single-process run. Raises ValueError in all processes if one of them does not
    see a file within `patience_s` seconds after all processes have come, which includes the one
    that writes it.
    """
    if startup.member() is not None:
        gather()
        _wait({os.fspath(absolute(path)): None for path in files}, patience_s)


def first_says(yes: bool) -> bool:
    """Whether `yes` is true in process 0. A barrier: all call it in the same order."""
    return bool(gather("yes" if yes else "")[0])


def wait_to_see(path: AnyPath, patience_s: float = PATIENCE_S) -> None:
    """Waits until this process sees a file that another one has written, or patience is over.

    A bucket shows every file at once, so there it does nothing.
    """
    if in_bucket(path):
        return
    end = time.monotonic() + (patience_s if startup.member() else 0)
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.1)


def _wait(sizes: Mapping[str, int | None], patience_s: float) -> None:
    """`wait_for_files` for {path: size in bytes, None for any}."""
    hosts, end = startup.hosts(), time.monotonic() + patience_s
    late = list(sizes)
    while late := [path for path in late if not _is_whole(path, sizes[path])]:
        if time.monotonic() >= end:
            break
        time.sleep(0.1)
    blind = [
        f"{path} on process {i} ({hosts[i]})"
        for i, path in enumerate(gather(late[0] if late else ""))
        if path
    ]
    if blind:
        raise ValueError(
            f"files of other processes are not visible after {patience_s:g} s: {', '.join(blind)};"
            " check the shared file system, then run the same command again"
        )


def _is_whole(path: str, size: int | None) -> bool:
    """Whether a file is visible with its size."""
    seen = _size(path)
    return seen is not None and size in (None, seen)


def _size(path: str) -> int | None:
    """The size of a file in bytes; None if it is not visible."""
    found = as_path("file", path)
    try:
        return file_size(found)
    except OSError:
        if in_bucket(found):
            raise
        return None
