"""The Flax T5 encoder against transformers, and the properties that the pipeline relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.text.program import parameter_shapes
from imagen_jax.text.t5_network import T5Config, T5Encoder, relative_buckets
from tests.text.random_t5 import CASES, GOLDENS, as_params, random_tokens, random_weights

SEED = 7  # of tools/make_t5_goldens.py

# v1.1 sizes: d_model, heads, d_ff, layers -> parameters without the embedding, with it (imagen-spec
# section 1)
SIZES = {
    "small": (512, 6, 1024, 8, 18_883_264, 35_332_800),
    "base": (768, 12, 2048, 12, 84_954_240, 109_628_544),
    "large": (1024, 16, 2816, 24, 308_332_032, 341_231_104),
    "xl": (2048, 32, 5120, 24, 1_157_729_280, 1_223_527_424),
    "xxl": (4096, 64, 10240, 24, 4_630_714_368, 4_762_310_656),
}
# The encoder of the original T5-11B without its embedding (imagen-spec section 1)
ORIGINAL_11B = 4_831_892_480


def run(config, params, tokens, mask, dtype=jnp.float32):
    return np.asarray(jax.jit(T5Encoder(config, dtype).apply)({"params": params}, tokens, mask))


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    """Catches an extra bias, one relative table per layer, an ungated MLP, a second embedding."""
    d_model, heads, d_ff, layers, body, total = SIZES[size]
    config = T5Config(
        d_model=d_model, d_ff=d_ff, d_kv=64, num_heads=heads, num_layers=layers, vocab_size=32128
    )
    params = parameter_shapes(T5Encoder(config), "float32")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == total
    assert count - params["token_embedding"].size == body


def test_parameter_count_of_the_original():
    """Catches a gated MLP, and heads whose size follows from the width, in the original T5."""
    config = T5Config(
        d_model=1024,
        d_ff=65_536,
        d_kv=128,
        num_heads=128,
        num_layers=24,
        vocab_size=32_128,
        feed_forward_proj="relu",
    )
    params = parameter_shapes(T5Encoder(config), "float32")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == ORIGINAL_11B + 32_128 * 1024


@pytest.mark.parametrize("case", CASES)
def test_features_equal_the_reference(case):
    """Catches a mask, bucket, GELU, epsilon, norm, attention scale or layer order that differs from
    transformers'.
    """
    fields, scale = CASES[case]
    config = T5Config(**fields)
    golden = np.load(GOLDENS / "t5_features.npz")
    tokens, mask = golden[f"{case}/tokens"], golden[f"{case}/mask"]
    out = run(config, as_params(config, random_weights(config, SEED, scale)), tokens, mask)
    want = golden[f"{case}/features"]
    assert 0.5 < want.std() < 2
    np.testing.assert_allclose(out[mask], want[mask], rtol=0, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("projection", ["gated-gelu", "relu"])
@pytest.mark.parametrize("seed", range(4))
def test_features_equal_transformers(seed, projection):
    """Catches differences that the sizes of the goldens hide: sizes are drawn by seed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.RandomState(100 + seed)
    fields = dict(
        d_model=int(rng.choice([16, 32, 64])),
        d_ff=int(rng.randint(10, 100)),
        d_kv=int(rng.randint(4, 20)),
        num_heads=int(rng.randint(1, 6)),
        num_layers=int(rng.randint(1, 6)),
        vocab_size=int(rng.randint(30, 200)),
        relative_attention_num_buckets=int(rng.choice([8, 16, 32])),
        relative_attention_max_distance=int(rng.choice([20, 64, 128])),
        feed_forward_proj=projection,
    )
    config = T5Config(**fields)
    weights = random_weights(config, seed)
    model = transformers.T5EncoderModel(transformers.T5Config(**fields)).eval()
    state = {name: torch.tensor(value) for name, value in weights.items()}
    model.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    tokens, mask = random_tokens(config, seed, (150, 61, 2, 1))
    with torch.no_grad():
        want = model(
            input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()
        ).last_hidden_state.numpy()
    np.testing.assert_allclose(
        run(config, as_params(config, weights), tokens, mask)[mask], want[mask], rtol=0, atol=1e-5
    )


