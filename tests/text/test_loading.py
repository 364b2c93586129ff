"""Loading and writing encoders: every file layout gives the same parameters, and what is wrong is named."""

import json
import pathlib
import shutil
import tracemalloc

import jax
import numpy as np
import pytest

from imagen_jax.text import loading
from imagen_jax.text.loading import find_encoder, load_params, save_encoder
from imagen_jax.text.program import EncodeProgram, make_mesh
from imagen_jax.text.t5 import T5Config
from tests.weights import torch_files
from tests.text.random_t5 import CASES, GOLDENS, TOKENIZER, as_params, random_weights, write_encoder

CONFIG = T5Config(**CASES["deep"][0])


def assert_same(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def shard(directory: pathlib.Path, weights: dict, suffix: str, count: int = 3) -> None:
    """Writes `weights` as shards with an index, like a checkpoint too large for one file."""
    from safetensors.numpy import save_file

    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG.to_json()))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = {name: f"{stem}-{i % count}.{suffix}" for i, name in enumerate(weights)}
    for file in set(index.values()):
        part = {name: weights[name] for name in weights if index[name] == file}
        save_file(part, directory / file) if suffix == "safetensors" else torch_files.write(directory / file, *torch_files.plain(part))
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))


def layouts(tmp_path: pathlib.Path, weights: dict) -> dict[str, pathlib.Path]:
    """The same encoder in the four published layouts."""
    found = {name: tmp_path / name for name in ("safetensors", "safetensors shards", "bin", "bin shards")}
    write_encoder(found["safetensors"], CONFIG, weights)
    shard(found["safetensors shards"], weights, "safetensors")
    shard(found["bin shards"], weights, "bin")
    found["bin"].mkdir()
    torch_files.write(found["bin"] / "pytorch_model.bin", *torch_files.plain(weights))
    return found


def test_all_layouts_load_alike(tmp_path):
    """Fails for a swapped or untransposed kernel in any layout, or an identity that depends on how the same weights are stored."""
    weights = random_weights(CONFIG, 3)
    digests = set()
    for directory in layouts(tmp_path, weights).values():
        params, digest = load_params(directory, CONFIG, "float32")
        assert_same(params, as_params(CONFIG, weights))
        digests.add(digest)
    assert len(digests) == 1
    weights["encoder.final_layer_norm.weight"][3] += 1e-6
    write_encoder(tmp_path / "other", CONFIG, weights)
    assert load_params(tmp_path / "other", CONFIG, "float32")[1] not in digests


