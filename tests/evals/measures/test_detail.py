"""The detail of samples that are their captioned image itself."""

import pytest

from imagen_jax.evals.measures import detail
from tests.evals import toys


def test_detail_is_that_of_the_captioned_image():
    """Catches controls that count as right, and a difference of the wrong sign."""
    result = detail.measure(toys.evaluation(data=toys.Textured(), kind=toys.Drawn))
    assert result["right"]["own"]["mean"] == pytest.approx(1.0, abs=1e-5)
    assert result["right"]["top1"]["hits"] == toys.N and result["shuffled"]["top1"]["hits"] == 0
    rise = 1.0 - result["shuffled"]["own"]["mean"]
    assert result["right_minus_shuffled"]["mean"] == pytest.approx(rise)
    labels = [label for label, _ in detail.lines(result)]
    texts = [f"detail, {text} text" for text in ("right", "shuffled", "null")]
    assert labels == [*texts, "detail, right minus shuffled", "detail, right minus null"]
