"""Buckets of Cloud Storage: paths, errors and the libraries that read and write them.

etils.epath, which orbax uses too, reads buckets with gcsfs (the extra `gcs`); TensorStore has what
epath lacks, conditional writes above all.
"""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

AnyPath = Path | epath.Path

SCHEME = "gs"
# Status codes of Cloud Storage, and the errors of a file system that mean the same.
_STATUS = {"401": errno.EACCES, "403": errno.EACCES, "404": errno.ENOENT, "412": errno.EAGAIN}
_ABSL = {"PERMISSION_DENIED": errno.EACCES, "UNAUTHENTICATED": errno.EACCES}


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
    try:
        with bucket_errors(bucket):
            found = bucket.exists()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.ENOENT):
            raise
        raise ValueError(f"{label} {path} cannot be read: {error.strerror}") from error
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
        if error.errno is not None:
            raise
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EIO
        reason = os.strerror(number) if number == errno.ENOENT else str(error)
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
