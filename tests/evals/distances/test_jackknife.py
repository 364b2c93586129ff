"""The block jackknife, against formulas and against the spread of independent draws."""

import json
import os

import numpy as np
import pytest

from imagen_jax.evals import statistics
from imagen_jax.evals.distances import cmmd, frechet, mind, neighbours
from imagen_jax.evals.distances.frechet import Reference
from imagen_jax.evals.distances.jackknife import (
    Replicates,
    estimate,
    jackknife,
    mean_replicates,
    paired_jackknife,
    prompt_blocks,
    replicates,
)
from imagen_jax.evals.distances.kernels import KernelSums, polynomial

D = 5


def test_mean_has_its_ordinary_standard_error():
    """Catches a factor of the number of blocks: with one image per block the jackknife of a mean is
    the standard error of one image fewer.
    """
    values = np.random.default_rng(0).standard_normal(30)
    result = jackknife(lambda kept: values[kept].mean(), np.arange(30))
    wanted = statistics.summary(values)
    assert result["value"] == pytest.approx(wanted["mean"])
    assert result["se"] == pytest.approx(wanted["se"] * np.sqrt(30 / 29))
    assert result["bias_corrected"] == pytest.approx(wanted["mean"])


def test_bias_of_the_order_of_1_over_n_is_removed():
    """Catches a correction in the wrong direction: the variance with 1/n becomes the one with
    1/(n - 1) (Quenouille 1956).
    """
    values = np.random.default_rng(0).standard_normal(30)
    result = jackknife(lambda kept: values[kept].var(), np.arange(30))
    assert result["bias_corrected"] == pytest.approx(values.var(ddof=1))


def test_blocks_of_unequal_size_keep_a_mean_unbiased():
    """Catches the formula for equal blocks: the corrected mean of unequal blocks is the mean."""
    rng = np.random.default_rng(0)
    values, blocks = rng.standard_normal(30), np.repeat([0, 1, 2, 3], [3, 5, 9, 13])
    statistic = lambda kept: values[kept].mean()
    result = jackknife(statistic, blocks)
    assert result["bias_corrected"] == pytest.approx(values.mean())
    # Busing et al. 1999, equation 8; a pseudo-value of a mean is the mean of its block.
    means, h = [values[blocks == i].mean() for i in range(4)], 30 / np.array([3, 5, 9, 13])
    wanted = np.sqrt(np.sum((means - values.mean()) ** 2 / (h - 1)) / 3)  # 4 blocks: 4/3 of it
    assert result["se"] == pytest.approx(wanted)
    fast, slow = mean_replicates(values, blocks), replicates(statistic, blocks)
    np.testing.assert_allclose(fast.deleted, slow.deleted)


def test_images_of_a_prompt_are_in_one_block():
    """Catches blocks of images, contiguous blocks, and blocks that depend on the order of rows."""
    prompts = np.repeat(np.arange(100, 143), 3)
    blocks = prompt_blocks(prompts, 10)
    of_prompt = {p: set(blocks[prompts == p].tolist()) for p in np.unique(prompts)}
    assert all(len(found) == 1 for found in of_prompt.values())
    assert sorted(np.bincount(blocks)) == [12] * 7 + [15] * 3
    order = np.random.default_rng(1).permutation(len(prompts))
    np.testing.assert_array_equal(prompt_blocks(prompts[order], 10), blocks[order])
    assert np.any(np.diff(prompt_blocks(np.arange(43), 10)) < 0)


@pytest.mark.parametrize("count", [1, 6])
def test_impossible_numbers_of_blocks_are_refused(count):
    """Catches empty blocks, and one block, which leaves nothing when it is deleted."""
    with pytest.raises(ValueError, match=f"5 prompts .* {count} blocks; use from 2 to 5"):
        prompt_blocks(np.repeat(np.arange(5), 4), count)


def test_paired_difference_cancels_what_both_share():
    """Catches errors added in quadrature: the second checkpoint is the first, 1 worse."""
    rng = np.random.default_rng(0)
    values, blocks = 10 * rng.standard_normal(200), prompt_blocks(np.arange(200))
    noise = rng.standard_normal(200)
    first = mean_replicates(values, blocks)
    second = mean_replicates(values + 1 + noise, blocks)
    result = paired_jackknife(second, first)
    direct = estimate(mean_replicates(1 + noise, blocks))
    assert result["value"] == pytest.approx(direct["value"])
    assert result["se"] == pytest.approx(direct["se"])
    assert result["ratio"] == pytest.approx(result["value"] / result["se"])
    assert paired_jackknife(first, first)["ratio"] is None
    saved = Replicates.from_result(json.loads(json.dumps(estimate(first), allow_nan=False)))
    assert paired_jackknife(second, saved) == result


