"""KID, the kernel Inception distance (Binkowski et al. 2018): the squared MMD of a cubic kernel.

Its estimator is unbiased, so numbers of different N can be compared. It may be negative.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from imagen_jax.evals.distances import guards
from imagen_jax.evals.distances.jackknife import BLOCKS, estimate, prompt_blocks
from imagen_jax.evals.distances.kernels import KernelSums, diagonal, polynomial, row_sums
from imagen_jax.evals.statistics import number

SUBSETS, SUBSET_SIZE = 100, 1000


def distance(samples: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]) -> float:
    """The unbiased estimate from all pairs."""
    blocks = np.zeros(len(samples), int)
    return KernelSums.of(samples, reference, polynomial(samples.shape[1]), blocks).mmd(True)


def pseudo_values(
    samples: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, " n"]:
    """The delete-one jackknife pseudo-value of each sample: n K - (n - 1) K without the sample.

    K is `distance`; the reference is fixed. The mean of the values is K itself, because K is
    unbiased, and the standard error of their mean is the jackknife's error of K. Values of the
    same rows of two checkpoints can be paired.

    Raises ValueError for fewer than 3 samples, or fewer than 2 reference rows.
    """
    n, m = len(samples), len(reference)
    if n < 3 or m < 2:
        raise ValueError(
            f"{n} samples and {m} reference images are too few for KID with an error; pass at least"
            " 3 samples and 2 reference images"
        )
    kernel = polynomial(samples.shape[1])
    others = row_sums(samples, samples, kernel) - diagonal(samples, kernel)
    within = others.sum() / (n - 1) - (others.sum() - 2 * others) / (n - 2)
    pairs = row_sums(reference, reference, kernel) - diagonal(reference, kernel)
    return within + pairs.sum() / (m * (m - 1)) - 2 * row_sums(samples, reference, kernel) / m


def subsets(
    samples: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m d"],
    count: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = 0,
) -> dict[str, Any]:
    """{"mean", "spread", "count", "size"} of the estimates of random subsets.

    The convention of clean-fid and torch-fidelity: `count` subsets of both sets with `size` rows,
    or as many as the smaller set has. With one seed, the subsets are those of torch-fidelity.

    "spread" is the standard deviation over the subsets. It is that of `size` images, not the
    standard error of "mean".
    """
    size = min(size, len(samples), len(reference))
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(count):
        chosen = samples[rng.choice(len(samples), size, replace=False)]
        values.append(distance(chosen, reference[rng.choice(len(reference), size, replace=False)]))
    mean, spread = number(np.mean(values)), number(np.std(values))
    return {"mean": mean, "spread": spread, "count": count, "size": size}


def score(
    samples: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m k"],
    prompts: Int[np.ndarray, " n"],
    blocks: int = BLOCKS,
    seed: int = 0,
) -> dict[str, Any]:
    """The result of `estimate` with "subsets", "n", "n_reference" and "warnings".

    The value is the unbiased estimate from all pairs, not multiplied by 1000.
    """
    warnings = guards.check_pair(samples, reference)
    assigned = prompt_blocks(prompts, blocks, seed)
    sums = KernelSums.of(samples, reference, polynomial(samples.shape[1]), assigned)
    return estimate(sums.replicates(unbiased=True)) | {
        "subsets": subsets(samples, reference, seed=seed),
        "n": len(samples),
        "n_reference": len(reference),
        "warnings": warnings,
    }
