"""Files that appear whole or not at all, on local file systems and in buckets of Cloud Storage.

A path is a pathlib.Path, or an etils.epath.Path for gs://BUCKET/PATH. Both have the same methods;
this module hides the differences. A bucket has no directories, no rename of a directory and no
appending; an object appears when all of it is stored.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from imagen_jax import object_storage
from imagen_jax.object_storage import AnyPath, bucket_errors, in_bucket, key_value_store

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins
# gs://BUCKET/PATH, also after pathlib has changed it to gs:/BUCKET/PATH.
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
COPY_BYTES = 16 * 2**20  # that are copied to or from a bucket at a time

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


def as_path(label: str, path: str | os.PathLike) -> AnyPath:
    """The path that a text means: a local one, or one in a bucket.

    label: what messages call the path, such as "--output".

    Raises ValueError for a URL of another scheme, and if gs:// needs a package that is missing.
    """
    text = os.fspath(path)
    if not (url := URL.match(text)):
        return Path(text)
    if url[1] != object_storage.SCHEME:
        raise ValueError(
            f"{label} {text} has the scheme {url[1]}://, but only gs:// and local paths work: mount"
            " the storage, or copy the files"
        )
    rest = text[url.end() :].strip("/")
    if not rest:
        raise ValueError(f"{label} {text} names no bucket; give gs://BUCKET/PATH")
    object_storage.set_up(label, text)
    return epath.Path(f"{object_storage.SCHEME}://{rest}")


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
        os.path.abspath(os.fspath(path)).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{label} {os.fspath(path)} is not a UTF-8 path: rename the directory or give another"
        ) from error


def absolute(path: AnyPath) -> AnyPath:
    """The path from the root of its file system."""
    return path if in_bucket(path) else path.absolute()


def missing_content(path: AnyPath) -> str:
    """Why a file does not hold its content: it is empty or a Git LFS pointer. "" if it may hold it.

    Reads the first bytes only. The text completes a sentence that begins with the file's name.
    """
    with path.open("rb") as file:
        return content_fault(file.read(len(LFS_POINTER)))


def content_fault(start: bytes) -> str:
    """`missing_content` of a file that begins with these bytes."""
    if not start:
        return "is empty; download or copy it again"
    if start.startswith(LFS_POINTER):
        return (
            "is a Git LFS pointer instead of the file itself; run `git lfs pull` in its"
            " repository, or download the file again"
        )
    return ""


def check_content(path: AnyPath) -> None:
    """Raises ValueError if a file is empty or a Git LFS pointer."""
    if reason := missing_content(path):
        raise ValueError(f"{path} {reason}")


def read_json(path: AnyPath, remedy: str = COPY_AGAIN) -> Any:
    """The value in a JSON file.

    remedy: what to do with a damaged file; ends the message.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, a Git LFS pointer, cut short or not JSON; the message names it.
    """
    with bucket_errors(path):
        content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} is empty; {remedy}")
    if reason := content_fault(content):
        raise ValueError(f"{path} {reason}")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from error


def read_object(
    path: AnyPath, fields: Mapping[str, type], remedy: str = COPY_AGAIN
) -> dict[str, Any]:
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


def write_atomically(path: AnyPath, data: bytes) -> None:
    """Writes a file and its parent directories; its name appears when all of it is stored."""
    write_lines(path, [data])


def write_lines(path: AnyPath, lines: Iterable[bytes | str]) -> None:
    """`write_atomically` for a file of any size. A line brings its own line feed."""
    with written_whole(path) as writing, open(writing, "wb") as file:
        file.writelines(line.encode() if isinstance(line, str) else line for line in lines)


@contextlib.contextmanager
def written_whole(path: AnyPath) -> Iterator[Path]:
    """Yields the path of a local file to write, which becomes `path` at the end.

    Creates the parent directories. After an error nothing is left, and an older file stays.
    """
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory) / path.name
            copy_file(Path(directory) / path.name, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        # A failed write names no file, a failed rename the temporary one. Any other name is that of
        # a file that the caller has read.
        if error.errno is None or str(error.filename) not in ("None", str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        temporary.unlink(missing_ok=True)  # of a full disk, for example


def copy_file(source: AnyPath, target: AnyPath) -> None:
    """Copies a file to a local path or a bucket, whole or not at all."""
    with bucket_errors(source), source.open("rb") as file:
        if not in_bucket(target):
            return write_lines(target, iter(lambda: file.read(COPY_BYTES), b""))
        with bucket_errors(target):
            _upload(file, target)


def _upload(file: Any, target: epath.Path) -> None:
    uploaded = target.open("wb")
    try:
        shutil.copyfileobj(file, uploaded, COPY_BYTES)
    except BaseException:
        uploaded.discard()  # closing it would store a part under the object's name
        raise
    uploaded.close()


def copy_directory(source: AnyPath, target: AnyPath) -> None:
    """Copies every file below a directory, each whole or not at all."""
    for name in file_names(source):
        copy_file(source / name, target / name)


def file_names(directory: AnyPath) -> list[str]:
    """The names of all files below a directory, relative to it, sorted."""
    if in_bucket(directory):
        with bucket_errors(directory):
            keys = key_value_store(directory).list().result()
        return sorted(name for key in keys if (name := key.decode()) and not name.endswith("/"))
    found = (path for path in directory.rglob("*") if not path.is_dir())
    return sorted(path.relative_to(directory).as_posix() for path in found)


def entry_names(directory: AnyPath) -> list[str]:
    """The names of the entries of a directory, sorted; [] if it does not exist."""
    try:
        with bucket_errors(directory):
            return sorted(path.name for path in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def directory_names(directory: AnyPath) -> list[str]:
    """The names of the directories in a directory, sorted; [] if it does not exist.

    Symbolic links are left out.
    """
    if not in_bucket(directory):
        paths = ((name, directory / name) for name in entry_names(directory))
        return [name for name, path in paths if path.is_dir() and not path.is_symlink()]
    import fsspec

    try:
        with bucket_errors(directory):
            entries = fsspec.filesystem("gcs").ls(os.fspath(directory), detail=True)
    except FileNotFoundError:
        return []
    directories = (entry["name"] for entry in entries if entry["type"] == "directory")
    return sorted(name.rstrip("/").rpartition("/")[2] for name in directories)


def file_sizes(directory: AnyPath) -> dict[str, int]:
    """{name: bytes} of the files in a directory; {} if it does not exist."""
    try:
        if not in_bucket(directory):
            with os.scandir(directory) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        import fsspec

        with bucket_errors(directory):
            listed = fsspec.filesystem("gcs").ls(os.fspath(directory), detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    files = (entry for entry in listed if entry["type"] == "file")
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in files}


def file_size(path: AnyPath) -> int | None:
    """The size of a file in bytes; None if it does not exist."""
    try:
        with bucket_errors(path):
            stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.length if in_bucket(path) else stat.st_size


def written_at(path: AnyPath) -> float:
    """When a file was written, in seconds since 1970; -inf if it does not exist."""
    try:
        with bucket_errors(path):
            stat = path.stat()
    except FileNotFoundError:
        return -math.inf
    return stat.mtime if in_bucket(path) else stat.st_mtime


def exists(path: AnyPath) -> bool:
    """Whether there is a file or directory. Raises OSError if a bucket does not answer."""
    with bucket_errors(path):
        return path.exists()


def remove(path: AnyPath) -> None:
    """Deletes a file, or a directory with everything below it; nothing if it does not exist."""
    if in_bucket(path):
        import tensorstore

        with bucket_errors(path):
            store, name = key_value_store(path.parent), path.name
            store.delete_range(tensorstore.KvStore.KeyRange(f"{name}/", f"{name}0")).result()
            store.write(name, None).result()
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_outputs(directory: AnyPath, files: Iterable[str], directories: Iterable[str]) -> None:
    """Raises ValueError if a file to write is a directory, or a directory to create is a file.

    files, directories: their names in `directory`. Call it before a long computation.
    """
    wrong = [(name, "directory", "file") for name in files if _is_directory(directory / name)]
    for name in directories:
        path = directory / name
        present = exists(path) if in_bucket(path) else os.path.lexists(path)
        if present and not _is_directory(path):
            wrong.append((name, "file", "directory"))
    for name, found, needed in wrong:
        raise ValueError(
            f"{directory / name} is a {found}, but a {needed} of that name is to be written:"
            " remove it, or give another output directory"
        )


def _is_directory(path: AnyPath) -> bool:
    with bucket_errors(path):
        return path.is_dir()


def write_json(path: AnyPath, content: Any) -> None:
    """Writes an indented JSON file, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_arrays(path: AnyPath, arrays: Mapping[str, Any]) -> None:
    """Writes a compressed .npz file, whole or not at all."""
    import numpy as np

    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(path, content.getvalue())


def open_arrays(path: AnyPath) -> Any:
    """An open .npz file, numpy's NpzFile. That of a bucket is read into memory.

    Raises what numpy.load raises.
    """
    import numpy as np

    if not in_bucket(path):
        return np.load(path, allow_pickle=False)
    with bucket_errors(path):
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)


def flush(path: Path) -> None:
    """fsync of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
