"""Image and text transforms against values computed by hand."""

import ml_dtypes
import numpy as np
import pytest

from imagen_jax.data import transforms
from tests.data import synthetic


def test_centre_square_is_kept():
    """Catches a squeezed picture, a corner crop, rows and columns exchanged."""
    wide = np.zeros((4, 10, 3), np.uint8)
    wide[:, :, 0] = np.arange(10)
    wide[:, :, 1] = np.arange(4)[:, None]
    square = transforms.decode_square(synthetic.encode(wide), 4)
    assert (square[0, :, 0] == [3, 4, 5, 6]).all() and (square[:, 0, 1] == [0, 1, 2, 3]).all()
    tall = transforms.decode_square(synthetic.encode(wide.transpose(1, 0, 2)), 4)
    assert (tall[:, 0, 0] == [3, 4, 5, 6]).all()


def test_shrinking_is_the_area_average():
    """Catches nearest, bilinear or bicubic shrinking."""
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    wanted = image.reshape(6, 4, 6, 4, 3).mean(axis=(1, 3))
    for got in (transforms.shrink(image, 6), transforms.decode_square(synthetic.encode(image), 6)):
        assert (
            got.shape == (6, 6, 3) and np.abs(got - wanted).max() <= 1
        )  # PIL rounds after each axis


def test_window_reaches_every_edge():
    """Catches a window that misses the last row or column, or is off by a low-res pixel."""
    image = synthetic.gradient(32)
    for corner, start in [((0.0, 0.0), 0), ((0.999, 0.999), 16), ((0.5, 0.5), 8)]:
        crop, small = transforms.crop_pair(image, 8, 16, corner)
        assert (crop == image[start : start + 16, start : start + 16]).all()
        assert (
            small
            == transforms.shrink(image, 8)[start // 4 : start // 4 + 4, start // 4 : start // 4 + 4]
        ).all()
    whole, small = transforms.crop_pair(image, 8, 32, (0.9, 0.1))
    assert (whole == image).all() and small.shape == (8, 8, 3)


def test_text_is_padded_behind():
    """Catches padding in front, a mask off by one, features cut in silence."""
    features = np.arange(1, 7).reshape(3, 2).astype(ml_dtypes.bfloat16)
    text, mask = transforms.pad_text(features, 5)
    assert (text == np.array([[1, 2], [3, 4], [5, 6], [0, 0], [0, 0]])).all() and mask.tolist() == [
        True
    ] * 3 + [False] * 2
    with pytest.raises(ValueError, match="has 3 tokens, more than the text length 2"):
        transforms.pad_text(features, 2)
