"""The text tower of CLIP against transformers, and the properties that callers rely on."""

import jax.numpy as jnp
import numpy as np

from imagen_jax.text.clip import CLIPText
from imagen_jax.weights import clip_files
from tests.evals.networks import tiny

NETWORK = CLIPText(tiny.CLIP_TEXT)


def params():
    names = clip_files.text_map(tiny.text_shapes(NETWORK))
    return tiny.as_params(names, tiny.random_weights(names))


def test_features_equal_the_reference():
    """Catches a missing causal mask, GELU instead of its quick form, another epsilon, a missing
    final norm or projection, and pooling at another token.
    """
    ids, mask = tiny.tokens()
    golden = np.load(tiny.GOLDENS)
    features, pooled = tiny.run(NETWORK, params(), ids, mask)
    tiny.assert_close(features[mask], golden["clip_text"][mask])
    tiny.assert_close(pooled, golden["clip_text_pooled"])


def test_padding_changes_nothing():
    """Catches padding that is attended to, or pooled."""
    ids, mask = tiny.tokens()
    features, pooled = tiny.run(NETWORK, params(), ids, mask)
    features_2, pooled_2 = tiny.run(NETWORK, params(), np.where(mask, ids, 5), mask)
    np.testing.assert_array_equal(pooled_2, pooled)
    np.testing.assert_array_equal(features_2[mask], features[mask])
    short, alone = tiny.run(NETWORK, params(), ids[1:2, :6], mask[1:2, :6])
    np.testing.assert_allclose(alone, pooled[1:2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(short[0], features[1, :6], rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_close():
    """Catches a norm or a residual in bfloat16, and a dtype that is not used."""
    ids, mask = tiny.tokens()
    exact, _ = tiny.run(NETWORK, params(), ids, mask)
    half, _ = tiny.run(CLIPText(tiny.CLIP_TEXT, jnp.bfloat16), params(), ids, mask)
    error = np.std(half.astype(np.float32)[mask] - exact[mask]) / np.std(exact[mask])
    assert half.dtype == jnp.bfloat16
    assert 1e-3 < error < 0.02
