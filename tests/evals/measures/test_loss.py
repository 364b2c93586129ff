"""The loss in the report."""

import numpy as np

from imagen_jax.evals import noise_bins, report
from imagen_jax.evals.measures import loss

EDGES = [20.0, 0.0, -20.0]


def test_line_has_the_mean_of_each_split():
    """Catches a bin's mean in place of the overall one, and a deviation in place of its error."""
    result = {"heldout": noise_bins.by_bin(np.array([[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]), EDGES)}
    assert list(loss.lines(result)) == [("loss, heldout", "2.5 +- 0.5774")]


def test_a_diverged_loss_is_reported_too():
    """Catches lines or curves that fail on a number that is not finite: the checkpoint most worth a
    look."""
    result = {"train": noise_bins.by_bin(np.full((2, 2), np.nan), EDGES)}
    assert list(loss.lines(result)) == [("loss, train", "undefined +- undefined")]
    assert report.plot(list(loss.curves(result))).startswith(b"\x89PNG")
