"""Text encoders by name or directory: lookup, family, identity, errors in one line."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from imagen_jax.sharding import batch_mesh
from imagen_jax.text.program import parameter_shapes, weight_bytes
from imagen_jax.text.t5_network import T5Config, T5Encoder
from imagen_jax.weights.name_map import read_tree
from imagen_jax.weights.t5_files import load_tokenizer, name_map, save_encoder
from imagen_jax.weights.text_encoders import (
    find_encoder,
    load_text_encoder,
    load_tokenize,
    read_network,
)
from tests.test_storage import POINTER
from tests.text.random_t5 import GOLDENS, TOKENIZER, as_params, random_weights

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = T5Config(d_model=32, d_ff=48, d_kv=8, num_heads=3, num_layers=3, vocab_size=128)


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
    path = tmp_path / "random_t5"
    params = as_params(CONFIG, random_weights(CONFIG, 5))
    save_encoder(path, CONFIG, params, load_tokenizer(TOKENIZER)[0], "float32")
    return path


def rewrite(file: pathlib.Path, change) -> None:
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def test_identity(directory, tmp_path):
    """Catches an identity that ignores weights, tokenizer, length or precision, or depends on the
    path.
    """
    identity = load_text_encoder(str(directory), 20, "float32").identity
    moved = tmp_path / "elsewhere" / "random_t5"
    shutil.copytree(directory, moved)
    assert load_text_encoder(str(moved), 20, "float32").identity == identity
    keys = {"name", "weights_sha256", "tokenizer_sha256", "max_length", "dtype", "dim"}
    assert identity.keys() == keys and json.loads(json.dumps(identity)) == identity
    other = load_text_encoder(str(moved), 21, "bfloat16").identity
    assert other == identity | {"max_length": 21, "dtype": "bfloat16"}

    def changed():
        now = load_text_encoder(str(moved), 20, "float32").identity
        return {key for key, value in now.items() if value != identity[key]}

    params = as_params(CONFIG, random_weights(CONFIG, 6))
    save_encoder(moved, CONFIG, params, load_tokenizer(directory)[0], "float32")
    assert changed() == {"weights_sha256"}
    path = moved / "tokenizer.json"
    path.write_text(path.read_text().replace("-5.", "-6.", 1))
    assert changed() == {"weights_sha256", "tokenizer_sha256"}


def test_identity_of_the_embedded_encoder():
    """Catches another way to compute a checksum: prepared data and models that record the old one
    would be refused.
    """
    assert load_text_encoder("t5_tiny", 32).identity == {
        "name": "t5_tiny",
        "weights_sha256": "29bff7d1af3ca0c74002bd2902d4571012f9ae70379598b2c847baed6bc005f6",
        "tokenizer_sha256": "8af8e659e78da6343d53d6f362f1dc624c0b9fdc7b887f218ceae9e6be56591c",
        "max_length": 32,
        "dtype": "bfloat16",
        "dim": 256,
    }


def test_the_family_is_read_from_the_config(directory):
    """Catches a T5 directory that needs a model_type, and another model accepted as T5."""
    config = directory / "config.json"
    expected = load_text_encoder(str(directory), 20).encode(["a red apple"], 1)[0]
    rewrite(config, lambda raw: (raw.pop("model_type"), raw.pop("architectures")))
    result = load_text_encoder(str(directory), 20).encode(["a red apple"], 1)[0]
    np.testing.assert_array_equal(result, expected)
    rewrite(config, lambda raw: raw.update(model_type="roberta"))
    with pytest.raises(
        ValueError, match=r"unknown text encoder \(roberta\): the supported families are"
    ):
        load_text_encoder(str(directory), 20)
    config.write_text(json.dumps({"architectures": ["GPT"], "vocab_size": 128}))
    with pytest.raises(ValueError, match=r"encoder \(\['GPT'\]\).* are t5, clip, bert$"):
        load_text_encoder(str(directory), 20)


def test_tokenizer_and_network_without_weights(directory):
    """Catches a preview or plan that needs weights, or uses another tokenizer or network."""
    encoder = load_text_encoder(str(directory), 6)
    (directory / "model.safetensors").unlink()
    texts = ["a red apple on a blue plate", "moon"]
    tokenize, dim, pooled_dim = load_tokenize(str(directory), 6)
    assert (
        tokenize(texts) == encoder.tokenize(texts) and dim == encoder.dim == 32 and not pooled_dim
    )
    for path in (directory, directory / "config.json"):
        assert read_network(path, "bfloat16") == T5Encoder(CONFIG, np.dtype("bfloat16"))


def test_mesh_is_chosen_by_the_bytes_of_the_weights(directory):
    """Catches `place` called with the bytes of another precision, or its mesh ignored."""
    told = []

    def place(weights):
        told.append(weights)
        return batch_mesh(jax.devices(), fsdp=4)

    encoder = load_text_encoder(str(directory), 20, "bfloat16", place)
    assert told == [weight_bytes(parameter_shapes(T5Encoder(CONFIG), "bfloat16"))]
    assert encoder._program.rows.mesh.shape["fsdp"] == 4


def test_mistakes_are_one_clear_line(directory, tmp_path):
    """Catches an invalid argument or directory that causes an error deep inside a library."""
    with pytest.raises(ValueError, match="dtype 'float16': choose one of bfloat16, float32"):
        load_text_encoder(str(directory), 20, "float16")
    with pytest.raises(ValueError, match="max_length 0"):
        load_text_encoder(str(directory), 0)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_text_encoder(str(empty), 20)
    shutil.copy(directory / "config.json", empty)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_text_encoder(str(empty), 20)
    rewrite(directory / "config.json", lambda raw: raw.update(vocab_size=64))
    with pytest.raises(ValueError, match="shared.weight is"):
        load_text_encoder(str(directory), 20)
    rewrite(directory / "config.json", lambda raw: raw.update(feed_forward_proj="relu"))
    with pytest.raises(ValueError, match="lacks .*DenseReluDense.wi.weight"):
        load_text_encoder(str(directory), 20)


def test_tokenizer_larger_than_the_embedding(tmp_path):
    """Catches ids beyond the embedding: their lookup gives NaN or another token."""
    config = T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=40)
    params = as_params(config, random_weights(config, 5))
    save_encoder(tmp_path, config, params, load_tokenizer(TOKENIZER)[0])
    with pytest.raises(ValueError, match="has 63 tokens, the encoder's embedding only 40"):
        load_text_encoder(str(tmp_path), 20)


def test_loading_imports_no_torch(directory):
    """Catches an import of torch or TensorFlow."""
    code = (
        "import sys; from imagen_jax.weights.text_encoders import load_text_encoder as load\n"
        f"load({str(directory)!r}, 16, 'float32').encode(['a red apple'], 1)\n"
        "print([m for m in ('torch', 'tensorflow') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def fill_cache(cache: pathlib.Path, files: dict[str, pathlib.Path]) -> None:
    """A hub cache that holds someone/encoder."""
    snapshot = cache / "models--someone--encoder" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    for name, source in files.items():
        shutil.copy(source, snapshot / name)


@pytest.fixture
def hub_files(tmp_path, monkeypatch) -> dict[str, pathlib.Path]:
    """The files of an encoder on the hub. Its cache is `tmp_path`, and there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sources = (GOLDENS / "t5_bin", TOKENIZER)
    return {path.name: path for source in sources for path in source.iterdir()}


