"""The Fréchet distance against closed forms and simulations with a known limit."""

import json

import numpy as np
import pytest

from imagen_jax.evals.distances import frechet
from imagen_jax.evals.distances.frechet import Reference
from imagen_jax.evals.distances.jackknife import estimate, prompt_blocks, replicates
from imagen_jax.evals.distances.moments import Statistics

D = 6


def gaussian(mean, cov):
    return Statistics.from_covariance(100, np.array(mean, float), np.array(cov, float))


def features(n=400, d=D, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) * np.linspace(0.5, 2, d) + shift


def covariance(seed):
    root = np.random.default_rng(seed).standard_normal((D, D))
    return root @ root.T


def test_equal_covariances_leave_the_distance_of_the_means():
    """Catches a distance instead of its square, and a wrong trace of the root."""
    shift, cov = np.arange(D) / 4, covariance(0)
    found = frechet.distance(gaussian(np.ones(D), cov), gaussian(1 + shift, cov))
    assert found == pytest.approx(shift @ shift, rel=1e-12)


def test_diagonal_covariances_add_the_differences_of_the_deviations():
    """Catches the difference of the variances, and a root taken once too often."""
    a, b = np.linspace(0.1, 2, D), np.linspace(3, 0.2, D)
    found = frechet.distance(
        gaussian(np.zeros(D), np.diag(a**2)), gaussian(np.ones(D), np.diag(b**2))
    )
    assert found == pytest.approx(D + ((a - b) ** 2).sum(), rel=1e-12)


def test_one_dimensional_covariances_that_do_not_commute():
    """Catches the root of S1 times the root of S2, which is right for covariances that commute:
    the trace of the root of S1 S2 is the sum of the roots of the eigenvalues of S1 S2.
    """
    first, second = covariance(1), covariance(2)
    trace = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
    wanted = np.trace(first) + np.trace(second) - 2 * trace
    found = frechet.distance(gaussian(np.zeros(D), first), gaussian(np.zeros(D), second))
    assert found == pytest.approx(wanted, rel=1e-10)


def test_rotation_changes_nothing_and_equal_sets_are_0():
    """Catches an arithmetic that depends on the axes of the features."""
    x, y = features(seed=1), features(seed=2, shift=0.3)
    rotation = np.linalg.qr(np.random.default_rng(3).standard_normal((D, D)))[0]
    distance = lambda a, b: frechet.distance(Statistics.of(a), Statistics.of(b))
    assert distance(x @ rotation, y @ rotation) == pytest.approx(distance(x, y), rel=1e-10)
    assert distance(x, x) == pytest.approx(0, abs=1e-12)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-10)


def test_singular_covariances_give_a_real_number():
    """Catches eigenvalues just below 0 under a root: fewer images than features."""
    x, y = features(n=4, d=20, seed=1), features(n=5, d=20, seed=2)
    assert 0 < frechet.distance(Statistics.of(x), Statistics.of(y)) < np.inf


