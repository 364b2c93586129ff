"""Image and text transforms against values computed by hand."""

import ml_dtypes
import numpy as np
import pytest

from imagen_jax.data import transforms, views
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
    for got in (
        transforms.shrink(image, (6, 6)),
        transforms.decode_square(synthetic.encode(image), 6),
    ):
        assert (
            got.shape == (6, 6, 3) and np.abs(got - wanted).max() <= 1
        )  # PIL rounds after each axis


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_draft_changes_nothing_where_no_scale_applies(kind):
    """Catches another path for other formats, and a JPEG scaled though its factor is below 2."""
    height = 64 if kind == "JPEG" else 160
    encoded = synthetic.encode(synthetic.photograph(height, height + 13), kind)
    exact, drafted = (transforms.decode_square(encoded, 40, rule) for rule in ("exact", "draft"))
    np.testing.assert_array_equal(drafted, exact)


def draft_factor(size, side):
    """Of the centre square of an image of this width and height."""
    return transforms.draft_factor(views.window(size, (side, side)), (side, side))


def test_draft_never_enlarges():
    """Catches a scale that leaves fewer pixels than wanted, that is never used, or that leaves an
    edge of the crop inside a pixel of the result."""
    for size in (1, 16):
        for side in range(1, 300):
            factor = draft_factor((side, side + 9), size)
            assert factor == 1 or side / factor >= size
    wanted = {15: 1, 16: 1, 32: 2, 63: 1, 64: 4, 65: 2, 127: 2, 128: 8, 129: 4, 256: 8}
    assert {side: draft_factor((side, side), 16) for side in wanted} == wanted
    beside = {0: 8, 16: 8, 8: 4, 4: 4, 5: 4, 2: 4}  # wider by, margins of half
    assert {more: draft_factor((128 + more, 128), 16) for more in beside} == beside


@pytest.mark.parametrize("height, width", [(320, 320), (203, 241), (647, 321), (321, 1290)])
def test_draft_shows_the_same_part_of_the_scene(height, width):
    """Catches a crop at a corner or of the full size's pixels, and sides of odd length."""
    ramps = np.zeros((height, width, 3), np.uint8)
    ramps[..., 0], ramps[..., 1] = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    encoded = synthetic.encode(ramps, "JPEG", quality=98, subsampling=0)
    exact, drafted = (
        transforms.decode_square(encoded, 20, rule).astype(float) for rule in ("exact", "draft")
    )
    for colour, length in ((0, width), (1, height)):
        pixel = 255 / length * min(height, width) / 20  # the difference of adjacent pixels
        assert np.abs(drafted - exact)[..., colour].max() < 0.5 * pixel + 1  # 1: rounding


@pytest.mark.parametrize("side, most", [(320, 0.6), (333, 3.5)])
def test_draft_is_close_to_exact_decoding(side, most):
    """Catches a scale that is too coarse; adjacent pixels of this image differ by 12 on average."""
    encoded = synthetic.encode(synthetic.photograph(side, side, 1), "JPEG", quality=95)
    exact, drafted = (
        transforms.decode_square(encoded, 40, rule).astype(int) for rule in ("exact", "draft")
    )
    assert 0 < np.abs(drafted - exact).mean() < most


def test_window_reaches_every_edge():
    """Catches a window that misses the last row or column, or is off by a low-res pixel."""
    image = synthetic.gradient(32)
    for corner, start in [((0.0, 0.0), 0), ((0.999, 0.999), 16), ((0.5, 0.5), 8)]:
        crop, small = transforms.crop_pair(image, 8, 16, corner)
        assert (crop == image[start : start + 16, start : start + 16]).all()
        assert (
            small
            == transforms.shrink(image, (8, 8))[
                start // 4 : start // 4 + 4, start // 4 : start // 4 + 4
            ]
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
