"""Values per picture, such as features, in files of consecutive rows.

An evaluation that is interrupted computes only the files that are missing, with any number of
processes. A file remembers the checksums of its pictures and the identity of its values, so that it
is never used for others.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from imagen_jax.evals import keyed_rows
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.run_log import Progress
from imagen_jax.storage import is_away, open_arrays, write_arrays

SHARD_ROWS = 512  # of one shard, if a batch is not larger
Row = Mapping[str, Any]  # a row of a manifest
Compute = Callable[[Sequence[Row]], Shaped[np.ndarray, "k d"]]


@dataclasses.dataclass(frozen=True)
class RowShards:
    """The values of one kind of all rows of a set of pictures.

    directory: of the files. what: identity of the values, as JSON. rows: the manifest.
    per_prompt: pictures per prompt. size: rows per file.
    """

    directory: AnyPath
    what: Mapping[str, Any]
    rows: Sequence[Row]
    per_prompt: int
    size: int

    def compute(self, function: Compute, process: int, processes: int, label: str) -> int:
        """Computes this process's share of the missing files; returns the number of rows.

        function: rows -> their values [k d].
        """
        # By number, not by position among the missing: another process may be writing meanwhile.
        own = [s for s in self._share(process, processes) if self._read(s) is None]
        done = 0
        with Progress(label, sum(len(self._rows(s)) for s in own), quiet=process > 0) as progress:
            for shard in own:
                rows = self._rows(shard)
                arrays = {
                    "keys": self._keys(shard),
                    "values": function(rows),
                    "digest": np.array(self._digest(shard)),
                }
                write_arrays(self._path(shard), arrays)
                done += len(rows)
                progress.update(done)
        return done

    def files(self, process: int, processes: int) -> list[AnyPath]:
        """The files of a process's share."""
        return [self._path(shard) for shard in self._share(process, processes)]

    def joined(self) -> Shaped[np.ndarray, "n d"]:
        """The values of all rows, in their order. Raises ValueError for a missing file."""
        expected = np.concatenate([self._keys(shard) for shard in range(self._count)])
        return keyed_rows.join(expected, self._shards())

    def _shards(self) -> Iterator[tuple[Int[np.ndarray, "k 2"], Shaped[np.ndarray, "k d"]]]:
        for shard in range(self._count):
            if (found := self._read(shard)) is not None:
                yield found

    def _share(self, process: int, processes: int) -> range:
        return range(process, self._count, processes)

    @property
    def _count(self) -> int:
        return -(-len(self.rows) // self.size)

    def _rows(self, shard: int) -> Sequence[Row]:
        return self.rows[shard * self.size : (shard + 1) * self.size]

    def _keys(self, shard: int) -> Int[np.ndarray, "k 2"]:
        return np.array([divmod(row["row"], self.per_prompt) for row in self._rows(shard)])

    def _path(self, shard: int) -> AnyPath:
        return self.directory / f"rows_{shard * self.size:06d}.npz"

    def _digest(self, shard: int) -> str:
        """Of what determines the values: their kind, and the pictures and prompts of the rows."""
        rows = [[row["row"], row["prompt"], row["sha256"]] for row in self._rows(shard)]
        text = json.dumps([self.what, rows], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _read(self, shard: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(keys, values) of a file; None if it is missing, damaged or of other pictures."""
        try:
            with open_arrays(self._path(shard)) as file:
                if str(file["digest"]) == self._digest(shard):
                    return file["keys"], file["values"]
        except Exception as error:  # missing, or cut short: zipfile and numpy raise many kinds
            if in_bucket(self.directory) and is_away(error):
                raise
        return None


def rows_per_shard(count: int, processes: int, batch: int, most: int = SHARD_ROWS) -> int:
    """Rows of a file: whole batches of the network, and a share of the work for every process.

    count: rows of the set. batch: rows that a process computes at once. most: the largest number
    of rows, unless a batch is larger. Another number of rows, which other processes or devices may
    lead to, computes the files again.
    """
    share = -(-count // processes)
    if share <= batch:
        return max(1, share)
    batches = min(-(-share // batch), max(1, most // batch))
    return batches * batch
