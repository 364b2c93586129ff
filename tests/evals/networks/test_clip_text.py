"""Captions to CLIP features: loading, order, long captions."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from imagen_jax import sharding
from imagen_jax.evals.networks import clip_text
from imagen_jax.text.clip import CLIPText, CLIPTextConfig
from imagen_jax.weights import clip_files
from tests.evals.networks import tiny
from tests.weights.test_clip_files import vocabulary, write_tokenizer

CONFIG = CLIPTextConfig(24, 2, 3, 12, vocab_size=len(vocabulary()), max_length=9)


@pytest.fixture(name="directory")
def tiny_clip(tmp_path, monkeypatch):
    """A directory with a small text tower, which "clip-b32" stands for."""
    monkeypatch.setitem(clip_text.TOWERS, "clip-b32", CONFIG)
    directory = write_tokenizer(tmp_path / "clip", "vocab.json")
    names = clip_files.text_map(tiny.text_shapes(CLIPText(CONFIG)))
    save_file(tiny.random_weights(names), directory / "model.safetensors")
    return directory


def on(devices, fsdp=1):
    return lambda size: sharding.batch_mesh(jax.devices()[:devices], fsdp)


def test_a_row_depends_on_its_caption_alone(directory):
    """Catches padding that is returned, captions out of order, a mask of another length, features
    per token instead of the pooled vector, and parameters that are sharded wrongly.
    """
    network = clip_text.load("clip-b32", str(directory))
    captions = ["a red apple", "red", "", "apple " * 50, "red apple red"] * 2 + ["a"]
    out = network.features(captions, batch_size=1)
    assert out.shape == (11, 12) and out.dtype == np.float32
    np.testing.assert_array_equal(out[:5], out[5:10])
    np.testing.assert_array_equal(network.features(captions[::-1], 1), out[::-1])
    rows = {caption: network.features([caption], 1)[0] for caption in captions}
    np.testing.assert_array_equal(out, np.stack([rows[caption] for caption in captions]))
    for mesh in (on(1), on(8, 4)):
        other = clip_text.load("clip-b32", str(directory), mesh).features(captions, 2)
        np.testing.assert_allclose(other, out, rtol=1e-5, atol=1e-5)
    names = clip_files.text_map(tiny.text_shapes(CLIPText(CONFIG)))
    ids = vocabulary()
    row = np.array([[ids[p] for p in ("<|startoftext|>", "red</w>", "<|endoftext|>")]], np.int32)
    params = tiny.as_params(names, tiny.random_weights(names))
    _, pooled = tiny.run(CLIPText(CONFIG), params, row, np.ones((1, 3), bool))
    np.testing.assert_allclose(out[1:2], pooled, rtol=1e-4, atol=1e-5)


def test_identity(directory):
    """Catches an identity without the tokenizer or the cut, which both change the score."""
    network = clip_text.load("clip-b32", str(directory), on(1))
    identity = json.loads(json.dumps(network.identity))
    assert identity["network"] == "clip-b32" and identity["max_length"] == 9
    assert len({identity[f] for f in ("sha256", "weights_sha256", "tokenizer_sha256")}) == 3


def test_errors(directory, monkeypatch):
    """Catches tracebacks of libraries."""
    with pytest.raises(ValueError, match="choose one of clip-b32"):
        clip_text.load("dinov2-b14", str(directory))
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        clip_text.load("clip-b32", str(directory / "model.safetensors"))
    with pytest.raises(ValueError, match="no captions"):
        clip_text.load("clip-b32", str(directory), on(1)).features([])
    monkeypatch.setitem(clip_text.TOWERS, "clip-b32", CLIPTextConfig(24, 2, 3, 12, vocab_size=9))
    with pytest.raises(ValueError, match=r"tokens, clip-b32 has 9"):
        clip_text.load("clip-b32", str(directory), on(1))
