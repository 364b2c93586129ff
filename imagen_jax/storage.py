"""Files that appear whole or not at all, and directories that can tell whether any of their bytes
changed: SHA256SUMS lists every other file, so `sha256sum -c SHA256SUMS` checks one too.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CHECKSUMS = "SHA256SUMS"
LOCK = "lock"
LOOKS = 10  # `is_kept` has the lock for an instant, so one look does not tell
# hashlib releases the interpreter; one thread does about 1.2 GB/s where the CPU has SHA
# instructions
HASH_THREADS = 4

# What a network's file system says while it is away: the file may well be there the next time.
AWAY = frozenset(
    (
        errno.EIO,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
    )
)


def is_away(error: BaseException) -> bool:
    """Whether an error is of a file system that did not answer, which trying again may mend."""
    return isinstance(error, OSError) and error.errno in AWAY


def check_local(label: str, path: str | os.PathLike) -> None:
    """Raises ValueError for a URL; pathlib turns "gs://bucket" into the local path "gs:/bucket"."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(
            f"{label} {path} is a URL, only local paths work: mount the bucket or copy the files"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file, and the directories above it, so that its name appears only once all of it is
    on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    flush(temporary)
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """An indented JSON file, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """A compressed .npz file, whole or not at all."""
    import numpy as np

    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(path, content.getvalue())


@contextlib.contextmanager
def only_process(directory: Path, doing: str) -> Iterator[None]:
    """Keeps `directory`, which is made, to this process; the lock goes with the process, however it
    ends. ValueError if another has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOCK, "w") as file:
        for _ in range(LOOKS):
            if try_lock(file, fcntl.LOCK_EX):
                break
            time.sleep(0.02)
        else:
            raise ValueError(f"another process is {doing} {directory}")
        yield


def is_kept(directory: Path) -> bool:
    """Whether a process is inside `only_process(directory)`, as far as this machine can tell: a
    network file system may not pass locks on.
    """
    try:
        with open(directory / LOCK) as file:
            return not try_lock(file, fcntl.LOCK_SH)
    except (FileNotFoundError, NotADirectoryError):
        return False


def try_lock(file: Any, kind: int) -> bool:
    """Whether the lock (fcntl.LOCK_SH or LOCK_EX) could be had; it goes when the file is closed."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def seal(directory: Path) -> None:
    """Forces every file of `directory` to the disk, then adds SHA256SUMS, last. The caller renames
    the directory to its final name.
    """
    for path in directory.rglob("*"):
        flush(path)
    (directory / CHECKSUMS).write_bytes(_render(_checksums(directory)))
    flush(directory / CHECKSUMS)
    flush(directory)


def find_damage(directory: Path) -> str | None:
    """None if the files of a sealed directory are exactly those listed, byte for byte, else the
    first fault, naming the file.
    """
    try:
        recorded = (directory / CHECKSUMS).read_bytes()
        sums = _checksums(directory)
    except OSError as error:
        return f"{error.filename or directory}: {error.strerror}"
    if recorded == _render(sums):
        return None
    lines = recorded.decode("utf-8", "replace").split("\n")
    listed = {line[66:]: line[:64] for line in lines if re.match(r"[0-9a-f]{64}  \S", line)}
    for name in sorted(listed.keys() | sums.keys()):
        if name not in sums:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} is not listed in {CHECKSUMS}"
        if sums[name] != listed[name]:
            return f"{name} does not match its checksum"
    return f"{CHECKSUMS} is malformed"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """fsync of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksums(directory: Path) -> dict[str, str]:
    """sha256 of every file under `directory` but SHA256SUMS, by relative name."""

    files = sorted(p for p in directory.rglob("*") if not p.is_dir() and p != directory / CHECKSUMS)
    with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(
            zip([p.relative_to(directory).as_posix() for p in files], pool.map(sha256_file, files))
        )


def _render(sums: dict[str, str]) -> bytes:
    """As `sha256sum` writes it."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()
