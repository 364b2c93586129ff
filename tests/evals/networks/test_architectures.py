"""The image networks against torch: small ones by goldens, full-size ones by `make parity`."""

import jax
import numpy as np
import pytest

from imagen_jax.evals.networks import clip_text, dinov2
from imagen_jax.evals.networks.network import NETWORKS
from imagen_jax.text.clip import CLIPText
from tests.evals.networks import tiny

# Parameters of the published models. CLIP has 151,277,313, 427,616,513 and 427,944,193, of which
# one is the scale of its logits. DINOv2 has a mask token more. Inception v3 has 23,834,568 without
# its auxiliary head, of which 2,049,000 are the classifier's.
IMAGE_SIZES = {
    "inception": 23_834_568 - 2_049_000,
    "clip-b32": 87_849_216,
    "clip-l14": 303_966_208,
    "clip-l14-336": 304_293_888,
    "dinov2-b14": 86_580_480 - 768,
    "dinov2-l14": 304_368_640 - 1024,
}
TEXT_SIZES = {
    "clip-b32": 151_277_313 - 1 - 87_849_216,
    "clip-l14": 427_616_513 - 1 - 303_966_208,
    "clip-l14-336": 427_944_193 - 1 - 304_293_888,
}


def count(shapes) -> int:
    """Parameters without the stored statistics of batch norms."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return sum(leaf.size for path, leaf in leaves if path[-1].key not in ("mean", "var"))


@pytest.mark.parametrize("name", IMAGE_SIZES)
def test_parameter_counts(name):
    """Catches a size, width, depth or number of heads that the published model does not have."""
    kind = NETWORKS[name]
    assert count(tiny.image_shapes(kind.network, kind.size)) == IMAGE_SIZES[name]
    if name != "inception":
        assert kind.network.config.width == 64 * kind.network.config.heads
    if name in TEXT_SIZES:
        config = clip_text.TOWERS[name]
        assert count(tiny.text_shapes(CLIPText(config))) == TEXT_SIZES[name]
        assert config.width == 64 * config.heads


@pytest.mark.parametrize("name", tiny.NETWORKS)
def test_features_equal_the_reference(name):
    """Catches another padding, pool, epsilon, activation, norm, branch order, name or transposition
    than torch-fidelity's and transformers'.
    """
    network, size, _ = tiny.NETWORKS[name]
    out = tiny.run(network, tiny.random_params(name), tiny.images(size))
    tiny.assert_close(out, np.load(tiny.GOLDENS)[name])


def test_positions_are_resized_as_by_meta():
    """Catches Hugging Face's scale, antialiasing, another cubic kernel, and wrong borders."""
    want = np.load(tiny.GOLDENS)["bicubic_37_16"]
    np.testing.assert_allclose(dinov2.resize_matrix(37, 16, 0.1), want, rtol=0, atol=1e-5)
    assert np.abs(dinov2.resize_matrix(37, 16, 0.0) - want).max() > 0.01
    np.testing.assert_array_equal(dinov2.resize_matrix(37, 37, 0.1), np.eye(37))
    assert all(NETWORKS[name].network.config.offset == 0.1 for name in ("dinov2-b14", "dinov2-l14"))