def test_hub_name_from_the_cache(tmp_path, hub_files):
    """Catches a cached encoder that needs the network, the decoder shard or both formats."""
    fill_cache(tmp_path, hub_files)
    directory = find_encoder("someone/encoder")
    config = T5Config.from_json(directory / "config.json")
    params, _ = read_tree(directory, name_map(config), "float32")
    expected = as_params(config, random_weights(config, 7))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", "not in the Hugging Face cache"),
        ("pytorch_model-00002-of-00003.bin", "has pytorch_model-00002"),
        ("tokenizer.json", "has its tokenizer"),
        ("pytorch_model.bin.index.json", "has model.safetensors or"),
    ],
)
def test_incomplete_cache_offline(tmp_path, hub_files, lost, message):
    """Catches a partly cached encoder that is used, and an error without the missing file."""
    hub_files.pop(lost)
    fill_cache(tmp_path, hub_files)
    with pytest.raises(FileNotFoundError, match=message):
        find_encoder("someone/encoder")


def test_names_that_are_neither(tmp_path):
    """Catches a mistyped path that is sent to the hub."""
    for name in ("nowhere", "./a/b", str(tmp_path / "x"), "a/b/c", "~/x"):
        with pytest.raises(FileNotFoundError, match="no such directory, and not a hub name"):
            find_encoder(name)
    assert find_encoder("t5_tiny").parts[-3:] == ("imagen_jax", "assets", "t5_tiny")
    assert find_encoder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "config.json is a Git LFS pointer"),
        ('{"model_type": "t5"', "config.json is not valid JSON"),
        ("[]", "config.json is not a model's configuration"),
        ('{"model_type": "t5", "feed_forward_proj": "gated-gelu"}', "config.json: not a T5 config"),
    ],
)
def test_a_bad_config_is_named(directory, content, message):
    """Catches an error that does not say which file is wrong."""
    (directory / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_text_encoder(str(directory), 20)


def test_a_url_is_no_encoder():
    """Catches a bucket taken for a hub name or a directory."""
    with pytest.raises(ValueError, match="text encoder gs://b/t5 is a URL, only local paths work"):
        find_encoder("gs://b/t5")
