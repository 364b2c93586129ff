"""Loading a feature network, and features of batches on several devices."""

import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from imagen_jax import sharding
from imagen_jax.evals.networks import network as networks
from imagen_jax.evals.networks import preprocessing
from imagen_jax.evals.networks.efficientnet_lite import EfficientNetLite
from imagen_jax.weights import feature_networks
from tests.evals.networks import tiny
from tests.weights import torch_files

SIZE = 33
MAIN = threading.main_thread()
LITE = EfficientNetLite(tiny.STAGES, tiny.STEM, tiny.HEAD)
NAMES = feature_networks.efficientnet_lite(tiny.image_shapes(LITE, SIZE))


@pytest.fixture(autouse=True)
def tiny_lite(monkeypatch):
    """`load("tiny", path)` loads a small EfficientNet-Lite."""
    kind = dataclasses.replace(
        networks.NETWORKS["efficientnet-lite0"],
        network=LITE,
        size=SIZE,
        prepare=functools.partial(preprocessing.efficientnet_lite, size=SIZE),
        package=None,
    )
    monkeypatch.setitem(networks.NETWORKS, "tiny", kind)


@pytest.fixture(name="weights")
def weights_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(tiny.random_weights(NAMES), path)
    return str(path)


def on(devices, fsdp=1):
    return lambda size: sharding.batch_mesh(jax.devices()[:devices], fsdp)


def pictures(count):
    """Pictures of different sizes."""
    return [tiny.picture(30 + 7 * i, 50 - 3 * i, seed=i) for i in range(count)]


def test_a_row_depends_on_its_image_alone(weights):
    """Catches a ragged last batch that is dropped, padding that is returned, and features that
    depend on batch mates, their number or the batch size.
    """
    network = networks.load("tiny", weights)
    images = pictures(11)
    want = network.features(images, batch_size=1)
    assert want.shape == (11, network.dim) and want.dtype == np.float32
    assert np.abs(want[0] - want[1]).max() > 0.1 * want.std()
    for count in (1, 8, 9):
        np.testing.assert_array_equal(network.features(images[:count], 1), want[:count])
    np.testing.assert_array_equal(network.features(images[::-1], 1), want[::-1])
    np.testing.assert_allclose(network.features(images, 2), want, rtol=1e-5, atol=1e-5)
    prepared = np.stack([network.prepare(image) for image in images])
    params = tiny.as_params(NAMES, tiny.random_weights(NAMES))
    tiny.assert_close(want, tiny.run(LITE, params, prepared))


class LazyPictures(Sequence):
    """Pictures that remember in which thread each one was read."""

    def __init__(self, images):
        self.images, self.read = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.read.append((i, threading.current_thread()))
        return self.images[i]


def test_lazy_images_are_read_once_in_threads(weights):
    """Catches images that are decoded for a check and again for the network, or one by one."""
    network, lazy = networks.load("tiny", weights, on(1)), LazyPictures(pictures(5))
    features = network.features(lazy, 2)
    np.testing.assert_array_equal(features, network.features(lazy.images, 2))
    # the checker of types reads some in the main thread
    assert sorted(i for i, thread in lazy.read if thread is not MAIN) == [0, 1, 2, 3, 4]


def test_devices_change_nothing(weights):
    """Catches rows out of order on a mesh, and parameters that are sharded wrongly."""
    images = np.stack([tiny.picture(40, 40, seed=i) for i in range(5)])
    one, eight, sharded = (
        networks.load("tiny", weights, on(*mesh)) for mesh in ((1,), (8,), (8, 4))
    )
    kernels = jax.tree.leaves(sharded.apply.args[0])
    assert any(not kernel.sharding.is_fully_replicated for kernel in kernels)
    want = one.features(images, 2)
    for network in (eight, sharded):
        np.testing.assert_allclose(network.features(images, 1), want, rtol=1e-5, atol=1e-5)


def test_products_are_in_full_precision(weights):
    """Catches TF32 or bfloat16 products, which are the default of GPUs and TPUs."""
    network = networks.load("tiny", weights, on(1))
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32)
    with jax.default_matmul_precision("default"):
        text = network.apply.func.lower(network.apply.args[0], images).as_text()
    assert text.count("stablehlo.convolution") == text.count("[#stablehlo<precision HIGHEST>,") > 0


