"""Local copies of the shards of prepared data in a bucket, limited in bytes.

    DIRECTORY/HASH/images/images-train.array_record-00000-of-00002

HASH begins the hash of the manifest. A shard is copied whole when it is first needed, and its name
appears when the copy has the size and the SHA-256 of the manifest. The processes of a host share
the directory. A process that has a shard open, or writes one, holds a lock on the file (flock),
which ends with the process. To make room, copies without a lock are deleted: first what killed
processes have left, then the shards that were opened longest ago. Other files in the directory are
not touched, and do not count.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import logging
import math
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from imagen_jax.data.first_records import WrongShard
from imagen_jax.data.index_files import cache_directory, locked
from imagen_jax.object_storage import AnyPath, read_parts
from imagen_jax.storage import COPY_BYTES, check_local, flush, temporary_name

LOCK = ".making_room"  # of the directory: one process at a time makes room
FOLDER = re.compile(r"[0-9a-f]{32}")  # HASH
COPY = re.compile(r".+\.array_record-\d+-of-\d+(\.\d+\.[0-9a-f]+\.tmp)?")  # whole, or being written
FREE_BYTES = 2**28  # that stay free on the disk
COPIERS = 8  # threads of `CopyAhead`; each reads one object at a time
REPORT_S = 10.0  # between two lines about its progress
DEFAULT_GIB = 64.0
_GIB = 2**30
log = logging.getLogger(__name__)
Entries = Mapping[str, Mapping[str, Any]]  # {path of a shard: its entry in the manifest}


class NoRoom(ValueError):
    """There is no room for a shard, and every shard in the directory is open."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where shards are copied to.

    given: a directory; "": one in the directory for temporary files. gib: bound of its copies.
    """

    given: str = ""
    gib: float = DEFAULT_GIB

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "Place":
        """That of the fields shard_cache_dir and shard_cache_gib of a config section `data`."""
        check_local("data.shard_cache_dir", section["shard_cache_dir"])
        return cls(section["shard_cache_dir"], section["shard_cache_gib"])

    @property
    def fields(self) -> dict[str, Any]:
        """The config fields of `of`."""
        return {"shard_cache_dir": self.given, "shard_cache_gib": self.gib}

    @property
    def directory(self) -> Path:
        """The directory, which all processes of a host share."""
        return Path(self.given).absolute() if self.given else cache_directory() / "shards"

    @property
    def most_bytes(self) -> int:
        """The bound in bytes."""
        return int(self.gib * _GIB)


class LocalShard:
    """A copy that is not deleted while this object lives. path: of the local file."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self._file = path, file


