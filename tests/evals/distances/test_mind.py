"""MIND against closed forms of the Wasserstein distance."""

import json

import numpy as np
import pytest

from imagen_jax.evals.distances import mind
from imagen_jax.evals.distances.jackknife import prompt_blocks, replicates

D, COUNT = 5, 40


def features(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, D))


def value(x, y, seed=0):
    return mind.replicates(x, y, np.arange(len(x)) % 2, COUNT, seed).value


def test_shifted_set_is_the_projected_shift():
    """Catches another factor than 3 d, unsorted projections, directions that are not unit vectors,
    and directions left out of the last group.
    """
    x, shift = features(50), np.array([1.0, -2, 0, 0.5, 0])
    vectors = mind.directions(D, COUNT, 0)
    np.testing.assert_allclose((vectors**2).sum(axis=1), 1)
    wanted = 3 * D * ((vectors @ shift) ** 2).mean()
    order = np.random.default_rng(1).permutation(50)
    assert value(x, x[order] + shift) == pytest.approx(wanted, rel=1e-10)
    assert value(x, x[order] + shift, seed=1) != pytest.approx(wanted, rel=1e-3)


def test_many_directions_give_three_times_the_squared_shift():
    """Catches directions that are not isotropic: the mean of (u.v)^2 is |v|^2 / d."""
    x, shift = features(20), np.array([1.0, -2, 0, 0.5, 0])
    found = mind.replicates(x, x + shift, np.arange(20) % 2, 20000).value
    assert found == pytest.approx(3 * shift @ shift, rel=0.03)


def test_scaled_set_is_the_difference_of_the_deviations():
    """Catches a squared difference of variances."""
    x = features(50)
    projected = x @ mind.directions(D, COUNT, 0).T
    wanted = 3 * D * (0.5**2) * (projected**2).mean()
    assert value(x, 1.5 * x) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("n, m", [(4, 6), (6, 4), (1, 5), (3, 7), (5, 5)])
def test_sets_of_unequal_size_are_matched_by_quantiles(n, m):
    """Catches interpolated or dropped values: repeating each value m and n times gives sets of
    equal size with the same distribution.
    """
    rng = np.random.default_rng(n)
    x, y = (
        np.sort(rng.standard_normal((2, n)), axis=1),
        np.sort(rng.standard_normal((2, m)), axis=1),
    )
    wanted = ((np.repeat(x, m, axis=1) - np.repeat(y, n, axis=1)) ** 2).mean(axis=1)
    np.testing.assert_allclose(mind.wasserstein(x, y), wanted, rtol=1e-12)


def test_deleting_blocks_equals_computing_anew():
    """Catches rows of a deleted block that remain in the sorted projections."""
    x, y = features(30), 0.3 + features(20, seed=1)
    blocks = prompt_blocks(np.arange(30) // 2, 4)
    found = mind.replicates(x, y, blocks, COUNT)
    wanted = replicates(lambda kept: value(x[kept], y), blocks)
    assert found.value == pytest.approx(wanted.value, rel=1e-12)
    np.testing.assert_allclose(found.deleted, wanted.deleted, rtol=1e-10)


def test_score_is_valid_json_and_equal_sets_are_refused():
    """Catches numpy numbers in a result, and a distance of 0 that is reported."""
    x, y = features(40), features(40, seed=1)
    result = mind.score(x, y, np.arange(40), count=COUNT)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["directions"] == COUNT and result["value"] == pytest.approx(value(x, y))
    with pytest.raises(ValueError, match="the MIND is 0"):
        mind.score(x, np.nextafter(x, 9), np.arange(40), count=COUNT)