def test_identity(weights, tmp_path):
    """Catches a checksum of another file, one of tensors that depends on the format, and an
    identity that is not JSON.
    """
    network = networks.load("tiny", weights, on(1))
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "weights.pth"
    ignored = dict.fromkeys(("_fc.weight", "_bn0.num_batches_tracked"), np.ones(1, np.float32))
    torch_files.write(other, *torch_files.plain(tiny.random_weights(NAMES) | ignored))
    same = networks.load("tiny", str(other), on(1))
    for found, file in ((network, weights), (same, other)):
        content = open(file, "rb").read()
        assert found.identity["sha256"] == hashlib.sha256(content).hexdigest()
        json.dumps(found.identity)
    assert network.identity["weights_sha256"] == same.identity["weights_sha256"]
    assert network.identity["sha256"] != same.identity["sha256"]
    assert network.identity["network"] == "tiny"
    assert network.identity["file"] == "weights.safetensors"
    assert network.preprocessing == network.identity["preprocessing"]


def changed(weights, **tensors):
    return {name: value for name, value in (weights | tensors).items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"_conv_head.weight": None}, "lacks _conv_head.weight; tiny needs efficientnet-lite0"),
        (
            {"_conv_head.weight": np.ones((2, 2), np.float32)},
            "_conv_head.weight is \\(2, 2\\), not",
        ),
        ({"_conv_more.weight": np.ones(2, np.float32)}, "has unexpected _conv_more.weight"),
    ],
)
def test_another_file_is_refused(tmp_path, tensors, message):
    """Catches a tensor that is missing, unused or of another shape."""
    path = tmp_path / "weights.safetensors"
    save_file(changed(tiny.random_weights(NAMES), **tensors), path)
    with pytest.raises(ValueError, match=message) as error:
        networks.load("tiny", str(path), on(1))
    assert "\n" not in str(error.value)


def test_the_file_of_another_network(tmp_path):
    """Catches an error that lists hundreds of tensors, or does not say what is needed."""
    network, size, name_map = tiny.NETWORKS["dinov2"]
    path = tmp_path / "model.safetensors"
    save_file(tiny.random_weights(name_map(tiny.image_shapes(network, size))), path)
    for where in (path, tmp_path):
        with pytest.raises(ValueError, match=r"and \d+ more; clip-b32 needs openai/clip") as error:
            networks.load("clip-b32", str(where))
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_another_activation_is_refused(tmp_path):
    """Catches a CLIP of other authors, whose tensors have OpenAI's names and shapes."""
    config = {"vision_config": {"hidden_act": "gelu"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vision_config.hidden_act 'gelu'"):
        networks.load("clip-b32", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "path", "error", "message"),
    [
        ("inception_v3", "x", ValueError, "choose one of inception, inception-clean"),
        ("inception", "", ValueError, "needs a path to its weights: pt_inception-2015-12-05"),
        ("inception", "absent.pth", FileNotFoundError, "absent.pth"),
        ("inception", "gs://bucket/x.pth", ValueError, "gs://"),
    ],
)
def test_arguments(name, path, error, message):
    """Catches a traceback of a library instead of one line."""
    with pytest.raises(error, match=message):
        networks.load(name, path)


def test_the_package_is_named(monkeypatch):
    """Catches an error that does not say what to install."""
    kind = dataclasses.replace(networks.NETWORKS["tiny"], package=("no-such-package", "x.pth"))
    monkeypatch.setitem(networks.NETWORKS, "tiny", kind)
    with pytest.raises(FileNotFoundError, match=r"pip install 'imagen_jax\[eval\]'"):
        networks.load("tiny", "")


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_images_must_be_rgb(image):
    """Catches images in [-1, 1] or with alpha, which would give features all the same."""
    with pytest.raises(ValueError, match=r"image 1 is .* need RGB images"):
        networks.checked(1, image)
    with pytest.raises(ValueError, match="no images"):
        networks.check_count([])
