"""Intervals of clustered votes: against a bootstrap, and their coverage in simulated studies."""

import numpy as np
import pytest
import scipy.stats

from imagen_jax.evals.rating import clustered


def draw(rng, prompts, raters, prompt, rater, gap=0.2, threshold=0.25, seen=1.0):
    """(prompt, rater, outcome 1, 0 or -1) of a study with normal effects."""
    p, r = np.divmod(np.arange(prompts * raters), raters)
    u = gap + rng.normal(0, prompt, prompts)[p] + rng.normal(0, rater, raters)[r]
    u += rng.standard_normal(len(u))
    kept = rng.random(len(u)) < seen
    outcome = np.where(u > threshold, 1, np.where(u < -threshold, -1, 0))
    return p[kept], r[kept], outcome[kept]


def expected(prompt, rater, gap=0.2, threshold=0.25):
    """The expected rates of outcome 1 and -1."""
    spread = np.sqrt(1 + prompt**2 + rater**2)
    normal = scipy.stats.norm
    return normal.sf((threshold - gap) / spread), normal.cdf((-threshold - gap) / spread)


def coverage(studies, seed, prompts, raters, prompt, rater, **options):
    """The share of 95 % intervals of both rates that contain the expected rate."""
    rng, truth, hits = np.random.default_rng(seed), expected(prompt, rater), []
    for _ in range(studies):
        p, r, outcome = draw(rng, prompts, raters, prompt, rater, **options)
        for value, rate in zip((1, -1), truth):
            found = clustered.rate((outcome == value).astype(float), p, r)
            hits.append(found["low"] <= rate <= found["high"])
    return np.mean(hits)


WORLDS = {
    "prompts and raters": (40, 15, 0.5, 0.4),
    "prompts": (60, 15, 0.7, 0.0),
    "raters": (40, 20, 0.0, 0.6),
    "independent": (60, 15, 0.0, 0.0),
}


@pytest.mark.parametrize("world", WORLDS)
def test_intervals_cover(world):
    """Catches votes counted as independent (below 80 % with clusters), and clusters counted twice.

    200 studies have a standard error of at most 1.5 points.
    """
    assert 0.90 < coverage(200, 0, *WORLDS[world]) < 0.985


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_intervals_of_a_thousand_studies_cover(world):
    """1,000 studies of each kind: between 93 and 97 %."""
    assert 0.93 < coverage(1000, 1, *WORLDS[world]) < 0.97


def test_unequal_numbers_of_votes_are_covered():
    """Catches an average of prompt averages, and blocks that break the degrees of freedom."""
    assert 0.90 < coverage(200, 2, 60, 20, 0.5, 0.4, seen=0.3) < 0.985


def test_the_variance_is_that_of_resampling():
    """Catches a term that is not that of its bootstrap."""
    rng = np.random.default_rng(3)
    p, r, outcome = draw(rng, 30, 8, 0.8, 0.5)
    hits = (outcome == 1).astype(float)
    influence = (hits - hits.mean()) / len(hits)

    def bootstrap(labels, draws=4000):
        n = labels.max() + 1
        weights = rng.multinomial(n, np.full(n, 1 / n), draws)
        sums, counts = np.bincount(labels, hits), np.bincount(labels)
        return (weights @ sums / (weights @ counts)).var() * n / (n - 1)

    expected_value = bootstrap(p) + bootstrap(r) - bootstrap(np.arange(len(hits)))
    assert abs(clustered.variance(influence, p, r).value / expected_value - 1) < 0.1


def test_votes_that_all_agree():
    """Catches an interval without width at 0 and 100 %."""
    p, r = np.divmod(np.arange(100), 5)
    found = clustered.rate(np.ones(100), p, r)
    assert found["rate"] == found["high"] == 1.0 and 0.5 < found["low"] < 0.7
    assert found["design_effect"] is None


def test_scores_that_all_agree_or_reach_a_bound():
    """Catches an interval without width, and one that ends beyond the highest score."""
    one = np.zeros(1, int)
    for value in (0.0, 50.0, 100.0):
        found = clustered.mean(np.array([value]), one, one, (0.0, 100.0))
        assert found["mean"] == value and found["high"] - found["low"] > 70
        assert 0 <= found["low"] <= value <= found["high"] <= 100
    p, r = np.divmod(np.arange(30), 3)
    found = clustered.mean(np.where(np.arange(30) == 7, 0.0, 100.0), p, r, (0.0, 100.0))
    assert found["high"] == 100.0 and 80 < found["low"] < 95


def test_one_prompt_is_no_cluster():
    """Catches a division by zero, and a variance of 0 from one cluster."""
    hits = np.tile([1.0, 0.0, 1.0], 10)
    found = clustered.rate(hits, np.zeros(30, int), np.arange(30))
    assert 0 < found["se"] < 0.2


def test_influences_of_a_rate_are_those_of_the_mean():
    """Catches a gradient with a wrong sign or scale."""
    kinds = np.random.default_rng(0).integers(0, 3, 200)
    share = lambda counts: counts[:1] / counts.sum()
    found = clustered.influences(share, kinds, 3)[:, 0]
    hits = (kinds == 0).astype(float)
    np.testing.assert_allclose(found, (hits - hits.mean()) / len(hits), rtol=1e-5)
