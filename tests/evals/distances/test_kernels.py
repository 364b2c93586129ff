"""KID and CMMD against direct sums, and against the properties that their definitions imply."""

import json

import numpy as np
import pytest

from imagen_jax.evals.distances import cmmd, kernels, kid
from imagen_jax.evals.distances.jackknife import estimate, prompt_blocks, replicates
from imagen_jax.evals.distances.kernels import KernelSums, gaussian, polynomial

D = 6


def features(n, seed=0, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((n, D))


def cubic(x, y):
    return np.array([[(sum(a * b) / D + 1) ** 3 for b in y] for a in x])


def bell(x, y):
    return np.array([[np.exp(-sum((a - b) ** 2) / (2 * 0.7**2)) for b in y] for a in x])


def direct(kernel, x, y, unbiased):
    """The squared MMD by its definition."""
    n, m, xx, yy = len(x), len(y), kernel(x, x), kernel(y, y)
    if unbiased:
        within = (xx.sum() - np.trace(xx)) / (n * (n - 1))
        within += (yy.sum() - np.trace(yy)) / (m * (m - 1))
    else:
        within = xx.mean() + yy.mean()
    return within - 2 * kernel(x, y).mean()


@pytest.mark.parametrize("tile", [1, 4, 100])
@pytest.mark.parametrize("unbiased", [True, False])
def test_tiles_give_the_direct_sums(monkeypatch, tile, unbiased):
    """Catches tiles left out or counted twice, and the diagonal on the wrong side of `unbiased`."""
    monkeypatch.setattr(kernels, "TILE", tile)
    x, y, one = features(11), features(9, seed=1, shift=0.4), np.zeros(11, int)
    for kernel, reference in ((polynomial(D), cubic), (gaussian(0.7), bell)):
        found = KernelSums.of(x, y, kernel, one).mmd(unbiased)
        assert found == pytest.approx(direct(reference, x, y, unbiased), rel=1e-11)


def test_deleting_blocks_equals_computing_anew():
    """Catches pairs of a deleted block that remain in the sums."""
    x, y = features(30), features(20, seed=1, shift=0.2)
    blocks = prompt_blocks(np.arange(30) // 2, 4)
    found = KernelSums.of(x, y, polynomial(D), blocks).replicates(True, scale=2.0)
    wanted = replicates(lambda kept: 2 * direct(cubic, x[kept], y, True), blocks)
    assert found.value == pytest.approx(wanted.value, rel=1e-11)
    np.testing.assert_allclose(found.deleted, wanted.deleted, rtol=1e-10)


def test_kid_of_two_halves_is_0_on_average():
    """Catches the biased estimator, whose mean here is 0.3: the diagonal over n."""
    values = [kid.distance(features(50, seed), features(50, 1000 + seed)) for seed in range(150)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert np.std(values) < 0.15


def test_kid_subsets_are_bounded_by_the_smaller_set():
    """Catches subsets with repeated rows, and the spread of the mean instead of the subsets'."""
    x, y = features(12, shift=0.5), features(30, seed=1)
    result = kid.subsets(x, y[:12], count=5)
    assert result["size"] == 12 and result["spread"] == pytest.approx(0, abs=1e-12)
    assert result["mean"] == pytest.approx(kid.distance(x, y[:12]))
    result = kid.subsets(x, y, count=400, size=8)
    assert result["mean"] == pytest.approx(kid.distance(x, y), abs=4 * result["spread"] / 20)
    assert result["spread"] > 0.01


def clouds(n, seed=0, common=2.0):
    """Embeddings before normalisation: 64 random numbers and one common component."""
    random = np.random.default_rng(seed).standard_normal((n, 64))
    return np.concatenate([random, np.full((n, 1), common)], axis=1)


def test_cmmd_is_ten_times_the_squared_distance_of_the_means():
    """Catches another sigma, scale or normalisation: 2 sigma^2 = 200, times 1000, is 10 |dmu|^2,
    less 1 % for the curvature of the kernel.
    """
    x, y = clouds(300), clouds(300, seed=1, common=4.0)
    result = cmmd.score(x, y, np.arange(300))
    mean = result["mean_distance"]["value"]
    assert mean == pytest.approx(
        ((cmmd.unit("", x).mean(axis=0) - cmmd.unit("", y).mean(axis=0)) ** 2).sum()
    )
    assert mean > 0.01
    assert result["biased"]["value"] == pytest.approx(9.9 * mean, rel=0.01)


def test_bias_of_cmmd_falls_as_1_over_n():
    """Catches the two estimators under each other's name. The bias of each set
    is 10 E|x - mean|^2 / n.
    """
    for n in (250, 1000):
        results = [
            cmmd.score(clouds(n, seed=seed), clouds(n, seed=100 + seed), np.arange(n))
            for seed in range(3)
        ]
        biased, unbiased = (
            np.mean([r[k]["value"] for r in results]) for k in ("biased", "unbiased")
        )
        variance = cmmd.unit("", clouds(n)).var(axis=0).sum()
        assert biased == pytest.approx(2 * 10 * variance / n, rel=0.15)
        assert abs(unbiased) < 0.15 * biased


def test_cmmd_sees_diversity_only_with_a_narrower_sigma():
    """Catches a sigma that is not used: equal means, very different covariances."""
    rng = np.random.default_rng(0)
    lengths = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    narrow = lengths(rng.standard_normal((200, 8)) * [3, 3, 1, 1, 1, 1, 1, 1])
    wide = lengths(rng.standard_normal((200, 8)) * [1, 1, 1, 1, 1, 1, 3, 3])
    x, y = np.concatenate([narrow, -narrow]), np.concatenate([wide, -wide])
    blind, seeing = (cmmd.score(x, y, np.arange(400), sigma=s)["unbiased"] for s in (10.0, 0.5))
    assert abs(blind["value"]) < 0.1
    assert seeing["value"] > 20 and seeing["value"] > 5 * seeing["se"]


def test_mean_distance_without_each_block():
    """Catches means over all samples in place of the kept ones."""
    x, y = features(30), features(20, seed=1, shift=0.2)
    blocks = prompt_blocks(np.arange(30), 7)
    found = cmmd.mean_distance_replicates(x, y, blocks)
    value = lambda kept: ((x[kept].mean(axis=0) - y.mean(axis=0)) ** 2).sum()
    wanted = replicates(value, blocks)
    assert found.value == pytest.approx(wanted.value)
    np.testing.assert_allclose(found.deleted, wanted.deleted)


def test_embedding_of_zeros_is_refused():
    """Catches a division by 0."""
    x = features(5)
    x[3] = 0
    with pytest.raises(ValueError, match="samples: 1 embeddings are 0, first row 3"):
        cmmd.unit("samples", x)


@pytest.mark.parametrize("family", [kid, cmmd])
def test_score_is_valid_json(family):
    """Catches numpy numbers in a result, and a lost warning."""
    x, y = features(40, shift=0.3), features(30, seed=1)
    y[4] = x[2]
    result = family.score(x, y, np.arange(40))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["n"], result["n_reference"], len(result["warnings"])) == (40, 30, 1)


@pytest.mark.parametrize("tile", [4, 100])
def test_pseudo_values_are_those_of_the_deletions(monkeypatch, tile):
    """Catches pairs of a deleted sample that remain, a mean that is not the estimate, and a
    standard error that is not the jackknife's."""
    monkeypatch.setattr(kernels, "TILE", tile)
    n = 12
    x, y = features(n), features(9, seed=1, shift=0.4)
    values = kid.pseudo_values(x, y)
    whole = direct(cubic, x, y, True)
    deleted = [direct(cubic, np.delete(x, i, axis=0), y, True) for i in range(n)]
    np.testing.assert_allclose(values, n * whole - (n - 1) * np.array(deleted), rtol=1e-9)
    assert values.mean() == pytest.approx(whole, rel=1e-11)
    one_each = KernelSums.of(x, y, polynomial(D), np.arange(n)).replicates(True)
    wanted = estimate(one_each)["se"] * ((n - 1) / n) ** 0.5  # without Efron and Stein's factor
    assert values.std(ddof=1) / n**0.5 == pytest.approx(wanted, rel=1e-9)
    for few, reference in ((2, 9), (3, 1)):
        with pytest.raises(ValueError, match="too few for KID with an error"):
            kid.pseudo_values(x[:few], y[:reference])
