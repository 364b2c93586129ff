"""TextEncoder: what the pipeline sees. Tokens against sentencepiece and the published T5 vocabulary, features against the bare model."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from imagen_jax.text.encoder import TextEncoder, bucket_length, load_tokenizer
from imagen_jax.text.loading import load_params, save_encoder
from imagen_jax.text.program import make_mesh
from imagen_jax.text.t5 import T5Config, T5Encoder
from tests.text.random_t5 import TOKENIZER, as_params, random_weights

CONFIG = T5Config(d_model=32, d_ff=48, d_kv=8, num_heads=3, num_layers=3, vocab_size=128)
CAPTIONS = ["a red apple on a blue plate", "", "two green birds", "a woman doctor with dark skin tone, a man riding a brown horse", "moon"]

# Token ids by the SentencePiece library from the published spiece.model (the first sentence is the one in the T5 documentation)
KNOWN_IDS = {
    "Studies have been shown that owning a dog is good for you": [6536, 43, 118, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25, 1],
    "A  brain riding a rocketship heading towards the moon.": [71, 2241, 7494, 3, 9, 15721, 2009, 6904, 1587, 8, 8114, 5, 1],
    "café — naïve ½ ＡＢＣ": [11949, 3, 318, 3, 29, 9, 2, 162, 209, 2, 357, 14213, 1],
    "日本 😀": [3, 2, 3, 2, 1],
    "Line\nbreak\ttab": [4919, 1733, 3808, 1],
    "": [1],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("encoders") / "random_t5"
    save_encoder(path, CONFIG, as_params(CONFIG, random_weights(CONFIG, 5)), load_tokenizer(TOKENIZER)[0], "float32")
    return path


@pytest.fixture(scope="module")
def encoder(directory) -> TextEncoder:
    return TextEncoder.load(str(directory), max_length=20, dtype="float32")


def equal_up_to_rounding(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), rtol=2**-7, atol=1e-4)  # one bf16 step


def test_features_are_those_of_the_model(encoder, directory):
    """Fails if texts come back in another order, with padding, cut short, or masked as if padding were text."""
    params, _ = load_params(directory, CONFIG, "float32")
    apply = jax.jit(T5Encoder(CONFIG).apply)
    rows, _ = encoder.tokenize(CAPTIONS)
    features = encoder.encode(CAPTIONS, batch_size=2)
    for row, feature in zip(rows, features, strict=True):
        assert feature.dtype == ml_dtypes.bfloat16 and feature.shape == (len(row), encoder.dim)
        tokens = jnp.array([row])
        want = apply({"params": params}, tokens, jnp.ones_like(tokens, bool))[0]
        equal_up_to_rounding([feature], [np.asarray(want)])


def test_batch_mates_and_batch_size_change_nothing(encoder):
    """Fails if a feature depends on the texts beside it, on how many there are, or on the length they are padded to."""
    together = encoder.encode(CAPTIONS, batch_size=8)
    equal_up_to_rounding(together, [encoder.encode([text], batch_size=1)[0] for text in CAPTIONS])
    equal_up_to_rounding(together, encoder.encode(CAPTIONS[::-1], batch_size=3)[::-1])
    again = encoder.encode(CAPTIONS, batch_size=8)
    assert all(np.array_equal(a.view(np.uint16), b.view(np.uint16)) for a, b in zip(together, again, strict=True))


def test_truncation_is_reported_and_keeps_the_end(encoder, directory):
    """Fails if a long caption loses its end-of-sequence, is cut one off, or is cut without being counted."""
    rows, truncated = encoder.tokenize(CAPTIONS)
    assert truncated == [False, False, False, True, False]
    assert [len(row) <= 20 and row[-1] == 1 and row.count(1) == 1 for row in rows] == [True] * 5
    assert rows[1] == [1]
    longest = TextEncoder.load(str(directory), max_length=200).tokenize(CAPTIONS)
    assert rows[3] == longest[0][3][:19] + [1] and not any(longest[1])
    exact = TextEncoder.load(str(directory), max_length=len(rows[0])).tokenize(CAPTIONS)
    assert exact[0][0] == rows[0] and not exact[1][0]
    assert encoder.encode([], 4) == []


def test_filled_batches_run_one_program(encoder, directory):
    """Wrong: a text encoded by another program when it comes alone, which on some devices rounds otherwise."""
    fresh = TextEncoder.load(str(directory), max_length=32)
    together = fresh.encode(["moon", "a sun", "stars"], batch_size=8, fill=True)
    alone = fresh.encode(["a sun"], batch_size=8, fill=True)
    np.testing.assert_array_equal(together[1], alone[0])
    assert fresh._program.apply._cache_size() == 1


def test_few_programs_are_compiled(encoder, directory):
    """Fails if every length or a smaller number of texts compiles its own program."""
    assert [bucket_length(n, 100) for n in (1, 16, 17, 32, 33, 65, 100)] == [16, 16, 32, 32, 64, 100, 100]
    assert bucket_length(5, 7) == 7
    fresh = TextEncoder.load(str(directory), max_length=32)
    fresh.encode(["a " * n for n in range(24)] * 3, batch_size=8)
    fresh.encode(["moon"] * 5, batch_size=8)  # run as eight
    assert fresh._program.apply._cache_size() == 2


@pytest.mark.parametrize(("fsdp", "devices"), [(1, 1), (4, 8)])
def test_rows_of_a_batch(directory, monkeypatch, fsdp, devices):
    """Wrong: as many rows of long texts as of short ones, a batch that leaves devices idle, rows counted for all devices together."""
    batches, run = [], TextEncoder._run
    monkeypatch.setattr(TextEncoder, "_run", lambda self, rows, size, length: batches.append((size, length)) or run(self, rows, size, length))
    encoder = TextEncoder.load(str(directory), 128, "float32", lambda config, dtype: make_mesh(jax.devices()[:devices], fsdp))
    texts = ["moon"] * 9 * devices + ["two green birds " * 20] * 9 * devices
    assert len({len(feature) for feature in encoder.encode(texts, batch_size=8)}) == 2
    assert batches == [(8 * devices, 16)] + [(8 * devices, 16)] + [(2 * devices, 128)] * 5
    batches.clear()
    encoder.encode(texts[:3], batch_size=8)
    encoder.encode(texts[-3:], batch_size=8, fill=True)
    assert batches == [(max(4, devices), 16), (8 * devices, 128)]


def test_identity(encoder, directory, tmp_path):
    """Fails if the identity overlooks other weights, tokenizer, length or precision, or changes with where the files lie."""
    moved = tmp_path / "elsewhere" / "random_t5"
    shutil.copytree(directory, moved)
    assert TextEncoder.load(str(moved), 20, "float32").identity == encoder.identity
    assert encoder.identity.keys() == {"name", "weights_sha256", "tokenizer_sha256", "max_length", "dtype", "dim"}
    assert json.loads(json.dumps(encoder.identity)) == encoder.identity
    assert TextEncoder.load(str(moved), 21, "bfloat16").identity == encoder.identity | {"max_length": 21, "dtype": "bfloat16"}
    save_encoder(moved, CONFIG, as_params(CONFIG, random_weights(CONFIG, 6)), load_tokenizer(directory)[0], "float32")
    changed = {k for k, v in TextEncoder.load(str(moved), 20, "float32").identity.items() if v != encoder.identity[k]}
    assert changed == {"weights_sha256"}
    path = moved / "tokenizer.json"
    path.write_text(path.read_text().replace("-5.", "-6.", 1))
    changed = {k for k, v in TextEncoder.load(str(moved), 20, "float32").identity.items() if v != encoder.identity[k]}
    assert changed == {"weights_sha256", "tokenizer_sha256"}


@pytest.mark.parametrize(("fsdp", "batch_size"), [(1, 8), (4, 3), (8, 20)])
def test_mesh_changes_nothing(encoder, directory, fsdp, batch_size):
    """Fails if sharded weights or a split batch change the features."""
    sharded = TextEncoder.load(str(directory), 20, "float32", lambda config, dtype: make_mesh(jax.devices(), fsdp))
    equal_up_to_rounding(sharded.encode(CAPTIONS * 2, batch_size), encoder.encode(CAPTIONS * 2, batch_size))


def test_mistakes_are_one_clear_line(encoder, directory, tmp_path):
    """Fails if a bad argument or directory surfaces as an error from deep inside a library."""
    with pytest.raises(ValueError, match="dtype 'float16': choose one of bfloat16, float32"):
        TextEncoder.load(str(directory), 20, "float16")
    with pytest.raises(ValueError, match="max_length 0"):
        TextEncoder.load(str(directory), 0)
    with pytest.raises(ValueError, match="batch_size 0"):
        encoder.encode(["a"], 0)
    with pytest.raises(ValueError, match="caption 1 is not valid text"):
        encoder.tokenize(["a", "\ud800"])
    with pytest.raises(FileNotFoundError, match="no config.json"):
        TextEncoder.load(str(tmp_path), 20)
    shutil.copy(directory / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        TextEncoder.load(str(tmp_path), 20)
    raw = json.loads((directory / "config.json").read_text())
    shutil.copytree(directory, tmp_path / "small")
    (tmp_path / "small" / "config.json").write_text(json.dumps(raw | {"vocab_size": 64}))
    with pytest.raises(ValueError, match="shared.weight is"):
        TextEncoder.load(str(tmp_path / "small"), 20)


def test_tokenizer_larger_than_the_embedding(tmp_path):
    """Fails if ids beyond the embedding are looked up: out of range they come back as NaN or as another token."""
    config = T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=40)
    save_encoder(tmp_path, config, as_params(config, random_weights(config, 5)), load_tokenizer(TOKENIZER)[0])
    with pytest.raises(ValueError, match="the tokenizer has 63 tokens, the encoder's embedding only 40"):
        TextEncoder.load(str(tmp_path), 20)


def test_normaliser_of_the_file_is_kept(tmp_path):
    """Fails for T5Tokenizer, which puts its own normaliser and splitter in place of those in tokenizer.json."""
    shutil.copytree(TOKENIZER, tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"normalizer": {"type": "Lowercase"}}))
    tokenizer, _ = load_tokenizer(tmp_path / "t")
    assert tokenizer("A RED apple")["input_ids"] == tokenizer("a red apple")["input_ids"]
    assert 2 in load_tokenizer(TOKENIZER)[0]("A RED apple")["input_ids"]


def test_not_a_t5_tokenizer(tmp_path):
    """Fails if a tokenizer that does not append end-of-sequence passes: T5 saw one at the end of every text."""
    shutil.copytree(TOKENIZER, tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    with pytest.raises(ValueError, match="not a T5 tokenizer"):
        load_tokenizer(tmp_path / "t")


def test_spiece_model_alone(tmp_path):
    """Fails if a directory with only spiece.model (as T5 v1.1 was published) is cut into other pieces than SentencePiece does."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("\n".join(CAPTIONS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spiece"), vocab_size=38, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2
    )
    tokenizer, _ = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    for caption in [*CAPTIONS, "a Ｂlue  apple—ok"]:
        assert tokenizer(caption)["input_ids"] == reference.encode(caption) + [1]


