"""Files that appear whole or not at all, and directories sealed with checksums. Local paths only.

A sealed directory holds SHA256SUMS, which lists every other file of it: `sha256sum -c SHA256SUMS`
checks it as well.
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
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

CHECKSUMS = "SHA256SUMS"
LOCK = "lock"
# Attempts to take a lock. `is_locked` holds it for an instant, so one failure proves nothing.
LOCK_ATTEMPTS = 10
# hashlib releases the GIL; one thread hashes about 1.2 GB/s on a CPU with SHA instructions.
HASH_THREADS = 4
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins
# gs://BUCKET/PATH, also after pathlib has changed it to gs:/BUCKET/PATH.
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

FREE_SPACE = "free some space, then run the same command again"
COPY_AGAIN = "download or copy it again"  # the remedy for most damaged files
# Errors of a network file system that does not answer. The file may be there at the next attempt.
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
    """Whether a file system did not answer, so that a retry may succeed."""
    return isinstance(error, OSError) and error.errno in AWAY


def disk_limit(text: str) -> int | None:
    """The errno of a full disk, a quota or a limit on file sizes that another library reports.

    text: the library's message, which holds that of the operating system.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return next((number for number in numbers if os.strerror(number) in text), None)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raises OSError instead of ArrayRecord's RuntimeError for a full or failing disk."""
    try:
        yield
    except RuntimeError as error:
        number = disk_limit(str(error)) or errno.EIO
        raise OSError(number, str(error).partition(";")[0], str(path)) from error


def check_local(label: str, path: str | os.PathLike) -> None:
    """Raises ValueError if `path` is a URL, such as gs://BUCKET/PATH.

    label: what the message calls the path, such as "--output".
    """
    if URL.match(os.fspath(path)):
        raise ValueError(
            f"{label} {os.fspath(path)} is a URL, only local paths work: mount the bucket or copy"
            " the files"
        )


def check_utf8(label: str, path: str | os.PathLike) -> None:
    """Raises ValueError if `path` is not UTF-8: ArrayRecord and orbax cannot open it."""
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{label} {os.fspath(path)} is not a UTF-8 path: rename the directory or give another"
        ) from error


def missing_content(path: Path) -> str:
    """Why a file does not hold its content: it is empty or a Git LFS pointer. "" if it may hold it.

    Reads the first bytes only. The text completes a sentence that begins with the file's name.
    """
    with open(path, "rb") as file:
        return _missing_content(file.read(len(LFS_POINTER)))


def _missing_content(start: bytes) -> str:
    if not start:
        return "is empty; download or copy it again"
    if start.startswith(LFS_POINTER):
        return (
            "is a Git LFS pointer instead of the file itself; run `git lfs pull` in its"
            " repository, or download the file again"
        )
    return ""


def check_content(path: Path) -> None:
    """Raises ValueError if a file is empty or a Git LFS pointer."""
    if reason := missing_content(path):
        raise ValueError(f"{path} {reason}")


def read_json(path: Path, remedy: str = COPY_AGAIN) -> Any:
    """The value in a JSON file.

    remedy: what to do with a damaged file; ends the message.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, a Git LFS pointer, cut short or not JSON; the message names it.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; {remedy}")
    check_content(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from error


def read_object(path: Path, fields: Mapping[str, type], remedy: str = COPY_AGAIN) -> dict[str, Any]:
    """The object in a JSON file, see `read_json` and `check_object`."""
    content = read_json(path, remedy)
    check_object(path, content, fields, remedy)
    return content


def check_object(label: Any, content: Any, fields: Mapping[str, type], remedy: str) -> None:
    """Raises ValueError unless parsed JSON is an object with these fields, of these types.

    label: the file that holds it. fields: {dotted name: type}, such as {"train.steps": int}.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{label} is damaged (it is not a JSON object); {remedy}")
    for name, kind in fields.items():
        value: Any = content
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"{label} is damaged (it has no {name}); {remedy}")
            value = value[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise ValueError(
                f"{label} is damaged ({name} is {value!r:.40}, not of type {kind.__name__});"
                f" {remedy}"
            )


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path`, of this call alone: process numbers repeat on other hosts."""
    return path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file and its parent directories; its name appears when all of it is on the disk."""
    write_lines(path, [data])


def write_lines(path: Path, lines: Iterable[bytes | str]) -> None:
    """`write_atomically` for a file of any size. A line brings its own line feed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.writelines(line.encode() if isinstance(line, str) else line for line in lines)
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # of a full disk, for example
        if error.errno is None:
            raise
        # A failed write names no file, a failed rename the temporary file too.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def check_outputs(directory: Path, files: Iterable[str], directories: Iterable[str]) -> None:
    """Raises ValueError if a file to write is a directory, or a directory to create is a file.

    files, directories: their names in `directory`. Call it before a long computation.
    """
    wrong = [(name, "directory", "file") for name in files if (directory / name).is_dir()]
    for name in directories:
        if os.path.lexists(directory / name) and not (directory / name).is_dir():
            wrong.append((name, "file", "directory"))
    for name, found, needed in wrong:
        raise ValueError(
            f"{directory / name} is a {found}, but a {needed} of that name is to be written:"
            " remove it, or give another output directory"
        )


def write_json(path: Path, content: Any) -> None:
    """Writes an indented JSON file, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes a compressed .npz file, whole or not at all."""
    import numpy as np

    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(path, content.getvalue())


@contextlib.contextmanager
def only_process(directory: Path, doing: str) -> Iterator[None]:
    """Creates `directory` and locks it for this process. The lock ends with the process.

    doing: completes "another process is ... DIRECTORY". Raises ValueError if another process holds
    the lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOCK, "w") as file:
        for _ in range(LOCK_ATTEMPTS):
            if try_lock(file, fcntl.LOCK_EX):
                break
            time.sleep(0.02)
        else:
            raise ValueError(f"another process is {doing} {directory}")
        yield


@contextlib.contextmanager
def whole_directory(output: Path, doing: str) -> Iterator[Path]:
    """Yields a temporary directory, renamed to `output` at the end, or removed after an error.

    output: a directory that does not exist or is empty. doing: as for `only_process`, which rejects
    a second process with the same `output`.
    """
    partial = output.with_name(f".{output.name}.partial")
    with only_process(partial, doing):
        try:
            if output.is_dir() and any(output.iterdir()):  # since the caller looked
                raise ValueError(f"{output} is not empty: give another directory")
            work = partial / "content"
            shutil.rmtree(work, ignore_errors=True)  # left by a killed process
            work.mkdir()
            yield work
            os.rename(work, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_locked(directory: Path) -> bool:
    """Whether a process is inside `only_process(directory)`, as far as this machine can see.

    A network file system may not share locks between machines.
    """
    try:
        with open(directory / LOCK) as file:
            return not try_lock(file, fcntl.LOCK_SH)
    except (FileNotFoundError, NotADirectoryError):
        return False


def try_lock(file: Any, kind: int) -> bool:
    """Takes fcntl.LOCK_SH or LOCK_EX until `file` is closed. False if another process has it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def seal(directory: Path) -> None:
    """Flushes every file of `directory` to the disk, then writes SHA256SUMS.

    The caller renames the directory to its final name.
    """
    for path in directory.rglob("*"):
        flush(path)
    (directory / CHECKSUMS).write_bytes(_render(_checksums(directory)))
    flush(directory / CHECKSUMS)
    flush(directory)


def find_damage(directory: Path) -> str | None:
    """The first difference between a sealed directory and its checksums, None if there is none.

    The text names the file: it is missing, not listed, or does not match its checksum.
    """
    try:
        recorded = (directory / CHECKSUMS).read_bytes()
        sums = _checksums(directory)
    except OSError as error:
        return f"{error.filename or directory}: {error.strerror}"
    if recorded == _render(sums):
        return None
    if reason := _missing_content(recorded):
        return f"{CHECKSUMS} {reason}"
    lines = recorded.decode("utf-8", "replace").split("\n")
    listed = {line[66:]: line[:64] for line in lines if re.match(r"[0-9a-f]{64}  \S", line)}
    for name in sorted(listed.keys() | sums.keys()):
        if name not in sums:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} is not listed in {CHECKSUMS}"
        if sums[name] != listed[name]:
            with contextlib.suppress(OSError):  # a trainer may delete it meanwhile
                if reason := missing_content(directory / name):
                    return f"{name} does not match its checksum: it {reason}"
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
    """SHA-256 of every file under `directory` except SHA256SUMS, by relative name."""
    files = sorted(p for p in directory.rglob("*") if not p.is_dir() and p != directory / CHECKSUMS)
    names = [path.relative_to(directory).as_posix() for path in files]
    with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(sha256_file, files)))


def _render(sums: dict[str, str]) -> bytes:
    """The checksums in the format of `sha256sum`."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()