def test_full_checkpoint_by_torch_without_its_decoder_shard(monkeypatch):
    """Fails if a decoder tensor is read, or its absent shard is asked for (encoder and decoder written by torch 2.13)."""
    directory = GOLDENS / "t5_bin"
    config = T5Config.from_json(directory / "config.json")
    index = json.loads((directory / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert any(not (directory / file).exists() for file in index.values())
    read, original = [], loading.TorchFile.read
    monkeypatch.setattr(loading.TorchFile, "read", lambda self, name: read.append(name) or original(self, name))
    params, _ = load_params(directory, config, "float32")
    assert_same(params, as_params(config, random_weights(config, 7)))
    assert len(read) == len(set(read)) == len(loading.slots(config))
    assert not any("decoder" in name or "lm_head" in name for name in read)


def test_embedding_under_its_other_name(tmp_path):
    """Fails for encoder-only files that name the embedding encoder.embed_tokens.weight, or where both names are taken for a surplus."""
    weights = random_weights(CONFIG, 3)
    alias = {"encoder.embed_tokens.weight" if n == "shared.weight" else n: w for n, w in weights.items()}
    for variant in (alias, alias | {"shared.weight": weights["shared.weight"].copy()}):
        params, _ = load_params(write_encoder(tmp_path / "x", CONFIG, variant), CONFIG, "float32")
        assert_same(params, as_params(CONFIG, weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("encoder.block.2.layer.1.DenseReluDense.wi_1.weight"), "lacks encoder.block.2.layer.1.DenseReluDense.wi_1.weight"),
        (lambda w: w.update({"encoder.block.4.layer.0.SelfAttention.q.weight": w["shared.weight"]}), "unexpected encoder.block.4"),
        (lambda w: w.update({"encoder.block.1.layer.0.SelfAttention.q.weight": w["shared.weight"]}), r"SelfAttention.q.weight is \(100, 32\)"),
        (lambda w: w.update({"encoder.final_layer_norm.weight": np.ones(32, np.int32)}), "final_layer_norm.weight is int32"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    """Fails if a missing, extra, misshapen or integer tensor is filled in, ignored or reported without its name."""
    weights = random_weights(CONFIG, 3)
    change(weights)
    with pytest.raises(ValueError, match=message):
        load_params(write_encoder(tmp_path, CONFIG, weights), CONFIG, "float32")


def test_absent_files_are_named(tmp_path):
    """Fails if a directory without weights, or a lost shard, ends in anything but one clear line."""
    with pytest.raises(FileNotFoundError, match="has no weights: none of model.safetensors"):
        load_params(tmp_path, CONFIG, "float32")
    shard(tmp_path, random_weights(CONFIG, 3), "safetensors")
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names the shard 'model-1.safetensors'"):
        load_params(tmp_path, CONFIG, "float32")
    index = {"weight_map": {"shared.weight": f"../{tmp_path.name}/model-0.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="which is not in"):
        load_params(tmp_path, CONFIG, "float32")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_params(tmp_path, CONFIG, "float32")


@pytest.mark.parametrize("kind", ["safetensors", "bin shards"])
def test_never_twice_in_memory(tmp_path, kind):
    """Fails if the whole checkpoint is read before it is cast: beside the result only a few copies of one tensor may exist."""
    config = T5Config(d_model=256, d_ff=512, d_kv=32, num_heads=8, num_layers=12, vocab_size=300)
    weights = random_weights(config, 0)
    largest, total = (f(w.nbytes for w in weights.values()) for f in (max, sum))
    if kind == "safetensors":
        write_encoder(tmp_path, config, weights)
    else:
        shard(tmp_path, weights, "bin")
    del weights
    tracemalloc.start()
    load_params(tmp_path, config, "float32")  # once untraced by what it imports
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    params, _ = load_params(tmp_path, config, "bfloat16")
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == total // 2
    assert peak < total // 2 + 4 * largest < total


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_born_sharded(tmp_path, dtype):
    """Fails if a mesh leaves the weights whole on each device, splits the smaller dimension, or changes a value."""
    directory = write_encoder(tmp_path, CONFIG, random_weights(CONFIG, 3))
    whole, _ = load_params(directory, CONFIG, dtype)
    parts, _ = load_params(directory, CONFIG, dtype, EncodeProgram.create(CONFIG, dtype, make_mesh(jax.devices(), fsdp=8)).params)
    assert_same(jax.tree.map(np.asarray, parts), jax.tree.map(np.asarray, whole))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(parts)} == {dtype}
    assert parts["block_0"]["mlp"]["gate"]["kernel"].sharding.spec == jax.P(None, "fsdp")  # [32, 48]: the larger one
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(parts))
    assert held < 1.1 / 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(whole))


def tokenizer():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(TOKENIZER)


def test_written_encoder_loads_again(tmp_path):
    """Fails if writing forgets a transpose, the config or the tokenizer, or rounds when asked for fp32."""
    params = as_params(CONFIG, random_weights(CONFIG, 3))
    save_encoder(tmp_path, CONFIG, params, tokenizer(), "float32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert T5Config.from_json(tmp_path / "config.json") == CONFIG
    assert_same(load_params(tmp_path, CONFIG, "float32")[0], params)
    save_encoder(tmp_path, CONFIG, params, tokenizer())
    half = jax.tree.map(lambda x: np.asarray(jax.numpy.asarray(x, "bfloat16")), params)
    assert_same(load_params(tmp_path, CONFIG, "bfloat16")[0], half)


@pytest.mark.parity
def test_transformers_reads_what_we_write(tmp_path):
    """Fails if the written directory is readable only here."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    weights = random_weights(CONFIG, 3)
    save_encoder(tmp_path, CONFIG, as_params(CONFIG, weights), tokenizer(), "float32")
    model, report = transformers.T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in weights.items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), value)


def fill_cache(cache: pathlib.Path, files: dict[str, pathlib.Path]) -> None:
    """A hub cache that holds someone/encoder."""
    snapshot = cache / "models--someone--encoder" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    for name, source in files.items():
        shutil.copy(source, snapshot / name)


def test_hub_name_from_the_cache(tmp_path, monkeypatch):
    """Fails if a cached encoder needs the network, its decoder shard, or both weight formats."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = {path.name: path for source in (GOLDENS / "t5_bin", TOKENIZER) for path in source.iterdir()}
    fill_cache(tmp_path, files)
    directory = find_encoder("someone/encoder")
    config = T5Config.from_json(directory / "config.json")
    assert_same(load_params(directory, config, "float32")[0], as_params(config, random_weights(config, 7)))


@pytest.mark.parametrize(
    ("lost", "message"),
    [("config.json", "not in the Hugging Face cache"), ("pytorch_model-00002-of-00003.bin", "has pytorch_model-00002"), ("tokenizer.json", "has its tokenizer"),
     ("pytorch_model.bin.index.json", "has model.safetensors or")],
)  # fmt: skip
def test_incomplete_cache_offline(tmp_path, monkeypatch, lost, message):
    """Fails if an encoder that is only half in the cache is used, or the error does not say what is absent."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files = {path.name: path for source in (GOLDENS / "t5_bin", TOKENIZER) for path in source.iterdir()}
    files.pop(lost)
    fill_cache(tmp_path, files)
    with pytest.raises(FileNotFoundError, match=message):
        find_encoder("someone/encoder")


def test_names_that_are_neither(tmp_path):
    """Fails if a mistyped path is sent to the hub."""
    for name in ("nowhere", "./a/b", str(tmp_path / "x"), "a/b/c", "~/x"):
        with pytest.raises(FileNotFoundError, match="no such directory, and not a hub name"):
            find_encoder(name)
    assert find_encoder("t5_tiny").parts[-3:] == ("imagen_jax", "assets", "t5_tiny")
    assert find_encoder(str(tmp_path)) == tmp_path
