"""The detail of samples that are their captioned image itself."""

import pytest

from imagen_jax.evals.measures import detail
from tests.evals import toys


def test_detail_is_that_of_the_captioned_image():
    """Catches controls that count as right, and a difference of the wrong sign."""
    found = detail.measure(toys.evaluation(data=toys.Textured(), kind=toys.Drawn))
    assert found["right"]["own"]["mean"] == pytest.approx(1.0, abs=1e-5)
    assert found["right"]["top1"]["hits"] == toys.N and found["shuffled"]["top1"]["hits"] == 0
    rise = 1.0 - found["shuffled"]["own"]["mean"]
    assert found["right_minus_shuffled"]["mean"] == pytest.approx(rise)
    labels = [label for label, _ in detail.lines(found)]
    texts = [f"detail, {text} text" for text in ("right", "shuffled", "null")]
    assert labels == [*texts, "detail, right minus shuffled", "detail, right minus null"]
