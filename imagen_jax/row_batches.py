"""Rows in batches on a mesh, as each process sees them."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from imagen_jax import sharding


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """The rows of one batch, as this process sees them.

    size: number of rows on the mesh, padding included.
    count: number of rows without padding.
    held: the row at each position of the batch that this process's devices hold; padding repeats
        the last row.
    owned: {row: its index in `held`} of the rows that this process writes: no padding, and no row
        that a process with a lower index holds as well.
    """

    size: int
    count: int
    held: list[int]
    owned: dict[int, int]


def rows_per_batch(batch_size: int, mesh: Mesh) -> int:
    """`batch_size`, rounded up to a multiple of data x fsdp."""
    return batch_size + -batch_size % (mesh.shape["data"] * mesh.shape["fsdp"])


def row_batches(rows: Sequence[int], batch_size: int, mesh: Mesh) -> list[RowBatch]:
    """Splits rows into batches of `rows_per_batch`."""
    size = rows_per_batch(batch_size, mesh)
    here, mine = sharding.process_rows(size, mesh), set(sharding.owned_rows(size, mesh))
    batches = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        held = [part[min(position, len(part) - 1)] for position in here]
        owned = {
            part[position]: i
            for i, position in enumerate(here)
            if position in mine and position < len(part)
        }
        batches.append(RowBatch(size, len(part), held, owned))
    return batches


def most_held(batch_size: int, mesh: Mesh) -> int:
    """The number of rows of a batch that a process holds at most, the same in all processes."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    devices = -(-mesh.size // jax.process_count())
    return rows_per_batch(batch_size, mesh) // shards * min(shards, devices)
