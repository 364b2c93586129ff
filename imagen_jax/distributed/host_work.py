"""Host arithmetic on many rows, shared by the processes of a run.

Each process computes its own rows, and every process gets the values of all rows, bit for bit: the
result depends on the number of processes only if `compute` does. All processes make the same calls
in the same order.
"""

import json
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int, Shaped

from imagen_jax.distributed import agreement

PART_BYTES = 2**26  # sent at once by each process
Compute = Callable[[Int[np.ndarray, " k"]], Shaped[np.ndarray, "k ..."]]


def for_rows(n: int, compute: Compute) -> Shaped[np.ndarray, "n ..."]:
    """The values of rows 0 to n - 1.

    compute: row numbers -> their values; called with the rows of this process, if it has any.
    """
    processes = jax.process_count()
    if processes == 1:
        return compute(np.arange(n))
    own = np.arange(n)[jax.process_index() :: processes]
    values = compute(own) if len(own) else None
    all_values = _gather(values, -(-n // processes))
    out = np.empty((n, *all_values[0].shape[1:]), all_values[0].dtype)
    for process, part in enumerate(all_values):
        there = out[process::processes]
        there[:] = part[: len(there)]  # without padding
    return out


def by_first(compute: Callable[[], Shaped[np.ndarray, "..."]]) -> Shaped[np.ndarray, "..."]:
    """The result of `compute`, called in process 0 only."""
    if jax.process_count() == 1:
        return compute()
    values = compute()[None] if jax.process_index() == 0 else None
    return _gather(values, 1)[0][0]


def _gather(values: Shaped[np.ndarray, "k ..."] | None, rows: int) -> list[np.ndarray]:
    """The values of all processes, by process, each padded to `rows` rows. None: no value here."""
    about = "" if values is None else json.dumps([values.dtype.str, values.shape[1:]])
    # It waits here for slower processes: a collective operation on the devices would time out.
    dtype, shape = json.loads(next(text for text in agreement.gather(about) if text))
    padded = np.zeros((rows, *shape), dtype)
    if values is not None:
        padded[: len(values)] = values
    # As bytes: JAX would convert float64 to float32.
    content = np.frombuffer(padded.tobytes(), np.uint8)
    parts = [
        multihost_utils.process_allgather(content[start : start + PART_BYTES])
        for start in range(0, len(content), PART_BYTES)
    ]
    gathered = np.concatenate([np.asarray(part) for part in parts], axis=1)
    return [np.frombuffer(row.tobytes(), dtype).reshape(padded.shape) for row in gathered]
