"""Samples shrunk again, against the low-res images they were drawn from."""

from imagen_jax.evals.measures import consistency
from tests.evals import toys


def test_samples_are_compared_with_their_own_low_res_image():
    """Catches samples compared with the wrong low-res image, or with the high-res one."""
    result = consistency.measure(toys.evaluation(data=toys.Textured(), kind=toys.Drawn))
    assert result["samples"]["mae"]["mean"] == 0.0 < result["bicubic"]["mae"]["mean"] < 40
    lines = dict(consistency.lines(result))
    assert lines["shrunk samples to low-res"] == "0 +- 0 of 255, PSNR infinite"
    assert lines["shrunk bicubic to low-res"].endswith(" dB")