def test_relative_buckets():
    """Catches the causal variant, swapped directions, another start of the log spacing, and a
    distance of 16, 32 or 64 that is rounded down.
    """
    buckets = relative_buckets(200, 32, 128)
    after = {
        0: 0,
        1: 17,
        7: 23,
        8: 24,
        11: 24,
        12: 25,
        15: 25,
        16: 26,
        22: 26,
        23: 27,
        32: 28,
        46: 29,
        64: 30,
        91: 31,
        128: 31,
        199: 31,
    }
    assert {d: int(buckets[0, d]) for d in after} == after
    assert {d: int(buckets[d, 0]) for d in after} == {
        d: b - 16 if d else 0 for d, b in after.items()
    }
    assert all(len(np.unique(np.diagonal(buckets, k))) == 1 for k in (-150, -3, 0, 9, 100))


def test_padding_changes_nothing():
    """Catches padding that is attended to, counted in a norm, or shifts positions."""
    config = T5Config(**CASES["deep"][0])
    params = as_params(config, random_weights(config, 1))
    tokens, _ = random_tokens(config, 1, (9, 9))
    short = run(config, params, tokens, np.ones((2, 9), bool))
    noise = np.random.RandomState(2).randint(0, 100, (2, 23)).astype(np.int32)
    long = run(
        config,
        params,
        np.concatenate([tokens, noise], 1),
        np.arange(32)[None, :] < np.array([[9], [9]]),
    )
    np.testing.assert_allclose(long[:, :9], short, rtol=0, atol=1e-5)


def test_position_and_order_matter():
    """Catches a dropped relative bias: 'red on blue' and 'blue on red' would be equal."""
    config = T5Config(**CASES["deep"][0])
    params = as_params(config, random_weights(config, 1))
    tokens, mask = random_tokens(config, 1, (9,))
    backwards = run(config, params, tokens[:, ::-1], mask)[:, ::-1]
    assert np.abs(run(config, params, tokens, mask) - backwards).max() > 0.05


def test_no_valid_token_is_finite():
    """Catches a mask of -inf: its softmax over padding alone is NaN."""
    config = T5Config(**CASES["deep"][0])
    out = run(
        config,
        as_params(config, random_weights(config, 1)),
        np.zeros((1, 4), np.int32),
        np.zeros((1, 4), bool),
    )
    assert np.isfinite(out).all()


def test_bfloat16_stays_close():
    """Catches a norm in bf16 (error 0.028 instead of 0.017), and bf16 that is not used."""
    config = T5Config(**CASES["deep"][0])
    params = as_params(config, random_weights(config, 1))
    tokens, mask = random_tokens(config, 1, (32, 20))
    exact, half = (
        run(config, params, tokens, mask, dtype).astype(np.float32)[mask]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    error = np.sqrt(np.mean((half - exact) ** 2) / np.mean(exact**2))
    assert 1e-3 < error < 0.022


def test_config_json():
    """Catches an original T5 taken for v1.1, an unknown MLP accepted, and other defaults for
    missing fields.
    """
    raw = dict(CASES["deep"][0], feed_forward_proj="gated-gelu")
    config = T5Config.from_json(raw)
    assert (
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
        config.layer_norm_epsilon,
    ) == (32, 128, 1e-6)
    assert T5Config.from_json(config.to_json()) == config
    original = {k: v for k, v in raw.items() if k != "feed_forward_proj"}
    for variant in (original, original | {"feed_forward_proj": "relu"}):
        config = T5Config.from_json(variant)
        assert not config.gated and T5Config.from_json(config.to_json()) == config
    for other in ("gelu", "gated-silu", None, ["relu"]):
        with pytest.raises(ValueError, match="only 'gated-gelu' .* and 'relu' .* are supported"):
            T5Config.from_json(raw | {"feed_forward_proj": other})
    with pytest.raises(ValueError, match="d_kv"):
        T5Config.from_json({k: v for k, v in raw.items() if k != "d_kv"})
