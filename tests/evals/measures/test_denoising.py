"""The error of x-hat beside that of bicubic up-sampling."""

import pytest

from imagen_jax.evals.measures import denoising
from tests.evals import toys


def test_x_hat_is_compared_with_bicubic_on_whole_images():
    """Catches gains of the wrong sign, and crops compared with bicubic."""
    result = denoising.measure(toys.evaluation(data=toys.Textured(), kind=toys.Drawn))
    assert result["bicubic"]["mean"] > 0.1
    for level in ("drawn", "clean"):
        gain = result[level]["gain"]["overall"]["mean"]
        assert gain == pytest.approx(result["bicubic"]["mean"] - 0.3)
    lines = dict(denoising.lines(result))
    assert lines["squared error, x-hat, low-res clean"].startswith("0.3 +- ")
