"""The rise of a loss whose amounts for wrong text and wrong low-res images are known."""

import numpy as np
import pytest

from imagen_jax.evals import noise_bins, statistics
from imagen_jax.evals.measures import sensitivity
from tests.evals.toys import GREY_LOWRES, NO_TEXT, WRONG_LOWRES, WRONG_TEXT, N


def test_rises_are_paired_and_known(toy):
    """Catches controls drawn with other noise or times than the right condition (errors of 100, not
    0), right and control swapped, a null that keeps the caption's length, a null low-res image that
    is black, and controls that take the other's place."""
    result = sensitivity.measure(toy)
    assert result["split"] == "heldout"
    lowres = (WRONG_LOWRES, GREY_LOWRES)
    wanted = {"text": (WRONG_TEXT, NO_TEXT), "lowres_drawn": lowres, "lowres_clean": lowres}
    assert set(result) == {"split", *wanted}
    for condition, amounts in wanted.items():
        for kind, amount in zip(("shuffled", "null"), amounts, strict=True):
            curve = result[condition][kind]
            for entry in [curve["overall"], *curve["bins"]]:
                assert entry["mean"] == pytest.approx(amount, abs=1e-4)
                assert entry["se"] < 1e-4 and entry["n"] == N


def test_line_has_the_rise_in_standard_errors():
    """Catches a ratio that is not the difference's, and the split taken for a condition."""
    values = np.array([[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]])
    curve = noise_bins.by_bin(values, [20.0, 0.0, -20.0], describe=statistics.difference)
    result = {"split": "heldout", "text": {"null": curve}}
    wanted = [("loss rise, text null", "2.5 +- 0.5774 (4.3 standard errors)")]
    assert list(sensitivity.lines(result)) == wanted
    assert [title for title, _ in sensitivity.curves(result)] == ["loss rise, text"]
