"""MIND, the Monge Inception distance (Berthet et al. 2026): a sliced Wasserstein distance.

3 d times the mean over random unit directions of the squared 2-Wasserstein distance of the
projected features. A shift of all features by v gives 3 |v|^2 in expectation.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from imagen_jax.evals.distances import guards
from imagen_jax.evals.distances.jackknife import BLOCKS, Replicates, estimate, prompt_blocks
from imagen_jax.evals.distances.tiles import products, squares

DIRECTIONS = 1000
AT_ONCE = 32  # directions projected at once


def wasserstein(
    x: Float[np.ndarray, "c n"], y: Float[np.ndarray, "c m"]
) -> Float[np.ndarray, " c"]:
    """The squared 2-Wasserstein distance of each pair of sorted rows.

    Equal numbers pair the values by rank. Otherwise the integral over the difference of the two
    step-shaped quantile functions is exact; torch-fidelity drops random rows of the larger set
    instead.
    """
    n, m = x.shape[1], y.shape[1]
    if n == m:
        return ((x - y) ** 2).mean(axis=1)
    # The ends of the steps, in units of 1 / (n m).
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    weights = np.diff(ends, prepend=0) / (n * m)
    return (x[:, (ends - 1) // m] - y[:, (ends - 1) // n]) ** 2 @ weights


def directions(dimensions: int, count: int, seed: int) -> Float[np.ndarray, "c d"]:
    """Random unit vectors."""
    vectors = np.random.default_rng(seed).standard_normal((count, dimensions))
    return vectors / np.sqrt(squares(vectors))[:, None]


def replicates(
    samples: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m d"],
    blocks: Int[np.ndarray, " n"],
    count: int = DIRECTIONS,
    seed: int = 0,
) -> Replicates:
    """The distance of all samples, and without each block. Projections are sorted once."""
    sizes = np.bincount(blocks)
    total, deleted = 0.0, np.zeros(len(sizes))
    for x, order, y in _projections(samples, reference, count, seed):
        total += wasserstein(x, y).sum()
        sorted_blocks = blocks[order]
        for block in range(len(sizes)):
            kept = x[sorted_blocks != block].reshape(len(x), -1)
            deleted[block] += wasserstein(kept, y).sum()
    scale = 3 * samples.shape[1] / count
    return Replicates(scale * float(total), scale * deleted, sizes)


def _projections(
    samples: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"], count: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (sorted projections, their rows, sorted projections of the reference).

    Each array has one row per direction, for a few directions.
    """
    vectors = directions(samples.shape[1], count, seed)
    for start in range(0, count, AT_ONCE):
        some = vectors[start : start + AT_ONCE]
        x, y = products(some, samples), products(some, reference)
        order = np.argsort(x, axis=1)
        yield np.take_along_axis(x, order, axis=1), order, np.sort(y, axis=1)


def score(
    samples: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m k"],
    prompts: Int[np.ndarray, " n"],
    count: int = DIRECTIONS,
    blocks: int = BLOCKS,
    seed: int = 0,
) -> dict[str, Any]:
    """The result of `estimate` with "directions", "n", "n_reference" and "warnings".

    count: the number of directions. The seed chooses them; results of one seed are comparable.
    """
    warnings = guards.check_pair(samples, reference)
    assigned = prompt_blocks(prompts, blocks, seed)
    values = replicates(samples, reference, assigned, count, seed)
    scale = float(squares(reference).mean())
    guards.check_not_zero("MIND", values.value, scale)
    return estimate(values) | {
        "directions": count,
        "n": len(samples),
        "n_reference": len(reference),
        "warnings": warnings,
    }
