"""BERT and CLIP's text tower as encoders against transformers: layers, pooled vectors, padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.text.bert_network import BertConfig
from imagen_jax.text.choice import DEFAULT, Choice
from imagen_jax.text.clip import CLIPTextConfig
from tests.text import random_encoders
from tests.text.random_encoders import (
    BERTS,
    CLIPS,
    GOLDENS,
    SEED,
    network_of,
    random_params,
    random_tokens,
)

CASES = BERTS | CLIPS


@functools.cache
def program(config, dtype):
    return jax.jit(network_of(config, dtype).apply)


def run(config, tokens, mask, seed=SEED, dtype="float32"):
    features, pooled = program(config, dtype)({"params": random_params(config, seed)}, tokens, mask)
    return np.asarray(features), np.asarray(pooled)


def assert_close(out: np.ndarray, want: np.ndarray) -> None:
    assert out.shape == want.shape and 0.5 < want.std() < 4
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5 * max(1, want.std()))


def choices_of(config) -> list[Choice]:
    """Every layer, and every pooling and norm of the last two."""
    layers = [Choice(layer=layer) for layer in range(4)]
    if isinstance(config, BertConfig):
        return [*layers, Choice(pooling="mean")]
    ends = [Choice(layer=-1, final_norm=False), Choice(final_norm=True), Choice(pooling="end")]
    return [*layers, *ends]


def wanted(config, found, mask):
    """The features and pooled vectors that `config` chooses of a result of torch_encoders.run."""
    states, last = found["states"], found["last"]
    rows = np.arange(len(mask))
    if isinstance(config, BertConfig):
        means = [row[: n.sum()].mean(0) for row, n in zip(last, mask)]
        return states[config.layer], np.stack(means) if config.pooling == "mean" else last[:, 0]
    # The final norm of transformers, by hand: it applies it to the last layer only.
    state = states[config.layer]
    if config.final_norm:
        params = random_params(config)["final_norm"]
        centred = state - state.mean(-1, keepdims=True)
        state = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        state = state * params["scale"] + params["bias"]
    pooled = last[rows, mask.sum(1) - 1] if config.pooling == "end" else found["pooled"]
    return state, pooled


@pytest.mark.parametrize("case", CASES)
def test_features_equal_the_reference(case):
    """Catches another norm, activation, epsilon, mask, layer or pooling than transformers'."""
    golden = np.load(GOLDENS)
    found = {name.split("/")[1]: golden[name] for name in golden if name.startswith(f"{case}/")}
    tokens, mask = random_tokens(CASES[case].vocab_size)
    configs = [CASES[case].with_choice(choice) for choice in choices_of(CASES[case])]
    # One program, in which XLA computes what the choices share once.
    apply = jax.jit(lambda *inputs: [network_of(config).apply(*inputs) for config in configs])
    results = apply({"params": random_params(CASES[case])}, tokens, mask)
    for config, result in zip(configs, jax.tree.map(np.asarray, results)):
        features, pooled = result
        want, want_pooled = wanted(config, found, mask)
        assert_close(features[mask], want[mask])
        assert_close(pooled, want_pooled)
        assert features.shape[-1] == config.dim and pooled.shape[-1] == config.pooled_dim


def test_default_features():
    """Catches another default than the paper's penultimate layer for CLIP, the last for BERT."""
    clip, bert = CLIPS["exact"].with_choice(DEFAULT), BERTS["bert"].with_choice(DEFAULT)
    assert clip.identity == {
        "family": "clip",
        "activation": "gelu",
        "layer": 2,
        "final_norm": False,
        "pooling": "projected",
        "pooled_dim": 10,
    }
    assert bert.identity == {"family": "bert", "layer": 3, "pooling": "cls", "pooled_dim": 24}
    last = CLIPS["exact"].with_choice(Choice(layer=-1, pooling="end"))
    assert (last.layer, last.final_norm, last.pooled_dim) == (3, True, 24)
    # The config that evaluations use, without a choice, has the features of the last layer.
    assert CLIPS["exact"].identity == last.identity | {"pooling": "projected", "pooled_dim": 10}


