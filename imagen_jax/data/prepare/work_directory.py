"""OUTPUT.partial, the directory in which OUTPUT is made, and the place of OUTPUT itself."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from imagen_jax.data import records
from imagen_jax.data.prepare.request import REQUEST
from imagen_jax.locks import only_process

SHARD_INDEX = "index.jsonl"  # in the work directory, see sources.shard_index
DIRECTORIES = ("checked", "journal", "plan", "result")  # of the work directory


def work_directory(output: Path) -> Path:
    """The directory that holds everything until `output` is complete; on the same file system."""
    return output.with_name(f"{output.name}.partial")


def check_output(output: Path) -> None:
    """Raises ValueError if the finished data cannot become `output` by a rename."""
    if (output / records.MANIFEST).is_file() or not output.exists():
        return
    if os.path.ismount(output):
        raise ValueError(_mounted(output))
    if not output.is_dir() or any(output.iterdir()):
        raise ValueError(f"{output} exists and is not prepared data: choose another --output")


def check_work_directory(partial: Path) -> None:
    """Raises ValueError if `partial` exists and is something else than a work directory.

    Also if it is on another file system than its parent: the result could not be renamed.
    """
    if partial.exists() and partial.stat().st_dev != partial.parent.stat().st_dev:
        raise ValueError(
            f"{partial} is on another file system than {partial.parent}: remove it, and give an"
            " --output on the file system that has the room"
        )
    known = {*DIRECTORIES, "hosts.json", "lock", REQUEST, SHARD_INDEX}
    found = {path.name for path in partial.iterdir()} if partial.exists() else set()
    foreign = {name for name in found - known if not re.fullmatch(r"\..*\.tmp", name)}
    if REQUEST not in found:  # then nothing has been written
        foreign |= {name for name in found & {*DIRECTORIES} if any((partial / name).iterdir())}
    if foreign:
        raise ValueError(
            f"{partial} is in the way and is not unfinished work of prepare_data: choose another"
            " --output"
        )


def _mounted(output: Path) -> str:
    return f"{output} is a mount point and cannot be replaced: give --output {output / 'data'}"


def remove_empty(output: Path) -> None:
    """Removes an empty directory from where the result will be, before the work."""
    if output.exists():
        try:
            output.rmdir()
        except OSError as error:
            reason = _mounted(output) if error.errno == errno.EBUSY else str(error)
            raise ValueError(reason) from error


@contextlib.contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Creates the work directory and locks it for this process."""
    check_work_directory(partial)
    for name in DIRECTORIES:
        (partial / name).mkdir(parents=True, exist_ok=True)
    with only_process(partial, "preparing data in"):
        for left in partial.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
        yield


def remove_work(partial: Path) -> None:
    """Empties the directories of a work directory."""
    for name in DIRECTORIES:
        shutil.rmtree(partial / name)
        (partial / name).mkdir()
