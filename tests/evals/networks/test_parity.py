"""Full-size feature networks with random weights against torch-fidelity and transformers.

`make parity` installs both. Weights go through the files that users have.
"""

import importlib
import importlib.util

import jax
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.evals.networks import clip_text, preprocessing
from imagen_jax.evals.networks.clip_image import CLIPImage, CLIPImageConfig
from imagen_jax.evals.networks.dinov2 import DINOv2, DINOv2Config, resize_matrix
from imagen_jax.evals.networks.efficientnet_lite import LITE0
from imagen_jax.evals.networks.network import NETWORKS, find_weights, load
from imagen_jax.text.clip import CLIPText, CLIPTextConfig
from imagen_jax.weights import clip_files, feature_networks
from imagen_jax.weights.name_map import read_tree
from imagen_jax.weights.torch_files import TorchFile
from tests.evals.networks import tiny

pytestmark = pytest.mark.parity
PICTURES = [tiny.picture(256, 256), tiny.picture(341, 270, seed=4)]
# A full-size L/14 takes minutes on two cores; this one has its patch and head size.
SHORT_L14 = CLIPImageConfig(224, 14, 1024, 3, 16, 768)


def one(size):
    return sharding.batch_mesh(jax.devices()[:1])


@pytest.fixture(scope="module", name="torch")
def installed_torch():
    """torch, which is imported only where these tests run."""
    return pytest.importorskip("torch")


@pytest.fixture(scope="module", name="references")
def torch_references(torch):
    return importlib.import_module("tests.evals.networks.torch_references")


@pytest.fixture(scope="module", name="fidelity")
def installed_fidelity(references):
    """A function that imports a module of torch-fidelity."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity: make parity")
    return references.fidelity


@pytest.fixture(scope="module", name="inception")
def random_inception(tmp_path_factory, torch, references, fidelity):
    """(torch-fidelity's network with random weights, its file as torch.save writes it)."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    model = references.inception()
    torch.save(model.state_dict(), path)
    return model, path


def test_inception(inception, torch):
    """Catches a difference from the graph in resize, range, network or file that small sizes hide:
    uint8 pictures go in, 2048 features come out.
    """
    model, path = inception
    network = load("inception", str(path), one)
    out = network.features(PICTURES, 2)
    with torch.no_grad():
        want = np.concatenate(
            [model(torch.tensor(x.transpose(2, 0, 1))[None])[0].numpy() for x in PICTURES]
        )
    assert out.shape == (2, 2048)
    tiny.assert_close(out, want)
    clean = load("inception-clean", str(path), one).features(PICTURES, 2)
    assert np.abs(clean - want).max() > 0.01 * want.std()


def test_inception_resize(references, fidelity):
    """Catches sizes at which the resize differs from torch-fidelity's, which follows TF1's."""
    resize = fidelity("interpolate_compat_tensorflow")
    for shape in ((64, 64), (256, 256), (299, 299), (1024, 640), (300, 299), (1, 7)):
        image = tiny.picture(*shape)
        x = references.channels_first(image[None].astype(np.float32))
        y = resize.interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
        out = preprocessing.bilinear_tf1(image, 299)
        np.testing.assert_allclose(out, y[0].permute(1, 2, 0).numpy(), rtol=0, atol=1e-5)


def test_clip(tmp_path, references):
    """Catches differences from transformers' ViT-B/32 that small sizes hide, in both towers."""
    config, text = NETWORKS["clip-b32"].network.config, clip_text.TOWERS["clip-b32"]
    model = references.clip(config, text)
    model.save_pretrained(tmp_path)
    network = load("clip-b32", str(tmp_path), one)
    prepared = np.stack([network.prepare(picture) for picture in PICTURES])
    tiny.assert_close(
        network.features(PICTURES, 2), references.clip_image_features(model, prepared)
    )
    ids, mask = tiny.tokens(text)
    want, want_pooled = references.clip_text_features(model, ids)
    names = clip_files.text_map(tiny.text_shapes(CLIPText(text)))
    params, _ = read_tree(tmp_path, names, "float32")
    out, pooled = tiny.run(CLIPText(text), params, ids, mask)
    tiny.assert_close(out[mask], want[mask])
    tiny.assert_close(pooled, want_pooled)


def test_clip_l14(references):
    """Catches differences from transformers in a large tower of three layers."""
    model = references.clip(SHORT_L14, CLIPTextConfig(64, 1, 1, 768, vocab_size=50))
    network = CLIPImage(SHORT_L14)
    names = clip_files.image_map(tiny.image_shapes(network, 224))
    prepared = np.stack([preprocessing.clip(picture, 224) for picture in PICTURES])
    out = tiny.run(network, tiny.as_params(names, tiny.random_weights(names)), prepared)
    tiny.assert_close(out, references.clip_image_features(model, prepared))


def test_clip_preprocessing():
    """Catches another filter, rounding, crop, mean or deviation than transformers' for CLIP.

    Where an odd number of pixels is cut, transformers crops one pixel beside OpenAI's crop.
    """
    pytest.importorskip("torch")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    )
    for shape in ((224, 224), (256, 256), (64, 64), (448, 320), (200, 402)):
        image = tiny.picture(*shape)
        want = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]
        out = preprocessing.clip(image, 224)
        np.testing.assert_allclose(out, want.transpose(1, 2, 0), rtol=0, atol=1e-5)


def test_dinov2(tmp_path, references):
    """Catches differences from transformers' ViT-B/14 that small sizes hide, but for the scale of
    the position embeddings, which follows Meta's code (test_positions).
    """
    config = DINOv2Config(768, 12, 12, offset=0.0)
    model = references.dinov2(config)
    model.save_pretrained(tmp_path)
    network = DINOv2(config)
    names = feature_networks.dinov2(tiny.image_shapes(network, 224))
    params, _ = read_tree(tmp_path, names, "float32")
    prepared = np.stack([preprocessing.dinov2(picture) for picture in PICTURES])
    tiny.assert_close(
        tiny.run(network, params, prepared), references.dinov2_features(model, prepared)
    )
    tiny.assert_close(
        load("dinov2-b14", str(tmp_path), one).features(PICTURES, 2),
        tiny.run(DINOv2(NETWORKS["dinov2-b14"].network.config), params, prepared),
    )


@pytest.mark.parametrize("target", [5, 16, 24, 40])
def test_positions(target, torch):
    """Catches sizes at which position embeddings are not resized as torch resizes them."""
    eye = torch.eye(37)[None, :, :, None]
    for offset in (0.0, 0.1):
        scale = ((target + offset) / 37, 1.0)
        want = torch.nn.functional.interpolate(eye, scale_factor=scale, mode="bicubic")
        out = resize_matrix(37, target, offset)
        np.testing.assert_allclose(out, want[0, :, :, 0].T.numpy(), rtol=0, atol=1e-5)


def test_efficientnet_lite(references):
    """Catches a difference from torch with the trained weights."""
    path, _ = find_weights("efficientnet-lite0", NETWORKS["efficientnet-lite0"], "")
    with TorchFile(path) as file:
        state = {name: file.read(name) for name in file.shapes}
    network = load("efficientnet-lite0", "", one)
    prepared = np.stack([network.prepare(picture) for picture in PICTURES])
    want = references.efficientnet_lite_features(state, prepared, LITE0)
    tiny.assert_close(network.features(PICTURES, 2), want)