@pytest.mark.parametrize("case", ["bert", "quick"])
def test_padding_changes_nothing(case):
    """Catches padding that is attended to or pooled, and a text that depends on its neighbours."""
    config = CASES[case].with_choice(Choice(pooling="mean") if case == "bert" else DEFAULT)
    tokens, mask = random_tokens(config.vocab_size)
    features, pooled = run(config, tokens, mask)
    features_2, pooled_2 = run(config, np.where(mask, tokens, 7), mask)
    np.testing.assert_array_equal(pooled_2, pooled)
    np.testing.assert_array_equal(features_2[mask], features[mask])
    short, alone = run(config, tokens[1:2, :5], mask[1:2, :5])
    np.testing.assert_allclose(short[0], features[1, :5], rtol=0, atol=1e-5)
    np.testing.assert_allclose(alone[0], pooled[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["bert", "quick"])
def test_order_matters(case):
    """Catches dropped positions: 'red on blue' and 'blue on red' would have the same features."""
    config = CASES[case].with_choice(Choice(pooling="mean") if case == "bert" else DEFAULT)
    tokens, mask = random_tokens(config.vocab_size)
    swapped = tokens[:, [0, 2, 1, *range(3, 12)]]
    difference = run(config, tokens, mask)[0] - run(config, swapped, mask)[0]
    assert np.abs(difference[0, 11]).max() > 0.05


@pytest.mark.parametrize("case", ["bert", "quick"])
def test_bfloat16_stays_close(case):
    """Catches a residual or norm of bfloat16, and a dtype that is not used."""
    config = CASES[case].with_choice(DEFAULT)
    tokens, mask = random_tokens(config.vocab_size)
    exact, half = (run(config, tokens, mask, dtype=d)[0][mask] for d in ("float32", "bfloat16"))
    error = np.std(half.astype(np.float32) - exact) / np.std(exact)
    assert half.dtype == jnp.float32 and 1e-3 < error < 0.012


@pytest.mark.parity
@pytest.mark.parametrize("end", ["id", "largest"])
@pytest.mark.parametrize("seed", range(4))
def test_clip_equals_transformers(seed, end):
    """Catches differences that the sizes of the goldens hide, and another end-of-text token, also
    where a config of before 2023 has eos_token_id 2 and transformers takes the largest id.
    """
    torch_encoders = pytest.importorskip("tests.text.torch_encoders")
    rng = np.random.RandomState(100 + seed)
    heads = int(rng.randint(1, 5))
    config = CLIPTextConfig(
        width=heads * int(rng.choice([4, 8, 13])),
        layers=int(rng.randint(1, 6)),
        heads=heads,
        projection_dim=int(rng.randint(4, 40)),
        vocab_size=int(rng.randint(30, 200)),
        max_length=77,
        activation=["quick_gelu", "gelu"][seed % 2],
    )
    fields = {"eos_token_id": 2} if end == "largest" else {}
    made = torch_encoders.model(config, seed, **fields)
    compare_all(config, made, random_tokens(config.vocab_size, (77, 30, 2), seed), seed)


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(4))
def test_bert_equals_transformers(seed):
    """Catches differences that the sizes of the goldens hide: sizes are drawn by seed."""
    torch_encoders = pytest.importorskip("tests.text.torch_encoders")
    rng = np.random.RandomState(100 + seed)
    heads = int(rng.randint(1, 5))
    config = BertConfig(
        hidden_size=heads * int(rng.choice([4, 8, 13])),
        num_hidden_layers=int(rng.randint(1, 6)),
        num_attention_heads=heads,
        intermediate_size=int(rng.randint(10, 100)),
        vocab_size=int(rng.randint(30, 200)),
    )
    made = torch_encoders.model(config, seed)
    compare_all(config, made, random_tokens(config.vocab_size, (150, 61, 2, 1), seed), seed)


@pytest.mark.parity
@pytest.mark.parametrize("case", ["bert-base", "clip-b32", "clip-l14", "clip-bigg"])
def test_published_widths_equal_transformers(case):
    """Catches a head size, width or activation that is wrong only in the published sizes.

    Two layers and a small vocabulary: the others repeat them.
    """
    torch_encoders = pytest.importorskip("tests.text.torch_encoders")
    from imagen_jax.text.sizes import SIZES

    depth = "num_hidden_layers" if case == "bert-base" else "layers"
    config = dataclasses.replace(SIZES[case], vocab_size=100, **{depth: 2})
    made = torch_encoders.model(config, SEED)
    compare_all(config, made, random_tokens(100, (77, 9)), SEED, last=2)


def compare_all(config, made, inputs, seed, last=None) -> None:
    """Compares the features of every layer and every pooled vector with transformers'."""
    from tests.text import torch_encoders

    found = torch_encoders.run(made, *inputs)
    mask = inputs[1]
    for layer in range(len(found["states"])) if last is None else (last,):
        chosen = config.with_choice(Choice(layer=layer))
        if isinstance(config, CLIPTextConfig):
            chosen = dataclasses.replace(chosen, final_norm=False)
        features, pooled = run(chosen, *inputs, seed)
        assert_close(features[mask], found["states"][layer][mask])
        want = found["pooled"] if "pooled" in found else found["last"][:, 0]
        assert_close(pooled, want)
    if isinstance(config, CLIPTextConfig):
        features, _ = run(config.with_choice(Choice(layer=-1)), *inputs, seed)
        assert_close(features[mask], found["last"][mask])


def test_random_encoders_have_every_tensor():
    """Catches a helper that gives two tensors the same values, which would hide swapped names."""
    for config in CASES.values():
        values = [x.ravel()[:6] for x in random_encoders.random_weights(config).values()]
        assert len({x.tobytes() for x in values}) == len(values)
