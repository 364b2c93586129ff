"""Precision, recall, density and coverage by nearest neighbours.

Each image has a ball that reaches to its k-th nearest neighbour in its own set. Precision is the
share of samples in a ball of the reference, recall the share of the reference in a ball of the
samples (Kynkaanniemi et al. 2019). Density is the mean number of balls of the reference around a
sample over k, coverage the share of balls of the reference with a sample inside (Naeem et al.
2020). An image on the surface of a ball counts for precision and recall, as in torch-fidelity, and
does not for density and coverage, as in the authors' code.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from imagen_jax.evals.distances import guards
from imagen_jax.evals.distances.jackknife import (
    BLOCKS,
    Replicates,
    estimate,
    mean_replicates,
    prompt_blocks,
)
from imagen_jax.evals.distances.tiles import spans, squared_distances, squares

K, K_DENSITY = 3, 5


def radii(x: Float[np.ndarray, "n d"], k: tuple[int, ...]) -> list[Float[np.ndarray, " n"]]:
    """The squared distance of each row to its k-th nearest neighbour, for each k."""
    out = np.empty((len(k), len(x)))
    for rows, distances in _tiles_to_self(x):
        nearest = np.partition(distances, [i - 1 for i in k], axis=1)
        out[:, rows] = nearest[:, [i - 1 for i in k]].T
    return list(out)


def deleted_radii(
    x: Float[np.ndarray, "n d"], k: int, blocks: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n b"]]:
    """(`radii` of all rows, the radii without each block).

    Only rows with one of their k nearest neighbours in a block have another radius without it.
    """
    full = np.empty(len(x))
    deleted = np.empty((len(x), blocks.max() + 1))
    for rows, distances in _tiles_to_self(x):
        nearest = np.argpartition(distances, k - 1, axis=1)[:, :k]
        full[rows] = np.take_along_axis(distances, nearest, axis=1).max(axis=1)
        deleted[rows] = full[rows, None]
        for block in range(deleted.shape[1]):
            changed = np.flatnonzero((blocks[nearest] == block).any(axis=1))
            remaining = distances[np.ix_(changed, blocks != block)]
            smallest = np.partition(remaining, k - 1, axis=1)
            deleted[rows.start + changed, block] = smallest[:, k - 1]
    return full, deleted


def _tiles_to_self(x: Float[np.ndarray, "n d"]):
    """Yields (rows, squared distances to all rows), with infinite distance to itself."""
    lengths = squares(x)
    for rows in spans(len(x), len(x)):
        distances = squared_distances(x[rows], x, lengths)
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf
        yield rows, distances


def replicates(
    samples: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m d"],
    blocks: Int[np.ndarray, " n"],
    k: int = K,
    k_density: int = K_DENSITY,
) -> dict[str, Replicates]:
    """{"precision", "recall", "density", "coverage"}: of all samples, and without each block."""
    sizes, m = np.bincount(blocks), len(reference)
    members = (blocks[:, None] == np.arange(len(sizes))).astype(np.float64)
    ball, dense_ball = radii(reference, (k, k_density))
    sample_ball, deleted_ball = deleted_radii(samples, k, blocks)
    lengths = squares(samples)
    precise, balls = np.zeros(len(samples), bool), np.zeros(len(samples))
    inside = np.empty((m, len(sizes)))  # samples in the ball of a reference row, by block
    recalled = np.empty((m, len(sizes) + 1), bool)  # with all samples, without each block
    for rows in spans(m, len(samples)):
        distances = squared_distances(reference[rows], samples, lengths)
        precise |= (distances <= ball[rows, None]).any(axis=0)
        dense = distances < dense_ball[rows, None]
        balls += dense.sum(axis=0)
        inside[rows] = dense @ members
        recalled[rows] = _recalled(distances, sample_ball, deleted_ball, blocks, members)
    total = inside.sum(axis=1, keepdims=True)
    return {
        "precision": mean_replicates(precise.astype(float), blocks),
        "recall": Replicates(float(recalled[:, 0].mean()), recalled[:, 1:].mean(axis=0), sizes),
        "density": mean_replicates(balls / k_density, blocks),
        "coverage": Replicates(float((total > 0).mean()), (total - inside > 0).mean(axis=0), sizes),
    }


def _recalled(
    distances: Float[np.ndarray, "t n"],
    ball: Float[np.ndarray, " n"],
    deleted_ball: Float[np.ndarray, "n b"],
    blocks: Int[np.ndarray, " n"],
    members: Float[np.ndarray, "n b"],
) -> Bool[np.ndarray, "t b1"]:
    """Whether each reference row is in a ball of the samples: of all, and without each block."""
    inside = (distances <= ball) @ members
    total = inside.sum(axis=1, keepdims=True)
    without = total - inside > 0
    for block in range(members.shape[1]):
        larger = np.flatnonzero((deleted_ball[:, block] > ball) & (blocks != block))
        without[:, block] |= (distances[:, larger] <= deleted_ball[larger, block]).any(axis=1)
    return np.concatenate([total > 0, without], axis=1)


def score(
    samples: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m j"],
    prompts: Int[np.ndarray, " n"],
    k: int = K,
    k_density: int = K_DENSITY,
    blocks: int = BLOCKS,
    seed: int = 0,
) -> dict[str, Any]:
    """{"precision", "recall", "density", "coverage", "k", "k_density", "n", "n_reference",
    "warnings"}. The first four are results of `estimate`, without a correction of the bias: these
    numbers depend on the numbers of images by definition and have no limit to correct to.
    """
    warnings = guards.check_pair(samples, reference)
    if len(samples) != len(reference):
        warnings.append(
            f"{len(samples)} samples and {len(reference)} reference images: recall and coverage"
            " depend on both numbers; compare only results with the same numbers"
        )
    assigned = prompt_blocks(prompts, blocks, seed)
    remaining = min(len(reference), len(samples) - int(np.bincount(assigned).max()))
    if min(k, k_density) < 1 or remaining <= max(k, k_density):
        raise ValueError(
            f"k = {k} and k_density = {k_density} need more than {max(k, k_density)} images in each"
            f" set, and there are {remaining} without a block; use from 1 to {remaining - 1}"
        )
    results = replicates(samples, reference, assigned, k, k_density)
    estimates = {name: estimate(values) for name, values in results.items()}
    for result in estimates.values():
        del result["bias_corrected"]
    return estimates | {
        "k": k,
        "k_density": k_density,
        "n": len(samples),
        "n_reference": len(reference),
        "warnings": warnings,
    }
