"""Random access to the records of ArrayRecord shards.

Nothing is done for a shard before its first record is read: at 400 million captions there are
98,000 shards. ArrayRecord's own data source is not used, because it takes 3.3 s and 0.2 GB to be
created for 100,000 shards, and keeps every shard that it has read open.
"""

import errno
import logging
import os
import resource
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imagen_jax.checksums import sha256_file
from imagen_jax.data import first_records
from imagen_jax.data.first_records import WrongShard
from imagen_jax.data.shard_cache import LocalShard, NoRoom, ShardCache
from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import is_away

# Seconds between attempts to read a record after a transient file-system error.
PAUSES_S = (1.0, 5.0, 25.0)
# Records are read in random order, so nothing is read ahead. The index at the end of a shard has
# about 4 bytes per record; 1 MiB of it would be read by default.
_OPTIONS, _BUFFER = "readahead_buffer_size:0,footer_prefetch_bytes:65536", 2**15
_MOST_OPEN = 4096  # an open shard of 4,096 records takes 40 KiB
# The longest wait, in seconds, until shards that are being copied or read make room for another
# one, and the time between two attempts.
_ROOM_S, _ROOM_POLL_S = 120.0, 0.2
log = logging.getLogger(__name__)
_all_readers: weakref.WeakSet["ShardReader"] = weakref.WeakSet()  # of this process


class Opened(NamedTuple):
    """An open shard. copy: that of a shard in a bucket."""

    reader: Any
    copy: LocalShard | None


