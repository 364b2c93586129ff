"""Davidson's model: known strengths, closed forms, and results that are not defined."""

import itertools

import numpy as np
import pytest

from imagen_jax.evals.rating import strengths


def test_expected_counts_give_the_strengths():
    """Catches a wrong gradient, a tie parameter with a wrong power, and strengths not centred."""
    log_p, log_v = [0.7, 0.1, -0.8], float(np.log(0.6))
    pairs = np.array(list(itertools.combinations(range(3), 2)))
    counts = 1000 * np.array([strengths.probability(log_p[i], log_p[j], log_v) for i, j in pairs])
    found, tie = strengths.fit(counts, pairs, 3)
    np.testing.assert_allclose(found, log_p, atol=1e-5)
    assert abs(tie - log_v) < 1e-5


def test_two_systems_without_ties():
    """The closed form: the log of the odds."""
    found, _ = strengths.fit(np.array([[30.0, 0.0, 10.0]]), np.array([[0, 1]]), 2)
    np.testing.assert_allclose(found[0] - found[1], np.log(3), atol=1e-6)


def test_ties_lie_between():
    """Catches ties that count as wins of one side: Davidson's probabilities in closed form."""
    counts = np.array([[40.0, 20.0, 10.0]])
    found, log_v = strengths.fit(counts, np.array([[0, 1]]), 2)
    fitted = strengths.probability(*found.tolist(), log_v)
    np.testing.assert_allclose(fitted, counts[0] / 70, atol=1e-6)  # three rates, two parameters


@pytest.mark.parametrize(
    "counts",
    [
        [[9.0, 0.0, 0.0], [5.0, 1.0, 3.0], [2.0, 0.0, 0.0]],  # the first always wins
        [[3.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],  # the last has no comparison
        [[5.0, 5.0, 0.0], [5.0, 5.0, 0.0], [10.0, 0.0, 0.0]],  # wins and ties, all one way
        [[0.0, 5.0, 0.0], [0.0, 4.0, 0.0], [0.0, 3.0, 0.0]],  # nothing but ties
    ],
)
def test_strengths_without_a_limit(counts):
    """Catches the number at which an optimiser happens to stop."""
    pairs = np.array([[0, 1], [1, 2], [0, 2]])
    with pytest.raises(ValueError, match="no limit"):
        strengths.fit(np.array(counts), pairs, 3)


def test_ties_can_limit_the_strengths():
    """Catches strengths that are called undefined because the first system never lost.

    A tie between the first and the last system limits them: no point of a grid is likelier.
    """
    counts = np.array([[5.0, 5.0, 0.0], [5.0, 5.0, 0.0], [10.0, 3.0, 0.0]])
    pairs = np.array([[0, 1], [1, 2], [0, 2]])

    def likelihood(top, tie):
        gaps = np.array([top, top, 2 * top])[:, None] / 2
        logits = np.hstack([gaps, np.full((3, 1), tie), -gaps])
        return (counts * (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))).sum()

    found, log_v = strengths.fit(counts, pairs, 3)
    np.testing.assert_allclose(found, [found[0], 0.0, -found[0]], atol=1e-5)
    grid = np.linspace(0.0, 6.0, 61)
    best = max(likelihood(top, tie) for top in grid for tie in grid)
    assert best <= likelihood(found[0], log_v) < best + 0.1
