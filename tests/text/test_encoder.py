"""The interface of text encoders and its Flax implementation: order, batches, meshes."""

import inspect
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from imagen_jax.sharding import batch_mesh
from imagen_jax.text.encoder import FlaxEncoder, TextEncoder, bucket_length
from imagen_jax.text.program import parameter_shapes
from imagen_jax.text.t5_network import T5Config, T5Encoder
from imagen_jax.weights.t5_files import load_tokenizer, save_encoder
from imagen_jax.weights.text_encoders import encode_program, load_text_encoder, one_device
from tests.data.synthetic_source import FakeEncoder
from tests.text.random_t5 import TOKENIZER, as_params, random_weights

CONFIG = T5Config(d_model=32, d_ff=48, d_kv=8, num_heads=3, num_layers=3, vocab_size=128)
CAPTIONS = [
    "a red apple on a blue plate",
    "",
    "two green birds",
    "a woman doctor with dark skin tone, a man riding a brown horse",
    "moon",
]


class Lengths:
    """A tokenizer with begin and end of sequence; the id of a word is its length."""

    eos_token_id = 9

    def __call__(self, texts, verbose):
        return {"input_ids": [[8, *map(len, text.split()), 9] for text in texts]}


class MeanOfText(nn.Module):
    """A network unlike T5: rows of the table minus their mean over the text."""

    @nn.compact
    def __call__(self, tokens, mask):
        table = self.param("token_embedding", nn.initializers.normal(1.0), (10, 4), jnp.float32)
        x, valid = table[tokens], mask[:, :, None]
        mean = (x * valid).sum(1, keepdims=True) / valid.sum(1, keepdims=True)
        return x - mean


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("encoders") / "random_t5"
    params = as_params(CONFIG, random_weights(CONFIG, 5))
    save_encoder(path, CONFIG, params, load_tokenizer(TOKENIZER)[0], "float32")
    return path


@pytest.fixture(scope="module")
def encoder(directory) -> FlaxEncoder:
    return load_text_encoder(str(directory), max_length=20, dtype="float32")


def equal_up_to_rounding(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        x, y = x.astype(np.float32), y.astype(np.float32)
        np.testing.assert_allclose(x, y, rtol=2**-7, atol=1e-4)  # one bf16 step


def test_every_encoder_has_the_interface(encoder):
    """Catches a fake encoder with other arguments than the real one, and an empty interface."""
    for one in (encoder, FakeEncoder()):
        assert isinstance(one, TextEncoder)
        for method in ("tokenize", "unknown", "encode", "encode_pooled"):
            wanted = inspect.signature(getattr(TextEncoder, method)).parameters
            result = inspect.signature(getattr(type(one), method)).parameters
            assert list(result) == list(wanted)
            assert [p.default for p in result.values()] == [p.default for p in wanted.values()]
    assert not isinstance(load_tokenizer(TOKENIZER)[0], TextEncoder)


def test_every_encoder_keeps_its_promises(encoder):
    """Catches an implementation with padded, reordered or float32 features, or none for ""."""
    for one in (encoder, FakeEncoder(max_length=4)):
        rows, cut = one.tokenize(CAPTIONS)
        features = one.encode(CAPTIONS, batch_size=2, fill=True)
        lengths = [len(row) for row in rows]
        assert [f.shape for f in features] == [(length, one.dim) for length in lengths]
        assert {f.dtype for f in features} == {np.dtype(ml_dtypes.bfloat16)}
        assert min(lengths) == 1 and max(lengths) == one.max_length and any(cut)
        equal_up_to_rounding(one.encode(CAPTIONS[::-1], batch_size=3)[::-1], features)
        assert {"name", "weights_sha256", "max_length", "dtype", "dim"} <= one.identity.keys()


def test_a_network_that_is_not_t5():
    """Catches code that assumes T5's sizes, parameters or tokenizer, and an unused mask."""
    network = MeanOfText()
    shapes = parameter_shapes(network, "float32")
    table = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    program = encode_program(network, shapes, one_device(0))
    identity = {"dim": 4, "max_length": 5}
    encoder = FlaxEncoder(program, {"token_embedding": table}, Lengths(), identity)
    assert encoder.tokenize(["a red apple or two"]) == ([[8, 1, 3, 5, 9]], [True])
    texts = ["a red apple or two", "", "moon"]
    want = [table[row] - table[row].mean(0) for row in encoder.tokenize(texts)[0]]
    equal_up_to_rounding(encoder.encode(texts, batch_size=2), want)


def test_features_are_those_of_the_model(encoder):
    """Catches texts that are reordered, padded, cut short, or attend to padding."""
    params = as_params(CONFIG, random_weights(CONFIG, 5))
    apply = jax.jit(T5Encoder(CONFIG).apply)
    rows, _ = encoder.tokenize(CAPTIONS)
    features = encoder.encode(CAPTIONS, batch_size=2)
    for row, feature in zip(rows, features, strict=True):
        assert feature.dtype == ml_dtypes.bfloat16 and feature.shape == (len(row), encoder.dim)
        tokens = jnp.array([row])
        want = apply({"params": params}, tokens, jnp.ones_like(tokens, bool))[0]
        equal_up_to_rounding([feature], [np.asarray(want)])


def test_batch_mates_and_batch_size_change_nothing(encoder):
    """Catches a feature that depends on other texts, on their number, or on the padded length."""
    together = encoder.encode(CAPTIONS, batch_size=8)
    alone = [encoder.encode([text], batch_size=1)[0] for text in CAPTIONS]
    equal_up_to_rounding(together, alone)
    equal_up_to_rounding(together, encoder.encode(CAPTIONS[::-1], batch_size=3)[::-1])
    again = encoder.encode(CAPTIONS, batch_size=8)
    for a, b in zip(together, again, strict=True):
        np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))


