"""OUTPUT while it is made: OUTPUT/partial, which holds the work files, its lock and its checks.

The shards are written into OUTPUT itself. OUTPUT is complete when its manifest exists, which is
written last; then OUTPUT/partial is removed.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from imagen_jax.data.manifest_file import MANIFEST, PARTIAL
from imagen_jax.data.prepare.request import REQUEST
from imagen_jax.distributed import agreement
from imagen_jax.locks import LOCK, only_process
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import copy_file, entry_names, exists, remove

SHARD_INDEX = "index.jsonl"  # in the work directory, see sources.shard_index
DIRECTORIES = ("checked", "journal", "plan")  # of the work directory
_RESULT = "result"  # in the work directory of earlier versions, which was renamed to OUTPUT
_WORK_FILES = {*DIRECTORIES, _RESULT, "hosts.json", LOCK, REQUEST, SHARD_INDEX}
_TEMPORARY = r"\..*\.tmp"
# What OUTPUT may hold before it has a manifest, and what it may hold before anything is written:
# a new file system has lost+found.
_BEGUN = rf"images|captions(_.+)?|skipped\.jsonl|first_records\.json|{_TEMPORARY}"
_EMPTY = rf"{PARTIAL}|lost\+found"


def work_directory(output: AnyPath) -> AnyPath:
    """The directory that holds the work files until `output` is complete."""
    return output / PARTIAL


def earlier_work(output: AnyPath) -> AnyPath:
    """The work directory of earlier versions, beside `output`."""
    return output.with_name(f"{output.name}.partial")


def check_output(output: AnyPath) -> None:
    """Raises ValueError if `output` holds anything but prepared data, finished or not."""
    if not in_bucket(output) and output.exists() and not output.is_dir():
        raise ValueError(_foreign(output))
    names, partial = entry_names(output), work_directory(output)
    has_request = _check_work(partial, is_finished=MANIFEST in names)
    if MANIFEST in names:
        return
    known = f"{_EMPTY}|{_BEGUN}" if has_request else _EMPTY
    foreign = [name for name in names if not re.fullmatch(known, name)]
    if foreign and has_request:
        raise ValueError(
            f"{output} holds unfinished work of prepare_data and {', '.join(foreign[:3])}, which is"
            " not part of it: move that away, then run the same command again"
        )
    if foreign:
        raise ValueError(_foreign(output))


def _foreign(output: AnyPath) -> str:
    return f"{output} exists and is not prepared data: choose another --output"


def _check_work(partial: AnyPath, is_finished: bool) -> bool:
    """Whether a work directory has a request, without which nothing has been written.

    Raises ValueError if it holds anything but work files. is_finished: whether they are those of a
    finished result, whose removal was interrupted.
    """
    found = set(entry_names(partial))
    foreign = {name for name in found - _WORK_FILES if not re.fullmatch(_TEMPORARY, name)}
    if REQUEST not in found and not is_finished:
        directories = found & {*DIRECTORIES, _RESULT}
        foreign |= {name for name in directories if entry_names(partial / name)}
    if foreign:
        raise ValueError(
            f"{partial} is in the way and is not unfinished work of prepare_data: choose another"
            " --output"
        )
    return REQUEST in found


def adopt_earlier_work(output: AnyPath) -> None:
    """Moves the work directory of an earlier version into `output`, where `locked` expects it.

    Raises ValueError if another process prepares data in it.
    """
    earlier, partial = earlier_work(output), work_directory(output)
    if in_bucket(output) or partial.exists() or (output / MANIFEST).exists():
        return
    if not any((earlier / name).is_file() for name in (REQUEST, SHARD_INDEX)):
        return
    _check_work(earlier, is_finished=False)
    with only_process(earlier, "preparing data in"):
        output.mkdir(exist_ok=True)
        os.rename(earlier, partial)


def _adopt_earlier_result(output: AnyPath) -> None:
    """Moves the shards of an earlier version from the work directory to `output`."""
    result = work_directory(output) / _RESULT
    if not in_bucket(output) and result.is_dir():
        for path in result.iterdir():
            os.rename(path, output / path.name)
        result.rmdir()


@contextlib.contextmanager
def locked(output: AnyPath) -> Iterator[None]:
    """Creates the work directory of `output` and locks it for this process."""
    adopt_earlier_work(output)
    check_output(output)
    partial = work_directory(output)
    with only_process(partial, "preparing data in"):
        _adopt_earlier_result(output)
        _make_directories(partial)
        for left in [] if in_bucket(output) else output.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
        yield


def _make_directories(partial: AnyPath) -> None:
    for name in () if in_bucket(partial) else DIRECTORIES:
        (partial / name).mkdir(parents=True, exist_ok=True)


def remove_work(partial: AnyPath) -> None:
    """Empties the directories of a work directory."""
    for name in DIRECTORIES:
        remove(partial / name)
    _make_directories(partial)


@contextlib.contextmanager
def shard_index(output: AnyPath, read_only: bool) -> Iterator[Path]:
    """Yields the local file of a source's index of shards.

    That of a bucket is a copy, which process 0 stores at the end unless it is `read_only`.
    """
    file = work_directory(output) / SHARD_INDEX
    if not in_bucket(output):
        yield file
        return
    with tempfile.TemporaryDirectory() as directory:
        local = Path(directory) / SHARD_INDEX
        if exists(file):
            copy_file(file, local)
        before = local.read_bytes() if local.exists() else b""
        try:
            yield local
        finally:
            stores = not read_only and agreement.is_first() and local.exists()
            if stores and local.read_bytes() != before:
                copy_file(local, file)
