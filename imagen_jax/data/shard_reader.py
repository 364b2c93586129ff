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
from typing import Any

import numpy as np

from imagen_jax.checksums import sha256_file
from imagen_jax.storage import is_away

# Seconds between attempts to read a record after a transient file-system error.
PAUSES_S = (1.0, 5.0, 25.0)
# Records are read in random order, so nothing is read ahead. The index at the end of a shard has
# about 4 bytes per record; 1 MiB of it would be read by default.
_OPTIONS, _BUFFER = "readahead_buffer_size:0,footer_prefetch_bytes:65536", 2**15
_MOST_OPEN = 4096  # an open shard of 4,096 records takes 40 KiB
log = logging.getLogger(__name__)
_all_readers: weakref.WeakSet["ShardReader"] = weakref.WeakSet()  # of this process


def most_open() -> int:
    """Shards that one reader keeps open.

    All readers together have at most half of the files that the process may have open.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
    return max(1, min(_MOST_OPEN, files // max(2, len(_all_readers))))


class CutShort(ValueError):
    """A shard has another size than the manifest says."""


class ShardReader:
    """The records of consecutive shards by row; picklable, safe to share between threads.

    The size of a shard is compared with the manifest when the shard is opened.
    """

    def __init__(self, label: str, directory: Path, shards: Mapping[str, Mapping[str, Any]]):
        """label: for messages. shards: {path in `directory`: entry of the manifest}, in order."""
        self._label, self._directory = label, directory
        self._names = list(shards)
        self._sums = [entry["sha256"] for entry in shards.values()]
        self._sizes = np.array([entry["bytes"] for entry in shards.values()], np.int64)
        self._ends = np.cumsum([entry["rows"] for entry in shards.values()], dtype=np.int64)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._readers: OrderedDict[int, Any] = OrderedDict()  # the last used one is the last
        _all_readers.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes open shards of their own."""
        state = self.__dict__.copy()
        del state["_lock"], state["_readers"]
        return state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._names else 0

    def record(self, row: int) -> bytes:
        """The record of a row.

        Raises:
          IndexError: there is no such row.
          ValueError: the shard is cut short or damaged.
          OSError: the file system failed, also after several attempts.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"{self._label} has rows 0 to {len(self) - 1}, not {row}")
        return self._read(int(np.searchsorted(self._ends, row, side="right")), row, PAUSES_S)

    def _read(self, shard: int, row: int, pauses: Sequence[float]) -> bytes:
        """Reads a record; tries again after each of `pauses`, in seconds, if none was returned."""
        position = row - (int(self._ends[shard - 1]) if shard else 0)
        try:
            return self._reader(shard).read([position])[0]
        except CutShort:
            raise
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            fault = self._fault(shard, row, error)
            if not pauses or not is_away(fault):
                raise fault from error
        log.warning("%s; trying again in %g s", fault, pauses[0])
        time.sleep(pauses[0])
        with self._lock:
            self._readers.pop(shard, None)  # a reader that failed once keeps failing
        return self._read(shard, row, pauses[1:])

    def _reader(self, shard: int) -> Any:
        """An open shard. One that another thread still reads is closed when that thread is done."""
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        reader = self._open(shard)  # other threads go on; two that open the same shard do no harm
        with self._lock:
            self._readers[shard] = reader
            while len(self._readers) > most_open():
                self._readers.popitem(last=False)
        return reader

    def _open(self, shard: int) -> Any:
        from array_record.python import array_record_module

        path = self._path(shard)
        if os.stat(path).st_size != self._sizes[shard]:
            raise CutShort(f"{path} is missing or cut short: prepare the data again")
        return array_record_module.ArrayRecordReader(
            path, _OPTIONS, file_reader_buffer_size=_BUFFER
        )

    def _path(self, shard: int) -> str:
        return os.path.join(self._directory, self._names[shard])

    def _fault(self, shard: int, row: int, error: Exception) -> Exception:
        """The reason why a row cannot be read.

        Returns ValueError if the shard does not match its checksum. Otherwise returns OSError: the
        shard matches or cannot be opened, so the file system failed.
        """
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
