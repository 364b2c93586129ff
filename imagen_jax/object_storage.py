"""Buckets of Cloud Storage: paths, errors and the libraries that read and write them.

etils.epath, which orbax uses too, reads buckets with gcsfs (the extra `gcs`); TensorStore has what
epath lacks, conditional writes above all.
"""

import contextlib
import errno
import io
import logging
import os
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from etils import epath

AnyPath = Path | epath.Path

SCHEME = "gs"
SLOW_S = 10.0  # after which a bucket that does not answer is mentioned
# The size of the parts in which an object is read, and the number of parts that are kept.
BLOCK_BYTES, BLOCKS = 4 * 2**20, 6
# Status codes of Cloud Storage, and the errors of a file system that mean the same.
_STATUS = {"401": errno.EACCES, "403": errno.EACCES, "404": errno.ENOENT, "412": errno.EAGAIN}
_ABSL = {"PERMISSION_DENIED": errno.EACCES, "UNAUTHENTICATED": errno.EACCES}

log = logging.getLogger(__name__)


def set_up(label: str, text: str) -> None:
    """Makes epath see every change of a bucket at once. Raises ValueError without gcsfs."""
    try:
        import fsspec
        import gcsfs  # noqa: F401 - epath reads buckets with it
    except ImportError as error:
        raise ValueError(
            f"{label} {text} is in a bucket, which needs the extra `gcs`: pip install -e '.[gcs]'"
        ) from error
    for name in ("gcsfs", "fsspec"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # `bucket_errors` says what failed
    # Listings that gcsfs keeps would hide files that another process has written.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def in_bucket(path: AnyPath) -> bool:
    """Whether a path is that of an object of Cloud Storage."""
    return not isinstance(path, Path)


def check_bucket(label: str, path: AnyPath) -> None:
    """Raises ValueError if a bucket does not exist or may not be read. Does nothing for others."""
    if not in_bucket(path):
        return
    bucket = epath.Path(f"{SCHEME}://{_bucket_name(path)}")
    slow = threading.Timer(SLOW_S, log.warning, ("%s does not answer yet; trying again", bucket))
    slow.daemon = True
    slow.start()
    try:
        with bucket_errors(bucket):
            found = bucket.exists()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.ENOENT):
            raise
        raise ValueError(f"{label} {path} cannot be read: {error.strerror}") from error
    finally:
        slow.cancel()
    if not found:
        raise ValueError(
            f"{label} {path}: there is no bucket {bucket}; create it, or check the name"
        )


def _bucket_name(path: epath.Path) -> str:
    return os.fspath(path).removeprefix(f"{SCHEME}://").partition("/")[0]


@contextlib.contextmanager
def bucket_errors(path: AnyPath) -> Iterator[None]:
    """Raises OSError instead of the errors of the libraries that read and write buckets.

    They have repeated failed requests themselves, so the error is that of a bucket that does not
    answer, EIO, unless the request was refused.
    """
    try:
        yield
    except OSError as error:
        # Those of aiohttp have the number of a connection, such as ECONNREFUSED.
        if error.errno is not None and not type(error).__module__.startswith("aiohttp"):
            raise
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EIO
        number = errno.EACCES if str(error).startswith("Forbidden") else number  # gcsfs, for 403
        reason = os.strerror(number) if number == errno.ENOENT else " ".join(str(error).split())
        raise OSError(number, reason, os.fspath(path)) from error
    except Exception as error:
        kind = f"{type(error).__module__}.{type(error).__name__}"
        if isinstance(error, (ValueError, RuntimeError)) and _is_of_tensorstore(error):
            number = next((n for text, n in _ABSL.items() if text in str(error)), errno.EIO)
        elif kind.startswith(("gcsfs.", "aiohttp.", "google.")):
            refused = "DefaultCredentials" in kind or "RefreshError" in kind
            number = _STATUS.get(str(getattr(error, "code", "")), errno.EIO)
            number = errno.EACCES if refused else number
        else:
            raise
        reason = " ".join(str(error).split())[:300] or kind
        raise OSError(number, reason, os.fspath(path)) from error


def _is_of_tensorstore(error: Exception) -> bool:
    """Whether TensorStore reports an error of a key-value store."""
    return bool(re.match(r"(Error (reading|writing|deleting|listing)|[A-Z_]+: )", str(error)))


class FileState(NamedTuple):
    """size: in bytes. version: the time of the last change in ns; of an object, its generation.

    is_regular: False for a directory, a pipe or a device.
    """

    size: int
    version: int
    is_regular: bool


def file_state(path: AnyPath) -> FileState:
    """What is at a path. Raises FileNotFoundError if there is nothing."""
    if not in_bucket(path):
        found = os.stat(path)
        return FileState(found.st_size, found.st_mtime_ns, stat.S_ISREG(found.st_mode))
    import fsspec

    with bucket_errors(path):
        info = fsspec.filesystem("gcs").info(os.fspath(path))
    is_object = info["type"] == "file"
    return FileState(info["size"] or 0, int(info.get("generation", 0)), is_object)


def matching(pattern: epath.Path) -> list[epath.Path]:
    """The objects that match a glob, sorted by name; hidden ones only if the glob names them."""
    import fsspec

    text = os.fspath(pattern)
    with bucket_errors(pattern):
        found = fsspec.filesystem("gcs").glob(text)
    names = sorted(name.rstrip("/") for name in found)
    shown = [name for name in names if "/." in text or "/." not in name]
    return [epath.Path(f"{SCHEME}://{name}") for name in shown]


def open_to_read(path: AnyPath, buffer: int = io.DEFAULT_BUFFER_SIZE) -> BinaryIO:
    """Opens a file for reading at any position; an object is read in blocks of BLOCK_BYTES.

    The last BLOCKS blocks that were used are kept. buffer: bytes that are copied at a time. Errors
    of a bucket are those of `bucket_errors`.
    """
    if not in_bucket(path):
        return open(path, "rb", buffering=buffer)
    return io.BufferedReader(_Blocks(path), buffer)


def read_parts(path: epath.Path, part: int) -> Iterator[bytes]:
    """The content of an object from begin to end, in requests of `part` bytes; keeps none of it."""
    import fsspec

    with bucket_errors(path):
        with fsspec.filesystem("gcs").open(os.fspath(path), "rb", cache_type="none") as file:
            while content := file.read(part):
                yield content


class _Blocks(io.RawIOBase):
    """An object of a bucket, see `open_to_read`."""

    mode = "rb"

    def __init__(self, path: epath.Path):
        import fsspec

        set_up("", os.fspath(path))  # in a worker process too
        self._path, self.name = path, os.fspath(path)
        options = {"cache_type": "blockcache", "cache_options": {"maxblocks": BLOCKS}}
        with bucket_errors(path):
            filesystem = fsspec.filesystem("gcs")
            self._file = filesystem.open(os.fspath(path), "rb", block_size=BLOCK_BYTES, **options)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with bucket_errors(self._path):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def key_value_store(directory: epath.Path) -> Any:
    """TensorStore's view of what lies below a directory of a bucket, by relative name.

    It has conditional writes, recursive listings and deletions of many objects.
    """
    import tensorstore

    return tensorstore.KvStore.open(f"{os.fspath(directory).rstrip('/')}/").result()


def create(path: epath.Path, content: bytes) -> None:
    """Stores an object, unless there is one of this name."""
    store, name = key_value_store(path.parent), path.name
    with bucket_errors(path):
        found = store.read(name).result()
        if found.state == "missing":
            store.write(name, content, if_equal=found.stamp.generation).result()