def test_spiece_model_without_sentencepiece(tmp_path, monkeypatch):
    """Fails if the user is told to install tiktoken, as transformers does, when sentencepiece is what is missing."""
    (tmp_path / "spiece.model").write_bytes(b"")
    load_tokenizer(TOKENIZER)  # transformers itself asks for packages when first imported
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif("IMAGEN_T5_TOKENIZER" not in os.environ, reason="IMAGEN_T5_TOKENIZER names no directory with the published T5 tokenizer")
@pytest.mark.parametrize("files", [("tokenizer.json", "tokenizer_config.json"), ("spiece.model",)])
def test_published_t5_tokenizer(tmp_path, files):
    """Fails if the real vocabulary gives other ids than SentencePiece: spaces, ligatures, unknown characters, the empty text.

    The files are in the wheel diffsynth 1.1.9 (Apache-2.0), diffsynth/tokenizer_configs/flux/tokenizer_2.
    """
    for file in files:
        shutil.copy(pathlib.Path(os.environ["IMAGEN_T5_TOKENIZER"]) / file, tmp_path)
    tokenizer, _ = load_tokenizer(tmp_path)
    assert len(tokenizer) == 32100
    assert {text: tokenizer(text)["input_ids"] for text in KNOWN_IDS} == KNOWN_IDS


def test_loading_imports_no_torch(directory):
    """Fails if reading an encoder needs or imports torch or TensorFlow."""
    code = (
        "import sys; from imagen_jax.text.encoder import TextEncoder\n"
        f"TextEncoder.load({str(directory)!r}, 16, 'float32').encode(['a red apple'], 1)\n"
        "print([m for m in ('torch', 'tensorflow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=pathlib.Path(__file__).parents[2])
    assert out.stdout.strip() == "[]", out.stdout + out.stderr
