"""Super-resolution against bicubic, its input and the detail of other images."""

import numpy as np
import pytest

from imagen_jax.evals import superres


def noise(n, size, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)


def test_bicubic_is_smooth_and_in_place():
    """Catches nearest or bilinear up-sampling, and an image shifted by half a pixel."""
    ramp = np.broadcast_to((np.arange(8, dtype=np.uint8) * 32)[None, None, :, None], (1, 8, 8, 3))
    result = superres.bicubic(ramp, 32)[0, 16, :, 0].astype(int)
    inner = 32 * (
        (np.arange(8, 24) + 0.5) / 4 - 0.5
    )  # pixel centres of the large image, in small pixels
    assert np.abs(result[8:24] - inner).max() <= 1
    step = np.zeros((1, 8, 8, 3), np.uint8)
    step[:, :, 4:] = 200
    assert superres.bicubic(step, 32).max() > 205  # overshoots, as bilinear does not


def test_mean_square_is_on_the_scale_of_losses():
    """Catches differences in 0..255, where a loss is in [-1, 1], and wrapping uint8 differences."""
    white, black = np.full((1, 4, 4, 3), 255, np.uint8), np.zeros((1, 4, 4, 3), np.uint8)
    assert superres.mean_square(black, white) == pytest.approx([4.0])


def test_consistency_in_grey_levels_and_decibels():
    """Catches wrapping differences, and a PSNR with 20 for 10 or with the peak of [-1, 1]."""
    lowres = np.full((2, 4, 4, 3), 100, np.uint8)
    shrunk = lowres + np.array([5, 0], np.uint8)[:, None, None, None]
    shrunk[1] -= 15
    result = superres.consistency(superres.consistency_errors(shrunk, lowres))
    assert result["mae"]["mean"] == 10.0 and result["mae"]["se"] == pytest.approx(5.0)
    assert result["psnr"] == pytest.approx(10 * np.log10(255**2 / 125))
    same = superres.consistency_errors(lowres, lowres)
    assert superres.consistency(same)["psnr"] is None


def test_detail_tells_right_from_other_images():
    """Catches images compared instead of residuals: all share one up-sampled image, and only the
    small detail differs.
    """
    upsampled = np.repeat(noise(1, 16, 0) // 2 + 60, 8, axis=0)
    detail = noise(8, 16, 1) // 16
    images = upsampled + detail
    result = superres.detail(superres.residual_correlations(images, images, upsampled))
    assert (
        result["own"]["mean"] == pytest.approx(1.0, abs=1e-6)
        and abs(result["other"]["mean"]) < 0.05
    )
    assert result["top1"]["hits"] == 8 and result["difference"]["ratio"] > 3
    wrong = superres.detail(
        superres.residual_correlations(np.roll(images, 1, axis=0), images, upsampled)
    )
    assert wrong["top1"]["hits"] == 0 and abs(wrong["own"]["mean"]) < 0.1


def test_no_detail_finds_nothing():
    """Catches NaN, or every image found, for a stage that only up-samples."""
    upsampled = noise(6, 8, 2) // 2
    result = superres.detail(
        superres.residual_correlations(upsampled, upsampled + noise(6, 8, 3) // 4, upsampled)
    )
    assert result["own"]["mean"] == 0.0 and result["top5"]["hits"] == 0
