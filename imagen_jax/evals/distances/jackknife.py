"""Standard errors by the block jackknife over prompts.

Blocks of prompts are deleted one at a time, with all images of the prompts. The reference is fixed:
a standard error is that of new prompts and samples, measured with the same reference images.

A bootstrap repeats images, which acts like a smaller sample and moves the centre of biased
distances such as FID. The jackknife does not.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from imagen_jax.evals.statistics import number

BLOCKS = 20


def prompt_blocks(
    prompts: Int[np.ndarray, " n"], count: int = BLOCKS, seed: int = 0
) -> Int[np.ndarray, " n"]:
    """The block of each image, from 0 to count - 1.

    Prompts are assigned at random, equally many to each block up to one. The assignment depends on
    the set of prompts only, so two checkpoints with the same prompts have the same blocks.
    """
    unique, inverse = np.unique(prompts, return_inverse=True)
    if not 2 <= count <= len(unique):
        raise ValueError(
            f"{len(unique)} prompts cannot be divided into {count} blocks; use from 2 to"
            f" {len(unique)} blocks, or more prompts"
        )
    rank = np.random.default_rng(seed).permutation(len(unique))
    return (rank % count)[inverse]


@dataclasses.dataclass(frozen=True)
class Replicates:
    """A statistic of all images, and its values without each block.

    sizes: the number of images in each block.
    """

    value: float
    deleted: Float[np.ndarray, " k"]
    sizes: Int[np.ndarray, " k"]

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> "Replicates":
        """The replicates saved in a result of `estimate`. Raises ValueError for a damaged one."""
        if len(result["deleted"]) != len(result["sizes"]):
            raise ValueError("the numbers of `deleted` and of `sizes` differ")
        return cls(result["value"], np.array(result["deleted"], float), np.array(result["sizes"]))


def replicates(
    statistic: Callable[[Bool[np.ndarray, " n"]], float], blocks: Int[np.ndarray, " n"]
) -> Replicates:
    """Evaluates statistic(kept), kept[i] being whether image i is used, without each block."""
    sizes = np.bincount(blocks)
    deleted = [float(statistic(blocks != block)) for block in range(len(sizes))]
    return Replicates(float(statistic(np.ones(len(blocks), bool))), np.array(deleted), sizes)


def mean_replicates(values: Float[np.ndarray, " n"], blocks: Int[np.ndarray, " n"]) -> Replicates:
    """The replicates of the mean of one value per image."""
    sizes = np.bincount(blocks)
    sums = np.bincount(blocks, values)
    deleted = (sums.sum() - sums) / (sizes.sum() - sizes)
    return Replicates(float(values.mean()), deleted, sizes)


def estimate(replicates: Replicates) -> dict[str, Any]:
    """{"value", "se", "bias_corrected", "deleted", "sizes"} of a statistic.

    Blocks may differ in size: the delete-m_j jackknife of Busing, Meijer and van der Leeden 1999,
    "Delete-m jackknife for unequal m". Its variance is multiplied by k / (k - 1), k being the
    number of blocks: by Efron and Stein 1981, "The jackknife estimate of variance", it is then on
    average at least the variance of the statistic of k - 1 blocks. So "se" is 2.6 % larger than the
    unbiased error of a mean in 20 blocks, and not smaller than the spread of other statistics.
    "bias_corrected" removes a bias proportional to 1/n. "deleted" and "sizes" let
    `paired_jackknife` compare two saved results.
    """
    value, deleted, sizes = replicates.value, replicates.deleted, replicates.sizes
    h = sizes.sum() / sizes
    pseudo = h * value - (h - 1) * deleted
    corrected = len(sizes) * value - ((1 - 1 / h) * deleted).sum()
    variance = ((pseudo - corrected) ** 2 / (h - 1)).sum() / (len(sizes) - 1)
    return {
        "value": number(value),
        "se": number(np.sqrt(variance)),
        "bias_corrected": number(corrected),
        "deleted": [number(v) for v in deleted],
        "sizes": sizes.tolist(),
    }


def jackknife(
    statistic: Callable[[Bool[np.ndarray, " n"]], float], blocks: Int[np.ndarray, " n"]
) -> dict[str, Any]:
    """`estimate` of statistic(kept), which gets the images to use."""
    return estimate(replicates(statistic, blocks))


def paired_jackknife(first: Replicates, second: Replicates) -> dict[str, Any]:
    """`estimate` of first - second; each replicate leaves out the same prompts in both.

    "ratio" is the difference in standard errors; above 3 it is significant. Raises ValueError for
    different blocks.
    """
    if not np.array_equal(first.sizes, second.sizes):
        raise ValueError(
            "the two results have different blocks; evaluate both checkpoints on the same prompts"
            " and images per prompt, with the same number of blocks"
        )
    difference = Replicates(first.value - second.value, first.deleted - second.deleted, first.sizes)
    result = estimate(difference)
    result["ratio"] = number(result["value"] / result["se"]) if result["se"] else None
    return result