def most_open() -> int:
    """Shards that one reader keeps open.

    All readers together have at most half of the files that the process may have open.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
    readers = sum(reader.files_per_shard for reader in list(_all_readers))
    return max(1, min(_MOST_OPEN, files // max(2, readers)))


def close_shards() -> None:
    """Closes the copies of shards that this process does not read at the moment.

    They can then be deleted, to make room for others.
    """
    for reader in list(_all_readers):
        reader.close_copies()


class ShardReader:
    """The records of consecutive shards by row; picklable, safe to share between threads.

    The size of a shard is compared with the manifest when the shard is opened, its first record
    when it is opened for the first time.
    """

    def __init__(
        self,
        label: str,
        directory: AnyPath,
        shards: Mapping[str, Mapping[str, Any]],
        firsts: Mapping[str, str],
        cache: ShardCache | None = None,
    ):
        """label: for messages. shards: {path in `directory`: entry of the manifest}, in order.

        firsts: {path: SHA-256 of the first record}; a shard that it lacks is not compared. cache:
        copies the shards of a directory in a bucket; None: it is a local one.
        """
        self._label, self._directory, self._cache = label, directory, cache
        self._names = list(shards)
        self._sums = [entry["sha256"] for entry in shards.values()]
        self._sizes = np.array([entry["bytes"] for entry in shards.values()], np.int64)
        self._firsts = [firsts.get(name, "") for name in shards]
        self._ends = np.cumsum([entry["rows"] for entry in shards.values()], dtype=np.int64)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._readers: OrderedDict[int, Opened] = OrderedDict()  # the last used one is the last
        self._compared: set[int] = set()  # shards whose first record is the right one
        _all_readers.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes open shards of their own."""
        state = self.__dict__.copy()
        del state["_lock"], state["_readers"], state["_compared"]
        return state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._names else 0

    @property
    def names(self) -> Sequence[str]:
        """The shards, in order."""
        return self._names

    @property
    def files_per_shard(self) -> int:
        """Files that are open for an open shard."""
        return 2 if self._cache else 1

    def close_copies(self) -> None:
        """See `close_shards`."""
        if self._cache:
            with self._lock:
                self._readers.clear()

    def record(self, row: int) -> bytes:
        """The record of a row.

        Raises:
          IndexError: there is no such row.
          ValueError: the shard is cut short, damaged or another one.
          OSError: the file system failed, also after several attempts.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"{self._label} has rows 0 to {len(self) - 1}, not {row}")
        return self._read(int(np.searchsorted(self._ends, row, side="right")), row, PAUSES_S)

    def _read(self, shard: int, row: int, pauses: Sequence[float]) -> bytes:
        """Reads a record; tries again after each of `pauses`, in seconds, if none was returned."""
        position = row - (int(self._ends[shard - 1]) if shard else 0)
        try:
            opened = self._opened(shard)  # as long as it lives, a copy is not deleted
            return opened.reader.read([position])[0]
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            fault = self._fault(shard, row, error)
            if fault is error and not (pauses and is_away(error)):
                raise
            if not (pauses and is_away(fault)):
                raise fault from error
        log.warning("%s; trying again in %g s", fault, pauses[0])
        time.sleep(pauses[0])
        with self._lock:
            self._readers.pop(shard, None)  # a reader that failed once keeps failing
        return self._read(shard, row, pauses[1:])

    def _opened(self, shard: int) -> Opened:
        """An open shard. One that another thread still reads is closed when that thread is done."""
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        opened = self._open(shard)  # other threads go on; two that open the same shard do no harm
        with self._lock:
            self._readers[shard] = opened
            while len(self._readers) > most_open():
                self._readers.popitem(last=False)
        return opened

    def _open(self, shard: int) -> Opened:
        from array_record.python import array_record_module

        copy, path = self._copy(shard) if self._cache else None, self._path(shard)
        if not copy and os.stat(path).st_size != self._sizes[shard]:
            raise WrongShard(f"{path} is missing or cut short: prepare the data again")
        reader = array_record_module.ArrayRecordReader(
            path, _OPTIONS, file_reader_buffer_size=_BUFFER
        )
        if shard not in self._compared:
            first_records.check(path, reader, self._firsts[shard])
            self._compared.add(shard)
        return Opened(reader, copy)

    def _copy(self, shard: int) -> LocalShard:
        """The copy of a shard. To make room, shards are closed that nothing reads."""
        end = time.monotonic() + _ROOM_S
        entry = {"bytes": int(self._sizes[shard]), "sha256": self._sums[shard]}
        while True:
            try:
                return self._cache.open(self._names[shard], entry)
            except NoRoom:
                if time.monotonic() > end:
                    raise
            close_shards()
            time.sleep(_ROOM_POLL_S)

    def _path(self, shard: int) -> str:
        """The local file of a shard."""
        if self._cache:
            return os.fspath(self._cache.path(self._names[shard]))
        return os.path.join(self._directory, self._names[shard])

    def _fault(self, shard: int, row: int, error: Exception) -> Exception:
        """The reason why a row cannot be read: `error` itself if it says it.

        Returns ValueError if the shard does not match its checksum. Otherwise returns OSError: the
        shard matches or cannot be opened, so the file system failed. A damaged copy is deleted, and
        may be whole at the next attempt.
        """
        if self._cache:
            return self._fault_of_copy(shard, row, error)
        if isinstance(error, WrongShard):
            return error
        path, cause = self._path(shard), (str(error) or type(error).__name__).splitlines()[0]
        try:
            whole = sha256_file(Path(path)) == self._sums[shard]
        except OSError as away:
            return OSError(away.errno, f"row {row} cannot be read: {away.strerror}", path)
        if whole:
            return OSError(
                errno.EIO,
                f"row {row} could not be read, though the file matches its checksum ({cause})",
                path,
            )
        return ValueError(
            f"{path} is damaged, row {row} cannot be read: remove the directory and prepare the"
            f" data again ({cause})"
        )

    def _fault_of_copy(self, shard: int, row: int, error: Exception) -> Exception:
        """`_fault` for a shard in a bucket."""
        if isinstance(error, (NoRoom, OSError)):
            return error
        path = self._path(shard)
        try:
            whole = sha256_file(Path(path)) == self._sums[shard]
        except FileNotFoundError:  # no copy was made
            return error
        if not whole:
            self._cache.forget(self._names[shard])
            return OSError(errno.EIO, f"row {row} cannot be read, the copy is damaged", path)
        if isinstance(error, WrongShard):
            return error
        return OSError(errno.EIO, f"row {row} cannot be read ({error}), the copy is whole", path)