def test_other_prompts_cannot_be_paired():
    """Catches a pairing of results with different blocks."""
    values = np.arange(41.0)
    first = mean_replicates(values, prompt_blocks(np.arange(41)))
    second = mean_replicates(values[:40], prompt_blocks(np.arange(40)))
    with pytest.raises(ValueError, match="same prompts"):
        paired_jackknife(first, second)


REFERENCE = np.random.default_rng(99).standard_normal((200, D))
FRECHET = Reference.of(REFERENCE)


def of_cmmd(x, blocks):
    unit = cmmd.unit("samples", x), cmmd.unit("reference", REFERENCE)
    return KernelSums.of(*unit, cmmd.gaussian(cmmd.SIGMA), blocks).replicates(True)


def of_neighbours(name):
    return lambda x, blocks: neighbours.replicates(x, REFERENCE, blocks)[name]


MEASURES = {
    "fid": lambda x, blocks: frechet.replicates(x, FRECHET, blocks),
    "kid": lambda x, blocks: KernelSums.of(x, REFERENCE, polynomial(D), blocks).replicates(True),
    "cmmd": of_cmmd,
    "mind": lambda x, blocks: mind.replicates(x, REFERENCE, blocks, count=20),
} | {name: of_neighbours(name) for name in ("precision", "recall", "density", "coverage")}
CASES = [("fid", 1), ("fid", 3), ("kid", 1), ("kid", 3), ("cmmd", 1), ("mind", 1), ("recall", 1)]
DRAWS = int(os.environ.get("IMAGEN_JAX_DRAWS", 0))  # 2,000 for the table in docs/evaluation.md


@pytest.mark.parametrize(
    "name, images",
    [(name, images) for name in MEASURES for images in (1, 3)] if DRAWS else CASES,
)
def test_standard_error_is_the_spread_of_independent_draws(name, images):
    """Catches standard errors that are too small, such as those of blocks of images when the images
    of a prompt are alike, or of a formula without (k - 1); and far too large ones.

    The root mean square over draws must be 1 to 1.7 times the spread. Three standard errors are
    left for the error of this ratio, which is about that of the spread.
    """
    rng, draws, n = np.random.default_rng(0), DRAWS or 100, 180
    prompts = np.repeat(np.arange(n // images), images)
    blocks, found = prompt_blocks(prompts), []
    for _ in range(draws):
        own, common = rng.standard_normal((2, n, D))
        x = 0.15 + (own if images == 1 else 0.6 * own + 0.8 * common[prompts])
        result = estimate(MEASURES[name](x, blocks))
        found.append((result["value"], result["se"]))
    values, errors = np.array(found).T
    ratio = np.sqrt((errors**2).mean()) / values.std(ddof=1)
    error = 1 / np.sqrt(2 * draws)
    print(f"{name}, {images} images per prompt: {ratio:.3f} +- {error:.3f}")
    assert 1 - 3 * error < ratio < 1.7


def test_paired_standard_error_is_the_spread_of_paired_draws():
    """Catches blocks that differ between the checkpoints, and errors added in quadrature, which are
    eight times the spread here: both draw the same images but for a small shift and noise.
    """
    rng, n, found = np.random.default_rng(0), 180, []
    blocks = prompt_blocks(np.arange(n))
    for _ in range(100):
        x = 0.3 + rng.standard_normal((n, D))
        other = x + 0.05 + 0.1 * rng.standard_normal((n, D))
        first, second = (frechet.replicates(a, FRECHET, blocks) for a in (x, other))
        result = paired_jackknife(first, second)
        unpaired = np.hypot(estimate(first)["se"], estimate(second)["se"])
        found.append((result["value"], result["se"], unpaired))
    values, errors, unpaired = np.array(found).T
    spread = values.std(ddof=1)
    assert 0.8 < np.sqrt((errors**2).mean()) / spread < 1.7 < unpaired.mean() / spread
