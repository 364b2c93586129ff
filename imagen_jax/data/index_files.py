"""Arrays on disk that are computed from prepared data when they are first needed.

They are read through memory maps, so a process needs no memory in proportion to the images.
"""

import contextlib
import dataclasses
import fcntl
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from imagen_jax.storage import flush, temporary_name

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """A directory of this user below the system's directory for temporary files.

    Raises ValueError if another user owns it.
    """
    directory = Path(tempfile.gettempdir()) / f"imagen_jax-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.is_symlink() or directory.stat().st_uid != os.getuid():
        raise ValueError(f"{directory} belongs to another user: set TMPDIR to another directory")
    return directory


def build_once(
    path: Path,
    write: Callable[[Path], None],
    is_intact: Callable[[Path], bool] = lambda _: True,
) -> None:
    """Creates a file with `write(temporary path)`, unless it is there; it appears as a whole.

    If several processes call it at the same time, one of them writes and the others wait. Where
    the file system has no locks, each writes the same content.

    is_intact: whether a file that is there may be used; else it is written again.
    """
    if path.exists() and is_intact(path):
        return
    with locked(path.with_name(f".{path.name}.lock")):
        if path.exists():
            if is_intact(path):
                return
            log.warning("%s is damaged; it is written again", path)
        temporary = temporary_name(path)
        try:
            write(temporary)
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Waits for a lock file, which is removed at the end.

    A process that still waits for the removed file finds what it wanted to write.
    """
    with open(lock, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class MappedArray:
    """An .npy file that each process maps when it first reads it; pickled without its content."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedArray, (self.path,)

    @functools.cached_property
    def array(self) -> Shaped[np.ndarray, "..."]:
        """The array. Raises ValueError if the file is damaged."""
        try:
            return np.load(self.path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{self.path} is damaged ({error}): remove it; it is written again"
            ) from error
