"""Means, intervals and shuffling, against numbers worked out elsewhere."""

import json

import numpy as np
import pytest

from imagen_jax.evals import statistics


@pytest.mark.parametrize(
    "hits, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval_is_the_published_one(hits, n, low, high):
    """Catches the normal interval (no width at 0 of 20), a continuity correction, or z of another
    level: Newcombe 1998, table I, method 3.
    """
    assert statistics.wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("hits, n", [(3, 2), (-1, 5), (0, 0)])
def test_what_is_no_proportion_is_refused(hits, n):
    """Catches an interval stated for nothing drawn."""
    with pytest.raises(ValueError, match="not a proportion"):
        statistics.wilson(hits, n)


@pytest.mark.parametrize(
    "gained, lost, same, expected",
    [
        (26, 4, 18, 0.09448809),  # the example of ci.prop.ps in the R package statpsych 1.7
        (0, 0, 8, np.sqrt(0.02)),  # (1/10 + 1/10) / 10
    ],
)
def test_error_of_a_paired_difference_of_hits(gained, lost, same, expected):
    """Catches the unadjusted error, 0 where no row differs, and other pseudo-rows."""
    rows = np.repeat([1.0, -1.0, 0.0], [gained, lost, same])
    assert statistics.paired_hits_error(rows) == pytest.approx(expected, rel=1e-6)


def test_standard_error_is_that_of_the_mean():
    """Catches the population's deviation (ddof 0: 1.118 / 2), and the deviation itself in place of
    the mean's error.
    """
    result = statistics.summary(np.array([1.0, 2.0, 3.0, 4.0]))
    assert result == {"mean": 2.5, "se": pytest.approx(1.2909944 / 2), "n": 4}
    assert statistics.difference(np.array([1.0, 2.0, 3.0, 4.0]))["ratio"] == pytest.approx(
        2.5 / 0.6454972
    )


def test_the_undefined_is_null_in_json():
    """Catches NaN or Infinity in the result, which JSON readers refuse: one value, no spread, a
    diverged loss.
    """
    result = [
        statistics.difference(np.array(values)) for values in ([2.0], [1.0, 1.0], [np.nan, 1.0])
    ]
    assert [(f["se"], f["ratio"]) for f in result] == [(None, None), (0.0, None), (None, None)]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize(
    "labels", [[0, 1], [0, 1, 2, 3, 4], [7, 7, 7, 1, 2, 3], [5, 5, 6, 6], [0, 0, 1, 1, 1, 2, 2]]
)
def test_nobody_keeps_his_own_caption(labels):
    """Catches a plain permutation (fixed points dilute the control), and one that gives a row the
    same caption from another row.
    """
    labels = np.array(labels)
    seen = set()
    for seed in range(50):
        other = statistics.derangement(labels, seed)
        assert sorted(other) == list(range(len(labels)))
        assert (labels[other] != labels).all()
        seen.add(tuple(other))
    assert len(seen) > 1 or len(labels) == 2
    assert statistics.derangement(labels, 3).tolist() == statistics.derangement(labels, 3).tolist()


def test_rows_of_one_caption_cannot_be_shuffled():
    """Catches a control that silently gives most rows their own caption."""
    with pytest.raises(ValueError, match="one caption has 3 rows"):
        statistics.derangement(np.array([4, 4, 4, 1, 2]), 0)


def test_rows_of_a_group_are_not_independent():
    """Catches an interval of the number of rows: with copies of each row it would shrink."""
    rng = np.random.default_rng(0)
    one = rng.random((400, 1)) < 0.3
    single = statistics.grouped_proportion(one)
    assert single == statistics.proportion(int(one.sum()), 400)
    copies = statistics.grouped_proportion(np.repeat(one, 8, axis=1))
    assert (copies["rate"], copies["n"], copies["hits"]) == (single["rate"], 3200, 8 * one.sum())
    for end in ("low", "high"):
        assert copies[end] == pytest.approx(single[end], abs=1e-3)


def test_the_interval_of_groups_has_the_error_of_their_rates():
    """Catches the variance of single rows, and an interval without width where no row is a hit."""
    rng = np.random.default_rng(0)
    hits = rng.random((2000, 4)) < rng.beta(1, 2, (2000, 1))
    found = statistics.grouped_proportion(hits)
    error = statistics.summary(hits.mean(axis=1))["se"]
    assert (found["high"] - found["low"]) / (2 * statistics.Z95) == pytest.approx(error, rel=0.01)
    none = statistics.grouped_proportion(np.zeros((50, 4), bool))
    assert none["high"] == pytest.approx(statistics.wilson(0, 50)[1])
