"""Which numbers of a directory of pictures belong to sets, and which process draws a set.

`picture_set` describes the files. A set is locked while a command draws it: on a local file system
by a lock on its file, set_0000.json, in a bucket by the object set_0000.lock beside it.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from imagen_jax import pictures, set_rows
from imagen_jax.locks import BucketLock, Held, try_lock
from imagen_jax.object_storage import AnyPath, create, in_bucket
from imagen_jax.storage import directory_names, entry_names, read_object, written_at

SET = re.compile(r"set_(\d+)\.json")
FILES = re.compile(r"set_(\d+)\.(?:json|jsonl|part-.*\.jsonl(?:\.\d+)?)")
FOLDER = re.compile(r"\d{6,}")
SET_FIELDS = {"count": int, "sha256": str, "job": dict}
PATIENCE_S = 10.0  # for a set file that another process is writing
_damaged: set[tuple[AnyPath, float]] = set()  # (file of a set, time of its change) warned of
log = logging.getLogger(__name__)


@contextlib.contextmanager
def reserve(directory: AnyPath, job: Mapping[str, Any], count: int) -> Iterator[int]:
    """The number of row 0 of the set of this job: an incomplete one, or a new one.

    Another process cannot reserve the set inside the context. A complete set is not continued but
    returned as well, so that its rows count as done.
    """
    if not in_bucket(directory):
        directory.mkdir(parents=True, exist_ok=True)
    content = {"count": count, "sha256": _digest(job), "job": dict(job)}
    with contextlib.ExitStack() as stack:
        first = _continued(stack, directory, job, count)
        while first is None:
            first = _new(stack, directory, json.dumps(content, indent=1).encode())
            if first is None:  # in a bucket, a new set is locked as an older one
                first = _continued(stack, directory, job, count)
        yield first


def _continued(
    stack: contextlib.ExitStack, directory: AnyPath, job: Mapping[str, Any], count: int
) -> int | None:
    """The number of row 0 of a set of a job that no other process has locked; locks it."""
    for first in sets_of(directory, job, count):
        path = set_file(directory, first)
        if in_bucket(path):
            with contextlib.suppress(Held):
                stack.enter_context(BucketLock(directory, "drawing", name=f"{path.stem}.lock"))
                return first
        elif try_lock(stack.enter_context(open(path)), fcntl.LOCK_EX):
            return first
    return None


def _new(stack: contextlib.ExitStack, directory: AnyPath, content: bytes) -> int | None:
    """The number of row 0 of a new set, which is locked.

    None in a bucket, where this process or another one has stored the file, without a lock.
    """
    while True:
        first = free_number(directory)
        path = set_file(directory, first)
        if in_bucket(path):
            create(path, content)
            return None
        with contextlib.suppress(FileExistsError):  # another process was faster
            stack.enter_context(_create(path, content))
            return first


def _create(path: Path, content: bytes) -> BinaryIO:
    """A new file, open and locked. Its name appears with all of its content.

    Raises FileExistsError if the file exists. On a file system without hard links, the name appears
    first.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    file = _create_in_place(temporary, content)
    try:
        os.link(temporary, path)  # unlike a rename, it never replaces a file
    except OSError as error:
        file.close()
        if isinstance(error, FileExistsError):
            raise
        return _create_in_place(path, content)
    finally:
        temporary.unlink()
    return file


def _create_in_place(path: Path, content: bytes) -> BinaryIO:
    """`_create` under the final name. Nothing is left of a file that cannot be written."""
    file = open(path, "xb")
    try:
        try_lock(file, fcntl.LOCK_EX)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        path.unlink()
        with contextlib.suppress(OSError):
            file.close()
        error.filename = error.filename or os.fspath(path)  # a failed write does not name its file
        raise
    return file


def _digest(job: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def set_file(directory: AnyPath, first: int) -> AnyPath:
    """The file of a set. first: number of row 0."""
    return directory / f"set_{first:04d}.json"


def sets_of(directory: AnyPath, job: Mapping[str, Any], count: int) -> list[int]:
    """The numbers of row 0 of the sets of a job, ascending."""
    wanted = _digest(job), count
    found = sorted(sets(directory).items())
    return [first for first, content in found if (content["sha256"], content["count"]) == wanted]


def free_number(directory: AnyPath) -> int:
    """The number after all pictures and sets of a directory.

    A set whose file is damaged or gone ends after the last row that its other files list.
    """
    ends = [0]
    for path in [directory, *folders(directory)]:
        ends += [number + 1 for number in pictures.numbers(path)]
    names = entry_names(directory)
    # Read last: a set may begin meanwhile, and some of its files are not all of it.
    known = sets(directory)
    ends += [first + content["count"] for first, content in known.items()]
    for name in names:
        match = FILES.fullmatch(name)
        if match and int(match[1]) not in known:
            rows = (row["row"] for row in set_rows.read(directory / name))
            ends.append(int(match[1]) + max(rows, default=0) + 1)
    return max(ends)


def folders(directory: AnyPath) -> list[AnyPath]:
    """The folders of large sets."""
    return [directory / name for name in directory_names(directory) if FOLDER.fullmatch(name)]


def sets(directory: AnyPath) -> dict[int, dict[str, Any]]:
    """{number of row 0: content of its file} of the sets of a directory, without damaged files."""
    found = {}
    for name in entry_names(directory):
        match = SET.fullmatch(name)
        if match and (content := _read_set(directory / name)):
            found[int(match[1])] = content
    return found


def _read_set(path: AnyPath) -> dict[str, Any] | None:
    """The content of a set's file; None, with a warning, if it is damaged.

    Waits while another process writes it.
    """
    version = path, written_at(path)
    end, unlocked = time.monotonic() + PATIENCE_S, 0
    while True:
        with contextlib.suppress(ValueError):
            return read_object(path, SET_FIELDS)
        if version in _damaged:
            return None
        # Its writer may lock a new file between two readings. An object appears whole.
        unlocked += 2 if in_bucket(path) else not _is_locked(path)
        if unlocked > 1 or time.monotonic() > end:
            break
        time.sleep(0.05)
    _damaged.add(version)
    log.warning("%s is damaged; its pictures are kept but not continued", path)
    return None


def _is_locked(path: Path) -> bool:
    with open(path) as file:
        return not try_lock(file, fcntl.LOCK_SH)