@dataclasses.dataclass(frozen=True)
class ShardCache:
    """The copies of one prepared directory.

    remote: the directory in the bucket. identity: the hash of its manifest.
    """

    remote: AnyPath
    identity: str
    place: Place

    def path(self, name: str) -> Path:
        """The local file of a shard."""
        return self.place.directory / self.identity[:32] / name

    def open(self, name: str, entry: Mapping[str, Any]) -> LocalShard:
        """A whole copy of a shard. entry: in the manifest, with bytes and sha256.

        Raises:
          NoRoom: nothing can be deleted to make room.
          WrongShard: the bucket has no such shard, or another one.
          OSError: the bucket does not answer, or the disk is full.
        """
        path = self.path(name)
        while (file := _held(path, entry["bytes"])) is None:
            self._copy(name, entry)
        return LocalShard(path, file)

    def has(self, name: str, entry: Mapping[str, Any]) -> bool:
        """Whether there is a copy of the right size."""
        try:
            return self.path(name).stat().st_size == entry["bytes"]
        except FileNotFoundError:
            return False

    def forget(self, name: str) -> None:
        """Deletes a damaged copy."""
        log.warning("%s is damaged; it is copied again", self.path(name))
        self.path(name).unlink(missing_ok=True)

    def _copy(self, name: str, entry: Mapping[str, Any]) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            if path.exists():  # another process or thread has copied it meanwhile
                return
            temporary, file = self._reserve(path, entry["bytes"])
            try:
                with file:
                    _download(self.remote / name, file, entry)
                    flush(temporary)
                    os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def _reserve(self, path: Path, size: int) -> tuple[Path, BinaryIO]:
        """A locked temporary file beside `path`, of the size of the shard."""
        temporary = temporary_name(path)
        with open(self.place.directory / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _make_room(self.place, size)
            file = open(temporary, "w+b")
            try:
                fcntl.flock(file, fcntl.LOCK_SH)
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                file.close()
                temporary.unlink(missing_ok=True)
                raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        return temporary, file


def _held(path: Path, size: int) -> BinaryIO | None:
    """Opens and locks a copy; None if there is none of the right size."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    stat = os.fstat(file.fileno())
    if stat.st_nlink and stat.st_size == size:
        now = time.time_ns()  # that of the kernel has steps of milliseconds
        os.utime(path, ns=(now, now))
        return file
    file.close()
    if stat.st_nlink:  # otherwise it was deleted between both calls
        log.warning("%s has %d bytes instead of %d; it is copied again", path, stat.st_size, size)
        path.unlink(missing_ok=True)
    return None


def _download(source: AnyPath, target: BinaryIO, entry: Mapping[str, Any]) -> None:
    """Writes an object to a file. Raises WrongShard unless it is the one of the manifest."""
    digest, size = hashlib.sha256(), 0
    try:
        for part in read_parts(source, COPY_BYTES):
            digest.update(part)
            target.write(part)
            size += len(part)
    except FileNotFoundError as error:
        raise WrongShard(f"{source} is missing: copy the data to the bucket again") from error
    target.flush()
    if (size, digest.hexdigest()) != (entry["bytes"], entry["sha256"]):
        raise WrongShard(
            f"{source} is not the shard that the manifest lists, size or SHA-256 differ: copy the"
            " data to the bucket again"
        )


def _make_room(place: Place, size: int) -> None:
    """Deletes unused files until `size` more bytes are within the bound and free on the disk."""
    files = sorted(_files(place.directory))
    over = sum(bytes_ for *_, bytes_, _ in files) + size - place.most_bytes
    lacking = size + FREE_BYTES - shutil.disk_usage(place.directory).free
    left = len(files)
    for is_whole, _, bytes_, path in files:
        if (max(over, lacking) > 0 or not is_whole) and _delete_unused(path):
            over, lacking, left = over - bytes_, lacking - bytes_, left - 1
    if lacking > 0 and not left:
        text = f"no room for a shard of {_amount(size)} beside {_amount(FREE_BYTES)} that stay free"
        raise OSError(errno.ENOSPC, text, os.fspath(place.directory))
    if max(over, lacking) > 0:
        bound = f"shard_cache_gib is {place.gib:g}: give a larger one"
        disk = f"the disk is full, with {_amount(FREE_BYTES)} to stay free: free some space"
        raise NoRoom(
            f"{place.directory} has no room for a shard of {_amount(size)}, and those in it are"
            f" open; {bound if over > 0 else disk}"
        )


def _files(directory: Path) -> Iterator[tuple[bool, float, int, Path]]:
    """(is a whole shard, last opened, bytes, path) of the copies in a cache."""
    for identity in filter(FOLDER.fullmatch, os.listdir(directory)):
        for folder, _, names in os.walk(directory / identity):
            for name in filter(COPY.fullmatch, names):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    yield not name.endswith(".tmp"), stat.st_mtime, stat.st_size, path


def _delete_unused(path: Path) -> bool:
    """Deletes a file unless a process holds its lock. Whether it did."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def check_shards(cache: ShardCache, entries: Entries) -> None:
    """Raises ValueError if a shard alone is larger than the bound."""
    largest, most = max((e["bytes"] for e in entries.values()), default=0), cache.place.most_bytes
    if largest > most:
        raise ValueError(
            f"{cache.remote} has a shard of {_amount(largest)}, but shard_cache_gib is"
            f" {cache.place.gib:g}: set it to {math.ceil(100 * largest / _GIB) / 100} or more"
        )


def check_room(wanted: Sequence[tuple[ShardCache, Entries]]) -> None:
    """Raises ValueError unless all these shards can be in the cache at once.

    Training reads all shards in random order; with fewer of them in the cache, almost every record
    would need the copy of a shard.
    """
    if not wanted:
        return
    place, names = wanted[0][0].place, ", ".join(str(cache.remote) for cache, _ in wanted)
    total = sum(entry["bytes"] for _, entries in wanted for entry in entries.values())
    if total > place.most_bytes:
        raise ValueError(
            f"{names}: training reads {_amount(total)} of shards in random order, but"
            f" data.shard_cache_gib is {place.gib:g}: set it to"
            f" {math.ceil(100 * total / _GIB) / 100} or more, or mount the bucket"
        )
    _make_directory(place)
    kept = {
        cache.path(name)
        for cache, entries in wanted
        for name, entry in entries.items()
        if cache.has(name, entry)
    }
    files = list(_files(place.directory))
    others = sum(bytes_ for *_, bytes_, path in files if path not in kept)
    missing = total - sum(bytes_ for *_, bytes_, path in files if path in kept)
    free = shutil.disk_usage(place.directory).free + others - FREE_BYTES
    if missing > free:
        raise ValueError(
            f"{place.directory} has room for {_amount(max(0, free))}, but {_amount(missing)} of"
            f" {names} are to be copied there: set data.shard_cache_dir to a directory on a larger"
            " disk"
        )


def _make_directory(place: Place) -> None:
    try:
        place.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{place.directory} cannot be created ({error.strerror}): give another"
            " data.shard_cache_dir"
        ) from error


def _amount(size: int) -> str:
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.3g} MiB"


class CopyAhead:
    """Copies shards in threads, in random order, while others read; says how far it is.

    A shard that cannot be copied is left to its reader, which tries again. Processes of one host
    share the work.
    """

    def __init__(self, wanted: Sequence[tuple[ShardCache, Entries]]):
        todo = [
            (cache, name, entry)
            for cache, entries in wanted
            for name, entry in entries.items()
            if not cache.has(name, entry)
        ]
        random.Random().shuffle(todo)
        self._todo, self._lock = iter(todo), threading.Lock()
        self._count, self._total = len(todo), sum(entry["bytes"] for *_, entry in todo)
        self._done, self._bytes, self._said = 0, 0, time.monotonic()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, daemon=True, name="shards")
            for _ in range(min(COPIERS, len(todo)))
        ]
        if todo:
            place = todo[0][0].place.directory
            log.info("copying %d shards, %s, to %s", len(todo), _amount(self._total), place)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Begins no other copy."""
        self._ended.set()

    def wait(self) -> None:
        """Returns when all copies were made or tried."""
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            with self._lock:
                cache, name, entry = next(self._todo, (None, "", {}))
            if cache is None:
                return
            try:
                cache.open(name, entry)
            except (OSError, ValueError) as error:
                log.warning("%s is not copied yet: %s", cache.remote / name, error)
            self._report(entry["bytes"])

    def _report(self, size: int) -> None:
        with self._lock:
            self._done, self._bytes = self._done + 1, self._bytes + size
            now, ended = time.monotonic(), self._done == self._count
            if not ended and now - self._said < REPORT_S:
                return
            self._said = now
            progress = self._done, self._count, _amount(self._bytes), _amount(self._total)
        log.info("copied %d of %d shards, %s of %s", *progress)