def test_truncation_is_reported_and_keeps_the_end(encoder, directory):
    """Catches a long caption that loses end-of-sequence, is one token short or is not reported."""
    rows, truncated = encoder.tokenize(CAPTIONS)
    assert truncated == [False, False, False, True, False]
    assert [len(row) <= 20 and row[-1] == 1 and row.count(1) == 1 for row in rows] == [True] * 5
    assert rows[1] == [1]
    longest = load_text_encoder(str(directory), max_length=200).tokenize(CAPTIONS)
    assert rows[3] == longest[0][3][:19] + [1] and not any(longest[1])
    exact = load_text_encoder(str(directory), max_length=len(rows[0])).tokenize(CAPTIONS)
    assert exact[0][0] == rows[0] and not exact[1][0]
    assert encoder.encode([], 4) == []
    with pytest.raises(ValueError, match="batch_size 0"):
        encoder.encode(["a"], 0)


def test_filled_batches_run_one_program(directory):
    """Catches a text that another program encodes when it comes alone, with other rounding."""
    fresh = load_text_encoder(str(directory), max_length=32)
    together = fresh.encode(["moon", "a sun", "stars"], batch_size=8, fill=True)
    alone = fresh.encode(["a sun"], batch_size=8, fill=True)
    np.testing.assert_array_equal(together[1], alone[0])
    assert fresh._program.apply._cache_size() == 1


def test_few_programs_are_compiled(directory):
    """Catches one program per length or per number of texts."""
    lengths = (1, 16, 17, 32, 33, 65, 100)
    assert [bucket_length(n, 100) for n in lengths] == [16, 16, 32, 32, 64, 100, 100]
    assert bucket_length(5, 7) == 7
    fresh = load_text_encoder(str(directory), max_length=32)
    fresh.encode(["a " * n for n in range(24)] * 3, batch_size=8)
    fresh.encode(["moon"] * 5, batch_size=8)  # run as eight
    assert fresh._program.apply._cache_size() == 2


@pytest.mark.parametrize(("fsdp", "devices"), [(1, 1), (4, 8)])
def test_rows_of_a_batch(directory, monkeypatch, fsdp, devices):
    """Catches as many long rows as short ones, idle devices, and a batch size for all devices
    together.
    """
    batches, run = [], FlaxEncoder._run

    def noting(self, rows, size, length):
        batches.append((size, length))
        return run(self, rows, size, length)

    monkeypatch.setattr(FlaxEncoder, "_run", noting)
    mesh = batch_mesh(jax.devices()[:devices], fsdp)
    encoder = load_text_encoder(str(directory), 128, "float32", lambda weights: mesh)
    texts = ["moon"] * 9 * devices + ["two green birds " * 20] * 9 * devices
    assert len({len(feature) for feature in encoder.encode(texts, batch_size=8)}) == 2
    assert batches == [(8 * devices, 16)] + [(8 * devices, 16)] + [(2 * devices, 128)] * 5
    batches.clear()
    encoder.encode(texts[:3], batch_size=8)
    encoder.encode(texts[-3:], batch_size=8, fill=True)
    assert batches == [(4 * devices, 16), (8 * devices, 128)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_of_devices_changes_no_bit(directory, dtype):
    """Catches rows of a device that depend on how many there are, so that a resumed run differs."""
    texts = [f"{'two green birds ' * (n % 17)}number {n}" for n in range(150)]
    features = [
        load_text_encoder(
            str(directory), 64, dtype, lambda weights: batch_mesh(jax.devices()[:devices], 1)
        ).encode(texts, batch_size=8)
        for devices in (1, 2, 8)
    ]
    for one, two, eight in zip(*features):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, eight)


@pytest.mark.parametrize(("fsdp", "batch_size"), [(1, 8), (4, 3), (8, 20)])
def test_mesh_changes_nothing(encoder, directory, fsdp, batch_size):
    """Catches sharded weights or a sharded batch that change the features."""
    mesh = batch_mesh(jax.devices(), fsdp)
    sharded = load_text_encoder(str(directory), 20, "float32", lambda weights: mesh)
    texts = CAPTIONS * 2
    equal_up_to_rounding(sharded.encode(texts, batch_size), encoder.encode(texts, batch_size))
