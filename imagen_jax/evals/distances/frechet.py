"""The Fréchet distance of Gaussians fitted to features: FID, FD-DINOv2 and others.

|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^1/2), Heusel et al. 2017. The trace of the root is the sum of
the roots of the eigenvalues of S1^1/2 S2 S1^1/2, which is symmetric, so no number is complex.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from imagen_jax.evals.distances import guards
from imagen_jax.evals.distances.jackknife import BLOCKS, Replicates, estimate, prompt_blocks
from imagen_jax.evals.distances.moments import Statistics

POINTS = 15  # numbers of samples in the fit of `infinity`
REPEATS = 4  # fits that `infinity` averages
ERROR_BLOCKS = 10  # of the error of `infinity`


@dataclasses.dataclass(frozen=True)
class Reference:
    """The statistics of the reference, and the root of its covariance."""

    statistics: Statistics
    root: Float[np.ndarray, "d d"]

    @classmethod
    def of(cls, reference: Float[np.ndarray, "n d"] | Statistics) -> "Reference":
        """Computes the root, which all distances to this reference share."""
        if not isinstance(reference, Statistics):
            reference = Statistics.of(reference)
        values, vectors = np.linalg.eigh(reference.cov)
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        return cls(reference, root)

    def distance(self, samples: Statistics) -> float:
        """The squared Fréchet distance of the samples."""
        cov, shift = samples.cov, samples.mean - self.statistics.mean
        values = np.linalg.eigvalsh(self.root @ cov @ self.root)
        root_trace = np.sqrt(np.maximum(values, 0)).sum()
        trace = np.trace(cov) + np.trace(self.statistics.cov)
        return float(shift @ shift + trace - 2 * root_trace)


def distance(first: Statistics, second: Statistics) -> float:
    """The squared Fréchet distance of two sets with known statistics."""
    return Reference.of(second).distance(first)


def replicates(
    samples: Float[np.ndarray, "n d"], reference: Reference, blocks: Int[np.ndarray, " n"]
) -> Replicates:
    """The distance of all samples, and without each block.

    A block's statistics are subtracted from those of all samples, so every sample is read twice,
    whatever the number of blocks.
    """
    total = Statistics.of(samples)
    sizes = np.bincount(blocks)
    deleted = [
        reference.distance(total.without(Statistics.of(samples[blocks == block])))
        for block in range(len(sizes))
    ]
    return Replicates(reference.distance(total), np.array(deleted), sizes)


def infinity(
    samples: Float[np.ndarray, "n d"],
    reference: Reference,
    prompts: Int[np.ndarray, " n"],
    seed: int = 0,
    points: int = POINTS,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """{"value", "se", "spread", "counts", "distances"}: extrapolated to infinitely many samples.

    Chong and Forsyth 2020, with the choices of dgm-eval: `points` numbers of samples from
    min(5000, n / 10) to n, drawn without replacement; the value is the intercept of the
    least-squares line through the distances against 1 / count. Prompts are drawn with all their
    images, because images of one prompt are alike.

    "value" is the mean of `repeats` fits, each with its own draws, and "spread" their standard
    deviation, which is the effect of the draws, not the standard error. That is "se": the
    `infinity_error` of the first fit, not smaller than that of the mean; None for few images.
    "distances" are means over the repeats.
    """
    n, rng = len(samples), np.random.default_rng(seed)
    unique, inverse = np.unique(prompts, return_inverse=True)
    counts = np.linspace(min(5000, max(n // 10, 2)), n, points).astype(int)
    complete = reference.distance(Statistics.of(samples))
    distances, draws = np.full((repeats, points), complete), []
    for repeat in range(repeats):
        for i, count in enumerate(counts):
            order = np.arange(n)
            if count < n:
                order = np.argsort(rng.permutation(len(unique))[inverse], kind="stable")
                distances[repeat, i] = reference.distance(Statistics.of(samples[order[:count]]))
            draws += [order[:count]] * (repeat == 0)
    intercepts = np.polynomial.polynomial.polyfit(1 / counts, distances.T, 1)[0]
    return {
        "value": float(intercepts.mean()),
        "se": infinity_error(samples, reference, prompts, draws, seed),
        "spread": float(intercepts.std(ddof=1)) if repeats > 1 else None,
        "counts": counts.tolist(),
        "distances": distances.mean(axis=0).tolist(),
    }


def infinity_error(
    samples: Float[np.ndarray, "n d"],
    reference: Reference,
    prompts: Int[np.ndarray, " n"],
    draws: Sequence[Int[np.ndarray, " _"]],
    seed: int = 0,
) -> float | None:
    """The jackknife standard error of one fit of `infinity`, over ERROR_BLOCKS blocks of prompts.

    draws: the samples of each distance of the fit. A block is deleted from the same draws, by its
    moments; draws of their own would add their spread. Costs as much as three fits of four draws.
    None if there are too few images.
    """
    count = min(ERROR_BLOCKS, len(np.unique(prompts)))
    if count < 2:
        return None
    blocks = prompt_blocks(prompts, count, seed)
    counts, distances = np.empty((2, count + 1, len(draws)))
    for i, draw in enumerate(draws):
        drawn, block_of = samples[draw], blocks[draw]
        total = Statistics.of(drawn)
        for block in range(count + 1):  # the last one is empty: the fit of all
            members = drawn[block_of == block]
            if len(drawn) - len(members) < 2:
                return None
            rest = total.without(Statistics.of(members)) if len(members) else total
            counts[block, i], distances[block, i] = rest.n, reference.distance(rest)
    fits = [np.polynomial.polynomial.polyfit(1 / n, y, 1)[0] for n, y in zip(counts, distances)]
    return estimate(Replicates(fits[-1], np.array(fits[:-1]), np.bincount(blocks)))["se"]


def score(
    samples: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m k"] | Statistics,
    prompts: Int[np.ndarray, " n"],
    blocks: int = BLOCKS,
    seed: int = 0,
    points: int = POINTS,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """The result of `estimate` with "infinity", "n", "n_reference" and "warnings".

    reference: features, or the statistics of published reference images; then duplicates of
    reference images among the samples cannot be found.
    """
    if isinstance(reference, Statistics):
        guards.check("samples", samples)
        guards.check_dimensions(samples.shape[1], len(reference.mean))
        warnings = []
    else:
        warnings = guards.check_pair(samples, reference)
    d = samples.shape[1]
    fitted = Reference.of(reference)
    warnings += guards.check_count("samples", len(samples), d)
    warnings += guards.check_count("reference", fitted.statistics.n, d)
    values = replicates(samples, fitted, prompt_blocks(prompts, blocks, seed))
    guards.check_not_zero("Fréchet distance", values.value, float(np.trace(fitted.statistics.cov)))
    return estimate(values) | {
        "infinity": infinity(samples, fitted, prompts, seed, points, repeats),
        "n": len(samples),
        "n_reference": fitted.statistics.n,
        "warnings": warnings,
    }