def test_deleting_blocks_equals_computing_anew():
    """Catches a block that is subtracted twice or from the wrong mean."""
    x, reference = features(n=60, shift=0.2), Reference.of(features(seed=1))
    blocks = prompt_blocks(np.arange(60) // 2, 7)
    direct = lambda kept: reference.distance(Statistics.of(x[kept]))
    found, wanted = frechet.replicates(x, reference, blocks), replicates(direct, blocks)
    assert found.value == pytest.approx(wanted.value, rel=1e-12)
    np.testing.assert_allclose(found.deleted, wanted.deleted, rtol=1e-9)
    assert found.sizes.tolist() == wanted.sizes.tolist()


def test_infinity_is_nearer_to_the_limit_than_the_distance():
    """Catches a line against N, the slope instead of the intercept, and draws with replacement,
    which raise every distance but the last. The limit is that of a huge sample.
    """
    reference = Reference.of(features(n=20000, seed=1))
    cov = np.diag(np.linspace(0.5, 2, D) ** 2)
    limit = reference.distance(gaussian(np.full(D, 0.1), cov))
    errors = []
    for seed in range(20):
        x = features(n=300, seed=10 + seed, shift=0.1)
        extrapolated = frechet.infinity(x, reference, np.arange(300), seed)["value"]
        complete = reference.distance(Statistics.of(x))
        errors.append((complete - limit, extrapolated - limit))
    complete, extrapolated = np.mean(errors, axis=0)
    assert complete > 0.02
    assert abs(extrapolated) < 0.35 * complete


def test_the_error_of_infinity_is_the_spread_of_independent_samples():
    """Catches the spread of the draws taken for the error, draws that differ between the deleted
    blocks (more than twice the error), and blocks that stay in the draws (no error).
    """
    reference, found = Reference.of(features(n=20000, seed=1)), []
    for seed in range(40):
        x = features(n=1000, seed=10 + seed, shift=0.1)
        result = frechet.infinity(x, reference, np.arange(1000), seed, points=8, repeats=1)
        found.append([result["value"], result["se"]])
    values, errors = np.array(found).T
    assert 0.75 < np.sqrt((errors**2).mean()) / values.std(ddof=1) < 1.4


def test_an_error_that_few_images_do_not_allow_is_none():
    """Catches a covariance of one image, which ends the evaluation."""
    x, reference = features(n=12), Reference.of(features(seed=1))
    assert frechet.infinity(x, reference, np.arange(12), points=3)["se"] is None
    assert frechet.infinity(x, reference, np.zeros(12, int), points=3)["se"] is None


def test_infinity_takes_counts_like_dgm_eval():
    """Catches other numbers of samples, and results that change with the seed of nothing."""
    x, reference = features(n=200, shift=0.1), Reference.of(features(seed=1))
    fit = lambda seed: frechet.infinity(x, reference, np.arange(200), seed, repeats=2)
    result = fit(3)
    assert result["counts"] == np.linspace(20, 200, 15).astype(int).tolist()
    assert result["distances"][-1] == reference.distance(Statistics.of(x))
    assert result == fit(3) != fit(4)


def test_images_of_a_prompt_are_drawn_together():
    """Catches draws of single images: with two copies of each image they leave fewer copies, a
    distance of more distinct images, and another intercept.
    """
    x, reference = features(n=200, shift=0.1), Reference.of(features(seed=1))
    doubled, prompts = np.repeat(x, 2, axis=0), np.repeat(np.arange(200), 2)
    result = frechet.infinity(doubled, reference, prompts, points=3, repeats=60)
    single = frechet.infinity(x, reference, np.arange(200), points=3, repeats=60)
    np.testing.assert_allclose(result["distances"], single["distances"], rtol=0.06)


def test_score_is_valid_json_with_its_parts():
    """Catches a result that JSON refuses, and a warning that is lost."""
    x, y = features(n=60, shift=0.5), features(n=40, seed=1)
    y[7] = x[3]
    result = frechet.score(x, y, np.arange(60))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["n"], result["n_reference"], len(result["sizes"])) == (60, 40, 20)
    assert len(result["warnings"]) == 1 and result["warnings"][0].startswith("1 of 60 samples")
    assert result["value"] == pytest.approx(frechet.distance(Statistics.of(x), Statistics.of(y)))
    from_statistics = frechet.score(x, Statistics.of(y), np.arange(60))
    assert from_statistics["value"] == result["value"] and from_statistics["warnings"] == []


@pytest.mark.slow
@pytest.mark.long
def test_estimates_at_the_size_of_an_ablation():
    """Catches an estimate that fails only in many dimensions: 3,000 samples of 128 features."""
    rng, n, d = np.random.default_rng(0), 3000, 128
    scales, shift = np.linspace(0.6, 1.4, d) * 2 / np.sqrt(d), np.full(d, 0.5 / np.sqrt(d))
    reference = Reference.of(rng.standard_normal((10 * n, d)) * scales)
    limit = reference.distance(gaussian(shift, np.diag(scales**2)))
    found, blocks = [], prompt_blocks(np.arange(n))
    for seed in range(30):
        x = rng.standard_normal((n, d)) * scales + shift
        result = estimate(frechet.replicates(x, reference, blocks))
        extrapolated = frechet.infinity(x, reference, np.arange(n), seed)["value"]
        found.append([result["value"], result["bias_corrected"], extrapolated, result["se"]])
    found = np.array(found)
    distance, corrected, extrapolated = np.abs(found[:, :3].mean(axis=0) - limit)
    assert distance > 0.03 and corrected < 0.1 * distance and extrapolated < 0.2 * distance
    assert 1 < np.sqrt((found[:, 3] ** 2).mean()) / found[:, 0].std(ddof=1) < 1.7
