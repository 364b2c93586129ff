"""Retrieval by pixel distance, with planted answers."""

import numpy as np
import pytest

from imagen_jax.evals import nearest


def flat(*values, size=4):
    """One-coloured images [n size size 3]."""
    return np.stack([np.full((size, size, 3), value, np.uint8) for value in values])


def test_distance_is_the_root_mean_square_in_grey_levels():
    """Catches uint8 arithmetic that wraps around, a sum instead of a mean, and pixels left out at
    the end of a block.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (n, 40, 40, 3), np.uint8) for n in (3, 5))
    wanted = [[np.sqrt(np.mean((x.astype(float) - y) ** 2)) for y in b] for x in a]
    np.testing.assert_allclose(nearest.distances(a, b), wanted, rtol=1e-12)
    assert nearest.distances(flat(0, 255), flat(255)).tolist() == [[255.0], [0.0]]


def test_planted_answers_are_counted():
    """Catches ranks from 0, `< k` for `<= k`, and an argsort taken for ranks."""
    gallery = flat(0, 10, 20, 30, 40, 50, 60)
    # Distances of 21 to the gallery: 21, 11, 1, 9, 19, 29, 39.
    result = nearest.score(nearest.distances(flat(21, 21, 21, 21), gallery), np.array([2, 3, 5, 6]))
    assert [result[name]["hits"] for name in ("top1", "top5")] == [1, 2]
    assert result["median_rank"] == 4.0 and result["n"] == 4 and result["gallery"] == 7
    assert result["distance"]["mean"] == pytest.approx((1 + 9 + 29 + 39) / 4)
    assert nearest.ranks(nearest.distances(flat(21), gallery), np.array([0])).tolist() == [5]


def test_ties_count_against_the_sample():
    """Catches a strict comparison: a grey nothing, equally far from all, would find everything; a
    duplicate of the right image too.
    """
    result = nearest.score(
        nearest.distances(flat(20, 20), flat(10, 30, 10, 30, 10, 30)), np.array([0, 1])
    )
    assert result["top5"]["hits"] == 0 and result["median_rank"] == 6.0
    assert nearest.ranks(nearest.distances(flat(11), flat(10, 10, 40)), np.array([0])).tolist() == [
        2
    ]
