"""Checks of the paths that a command writes to, before its computation starts."""

import os
import tempfile

from imagen_jax.object_storage import AnyPath, bucket_errors, check_bucket, in_bucket
from imagen_jax.storage import as_path, check_local, check_utf8


def check_directory(flag: str, path: str) -> None:
    """Raises ValueError if `path` is a URL, a file, or below a file. Creates nothing."""
    check_local(f"--{flag}", path)
    while path and not os.path.exists(path):
        path = os.path.dirname(path.rstrip("/"))
    if path and not os.path.isdir(path):
        raise ValueError(f"--{flag} {path} is a file; give a directory")


def output_directory(flag: str, path: str) -> AnyPath:
    """The path of a directory to write, local or in a bucket. Creates nothing.

    Raises ValueError if it cannot be one.
    """
    found = as_path(f"--{flag}", path)
    check_utf8(f"--{flag}", path)
    if in_bucket(found):
        check_bucket(f"--{flag}", found)
        with bucket_errors(found):
            is_file = found.is_file()
        if is_file:
            raise ValueError(f"--{flag} {path} is a file; give a directory")
    else:
        check_directory(flag, path)
    return found


def check_file(flag: str, path: str) -> None:
    """Raises ValueError if `path` is a directory."""
    if path and os.path.isdir(path):
        raise ValueError(f"--{flag} {path} is a directory; give a file")


def make_directory(flag: str, path: str | AnyPath) -> None:
    """Creates an output directory before a long computation starts; nothing in a bucket.

    Raises ValueError if no file can be written there.
    """
    if not isinstance(path, str) and in_bucket(path):
        return
    check_directory(flag, os.fspath(path))
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"--{flag} {path} cannot be written to: {error.strerror}; give another directory"
        ) from error
