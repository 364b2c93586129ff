"""Checks that the processes of a run share a directory, and waits for files of other processes.

A shared directory may be a network file system that shows changes late, or by mistake a disk of
each host. A bucket shows every change at once.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.distributed import agreement, startup
from imagen_jax.locks import is_locked, only_process
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import absolute, is_away, read_object, write_atomically, write_json

SHOWN = 5  # processes that a message names
PATIENCE_S = 60.0  # a network file system may show a new file late
PROBE = ".shared-{}-{}.tmp"  # see `_check_visible`
PROBE_LEFT_S = 3600.0  # age of a file that a killed start has left
PROBES_READ = 32  # processes whose files each process reads in `_check_visible`
log = logging.getLogger(__name__)


@contextlib.contextmanager
def agreed_output(output: AnyPath, settings: Mapping[str, Any]) -> Iterator[None]:
    """Locks the output directory for this run while the context lasts.

    Raises ValueError in all processes if they differ in `settings`, or in the directory.
    """
    facts = {name: json.dumps(value) for name, value in settings.items()}
    agreement.check({"--output": str(absolute(output))} | facts)
    with contextlib.ExitStack() as stack:
        if agreement.is_first():
            stack.enter_context(only_process(output, "using"))
        check_shared(output)
        yield


def check_shared(directory: AnyPath, patience_s: float = PATIENCE_S) -> None:
    """Raises ValueError in all processes unless all soon see what each one writes to `directory`.

    Process 0 writes hosts.json there, and the others look for it for up to `patience_s` seconds. On
    a file system, all then look for a new and for a rewritten file of each process. Logs processes
    that do not see the lock of process 0.
    """
    hosts, member = startup.hosts(), startup.member()
    if member is None:
        return
    path, token = directory / "hosts.json", os.urandom(8).hex()
    if member.index == 0:
        write_json(path, {"hosts": hosts, "start": token})
    token, end = agreement.gather(token)[0], time.monotonic() + patience_s
    while not (seen := _start(path) == token) and time.monotonic() < end:
        time.sleep(0.1)
    blind = [
        f"process {i} ({hosts[i]})"
        for i, said in enumerate(agreement.gather("seen" if seen else ""))
        if not said
    ]
    if blind:
        raise ValueError(
            f"{directory} is another directory on {', '.join(blind)} than on process 0"
            f" ({hosts[0]}): give one on a file system that all processes share"
        )
    if not in_bucket(directory):  # a bucket shows every change at once
        _check_visible(directory, token, patience_s)
        _check_lock(directory)


def _start(path: AnyPath) -> str:
    """The token in hosts.json; "" if the file is missing, or not yet all of it is visible.

    Also "" if the file system does not answer: NFS may call a file stale that was just replaced.
    """
    try:
        return read_object(path, {"start": str})["start"]
    except (FileNotFoundError, ValueError):
        return ""
    except OSError as error:
        if not is_away(error):
            raise
        return ""


def _check_visible(directory: Path, token: str, patience_s: float) -> None:
    """Raises ValueError in all processes if a cache or another disk hides a file of one of them.

    Each process writes a file, and later other content of the same length. The others look for both
    in a listing and in the file. A cache that a process's own writes empty is not found. Nothing is
    left behind.
    """
    hosts, member = startup.hosts(), startup.member()
    names = [PROBE.format(token, i) for i in range(member.count)]
    _list(directory)  # what a cache of listings would return later
    if member.index == 0:
        _remove_left_probes(directory)
    try:
        for content in (b"first", b"again"):
            agreement.gather()  # nobody writes before all have listed and read
            problem = _write_probe(directory / names[member.index], content)
            agreement.gather()
            texts = agreement.gather(problem or _unseen(directory, names, content, patience_s))
            faults = [f"process {i} ({hosts[i]}) {text}" for i, text in enumerate(texts) if text]
            if faults:
                shown = "; ".join(faults[:SHOWN]) + ("; ..." if len(faults) > SHOWN else "")
                raise ValueError(
                    f"{directory} does not show all processes the same files: {shown}: give a"
                    " directory that all hosts share, mounted with caches of less than a minute"
                    " (NFS: actimeo=30; gcsfuse: --metadata-cache-ttl-secs=30)"
                )
    finally:
        with contextlib.suppress(OSError):
            (directory / names[member.index]).unlink(missing_ok=True)


def _remove_left_probes(directory: Path) -> None:
    """Removes what killed starts have left."""
    for left in directory.glob(PROBE.format("*", "*")):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > PROBE_LEFT_S:
                left.unlink()


def _write_probe(path: Path, content: bytes) -> str:
    """Writes a file. Returns why that failed, or ""."""
    try:
        write_atomically(path, content)
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return ""


def _unseen(directory: Path, names: Sequence[str], content: bytes, patience_s: float) -> str:
    """What this process does not see within `patience_s` seconds, in words; "" if it sees all.

    names: of the files of all processes, with this content.
    """
    hosts, member, end = startup.hosts(), startup.member(), time.monotonic() + patience_s
    after = [(member.index + k) % member.count for k in range(1, member.count)][:PROBES_READ]
    hidden, stale = list(range(member.count)), after
    while hidden or stale:
        listed = _list(directory)
        hidden = [i for i, name in enumerate(names) if name not in listed]
        stale = [i for i in after if _content(directory / names[i]) != content]
        if time.monotonic() >= end:
            break
        if hidden or stale:
            time.sleep(0.1)
    if not hidden and not stale:
        return ""
    seen = [i for i in stale if i not in hidden and _content(directory / names[i])]
    what = "reads old content of" if seen and not hidden else "does not see"
    writers = ", ".join(f"process {i} ({hosts[i]})" for i in (hidden or stale)[:SHOWN])
    return f"{what} a file that {writers} wrote {patience_s:g} s before"


def _check_lock(directory: Path) -> None:
    """Logs the processes that do not see the lock of process 0, if that holds one.

    A run does not need to see it there: only process 0 takes it, against a second run.
    """
    try:
        locked = is_locked(directory)
    except OSError:
        locked = False
    first, *others = agreement.gather("locked" if locked else "")
    blind = [f"process {i} ({startup.hosts()[i]})" for i, said in enumerate(others, 1) if not said]
    if first and blind and agreement.is_first():
        log.warning(
            "the lock of %s does not reach %s: a second run there would not be refused, so start"
            " this one once",
            directory,
            ", ".join(blind[:SHOWN]) + (", ..." if len(blind) > SHOWN else ""),
        )


def _list(directory: Path) -> set[str]:
    """The names in a directory; none if it cannot be read."""
    try:
        return set(os.listdir(directory))
    except OSError:
        return set()


def _content(path: Path) -> bytes:
    """The content of a file; b"" if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def share_files(written: Iterable[AnyPath] = (), patience_s: float = PATIENCE_S) -> None:
    """A barrier after which all processes see the files that each has written, at full size.

    A bucket shows them at once.

    written: files of this process, complete, on a shared file system. Raises what `wait_for_files`
    raises.
    """
    if startup.member() is None:
        return
    files = [path for path in written if not in_bucket(path)]
    own = {str(path.absolute()): path.stat().st_size for path in files}
    sizes: dict[str, int | None] = {}
    for text in agreement.gather(json.dumps(own)):
        sizes |= json.loads(text)
    _wait(sizes, patience_s)


def wait_for_files(files: Iterable[AnyPath], patience_s: float = PATIENCE_S) -> None:
    """Two barriers; between them each process waits until it sees `files`, written atomically.

    Does nothing in a single-process run. Raises ValueError in all processes if one of them does not
    see a file within `patience_s` seconds after all processes have come, which includes the one
    that writes it.
    """
    if startup.member() is not None:
        agreement.gather()
        local = (path for path in files if not in_bucket(path))
        _wait({str(path.absolute()): None for path in local}, patience_s)


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
        for i, path in enumerate(agreement.gather(late[0] if late else ""))
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
    try:
        return os.stat(path).st_size
    except OSError:
        return None
