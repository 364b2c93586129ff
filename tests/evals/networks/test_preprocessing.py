"""Preprocessing: resizes, crops, ranges."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax.evals.networks import preprocessing
from imagen_jax.evals.networks.network import NETWORKS
from tests.evals.networks import tiny


@pytest.mark.parametrize("size", tiny.SIZES)
def test_tf1_bilinear(size):
    """Catches half-pixel centres, antialiasing, and rounding to uint8."""
    out = preprocessing.bilinear_tf1(tiny.picture(20, 31), size)
    np.testing.assert_array_equal(out, np.load(tiny.GOLDENS)[f"bilinear_tf1_{size}"])


def test_inception_ranges():
    """Catches (x - 127.5) / 127.5, and a resize of images that have the size."""
    image = tiny.picture(299, 299)
    want = (image.astype(np.float32) - 128) / 128
    np.testing.assert_array_equal(preprocessing.inception_graph(image), want)
    np.testing.assert_array_equal(preprocessing.inception_clean(image), want)


def test_clean_resize_is_not_rounded_and_clipped():
    """Catches PIL's filter on uint8, which rounds twice, and bicubic values beyond the range."""
    image = np.zeros((20, 20, 3), np.uint8)
    image[:, 10:, 1] = 255
    image[:, :, 2] = tiny.picture(20, 20)[..., 0]
    out = preprocessing.inception_clean(image, 35) * 128 + 128
    rounded = np.asarray(Image.fromarray(image).resize((35, 35), Image.Resampling.BICUBIC))
    assert out[..., 1].min() == 0 and out[..., 1].max() == 255
    assert 0.5 < np.abs(out - rounded).max() < 5
    assert np.abs(out - np.round(out)).max() > 0.4


def test_resizes_antialias():
    """Catches a bicubic filter that skips pixels: stripes of one pixel must become grey."""
    stripes = np.zeros((600, 600, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = np.s_[5:-5, 5:-5]
    assert np.abs(preprocessing.inception_clean(stripes)[inner]).max() < 0.1
    assert np.abs(preprocessing.inception_graph(stripes)[inner]).max() > 0.9


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes(name):
    """Catches a size that the network does not take, height and width exchanged, and float64."""
    for shape in ((40, 60), (333, 190), (224, 224)):
        out = NETWORKS[name].prepare(tiny.picture(*shape))
        assert out.shape == (NETWORKS[name].size,) * 2 + (3,)
        assert out.dtype == np.float32


def test_crop_is_centred():
    """Catches a crop at a corner, a squeezed image, and the long side taken for the short one."""
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 200
    assert (preprocessing.centre_crop(image, 20) == 200).all()
    assert (preprocessing.centre_crop(image.transpose(1, 0, 2), 20) == 200).all()
    squeezed = preprocessing.dinov2(image, 20)[10, :, 0]
    assert squeezed[1] < 0 < squeezed[10]


def test_means():
    """Catches ImageNet's mean for CLIP and CLIP's for DINOv2, and values in 0 to 255."""
    grey = np.full((224, 224, 3), 128, np.uint8)
    for prepare, first in (
        (lambda x: preprocessing.clip(x, 224), (128 / 255 - 0.48145466) / 0.26862954),
        (preprocessing.dinov2, (128 / 255 - 0.485) / 0.229),
        (preprocessing.efficientnet_lite, 1 / 128),
    ):
        np.testing.assert_allclose(prepare(grey)[..., 0], first, rtol=1e-4)
