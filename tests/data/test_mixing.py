"""The interleaving of streams by weight."""

from fractions import Fraction

import numpy as np
import pytest

from imagen_jax.data import mixing

WEIGHTS = [(1,), (1, 1), (7, 3), (3, 7), (1, 1000), (5, 1, 3), (2, 2, 2, 2), (100, 1, 37, 12, 1)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_stream_has_its_share_of_any_beginning(weights):
    """Catches shares that are rounded, off at the start, or exact only after a long time."""
    counts = np.zeros(len(weights), int)
    for position in range(2500):
        stream, number = mixing.interleave(position, weights)
        assert number == counts[stream]  # none left out, none twice, in order
        counts[stream] += 1
        share = (position + 1) * np.array(weights) / sum(weights)
        assert (np.abs(counts - share) <= 1 + np.arange(len(weights))).all()


def test_far_positions_need_no_earlier_ones():
    """Catches a computation in floating point, which repeats or drops elements far out."""
    weights = mixing.whole_weights([Fraction(0.7), Fraction(0.3)])
    seen = [mixing.interleave(10**15 + i, weights) for i in range(1000)]
    for stream in (0, 1):
        numbers = [number for which, number in seen if which == stream]
        assert np.diff(numbers).tolist() == [1] * (len(numbers) - 1)
    assert sum(which for which, _ in seen) in (299, 300, 301)


def test_whole_weights_are_exact():
    """Catches weights rounded to hundredths of the smallest, as Grain's are."""
    assert mixing.whole_weights([Fraction(0.5), Fraction(0.25)]) == (2, 1)
    assert mixing.whole_weights([Fraction(2, 3), Fraction(1, 7)]) == (14, 3)
    third = mixing.whole_weights([Fraction(1.0), Fraction(1 / 3)])
    assert Fraction(third[1], third[0]) == Fraction(1 / 3)


def test_seeds_of_streams_differ():
    """Catches two sets, or two seeds, with the same order."""
    seeds = {
        mixing.stream_seed(seed, i, j) for seed in range(5) for i in range(5) for j in range(5)
    }
    assert len(seeds) == 125 and all(0 <= seed < 2**32 for seed in seeds)
