"""Tokenizers in directories, text to token ids. T5's own rules are in weights/test_t5_files.py."""

import hashlib
import json
import shutil

import pytest

from imagen_jax.text.tokenizer import load_tokenizer, tokenize, unknown_characters
from tests.test_storage import POINTER
from tests.text.random_t5 import TOKENIZER

KINDS = {"tokenizer.json": "PreTrainedTokenizerFast", "spiece.model": "T5Tokenizer"}


class Words:
    """A tokenizer with begin and end of sequence, like CLIP; the id of a word is its length."""

    eos_token_id = 99

    def __call__(self, texts, verbose):
        return {"input_ids": [[98, *map(len, text.split()), 99] for text in texts]}


def test_a_cut_text_keeps_its_end():
    """Catches a long caption that loses end-of-sequence, is one token short or is not reported."""
    rows, cut = tokenize(Words(), ["a red apple", "a red", ""], max_length=4)
    assert rows == [[98, 1, 3, 99], [98, 1, 3, 99], [98, 99]]
    assert cut == [True, False, False]
    assert tokenize(Words(), [], 4) == ([], [])


def test_invalid_unicode_is_named():
    """Catches a lone surrogate that causes the tokenizer's own error."""
    with pytest.raises(ValueError, match="caption 1 is not valid text"):
        tokenize(Words(), ["a", "\ud800"], 4)


def test_the_preferred_file_and_its_checksum(tmp_path):
    """Catches the second file read where both exist, and a checksum of another file."""
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"another")
    tokenizer, file, sha256 = load_tokenizer(tmp_path, KINDS)
    assert file == tmp_path / "tokenizer.json" and len(tokenizer) == 63
    assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_absent_tokenizer(tmp_path):
    """Catches an error that does not say which files are looked for."""
    with pytest.raises(FileNotFoundError, match="no tokenizer: none of tokenizer.json, spiece"):
        load_tokenizer(tmp_path, KINDS)


def test_spiece_model_without_sentencepiece(tmp_path, monkeypatch):
    """Catches advice to install tiktoken, as transformers gives, where sentencepiece is missing."""
    (tmp_path / "spiece.model").write_bytes(b"")
    load_tokenizer(TOKENIZER, KINDS)  # transformers itself asks for packages when first imported
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path, KINDS)


class Pairs:
    """A tokenizer that knows single characters, and no longer word."""

    unk_token_id = 2

    def __call__(self, texts, verbose):
        return {"input_ids": [[2 if len(word) > 1 else 5 for word in t.split()] for t in texts]}


def test_unknown_characters_are_named():
    """Catches silence about characters that the encoder cannot read, which draw something else."""
    tokenizer, _, _ = load_tokenizer(TOKENIZER, KINDS)
    texts = ["a red apple", "a 红 apple 🍎🍎红", "", "果"]
    assert unknown_characters(tokenizer, texts) == ["", "红🍎", "", "果"]
    assert unknown_characters(Pairs(), ["ab", "a b"]) == ["ab", ""]
    assert (
        unknown_characters(Words(), texts) == [""] * 4 and unknown_characters(tokenizer, []) == []
    )


def from_a_later_version(text: str) -> str:
    raw = json.loads(text)
    return json.dumps(raw | {"model": raw["model"] | {"type": "NewModel"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: POINTER, "tokenizer.json is a Git LFS pointer .*git lfs pull"),
        (lambda text: "", "tokenizer.json is empty"),
        (lambda text: text[:200], "tokenizer.json cannot be read .*: download it again, or update"),
        (from_a_later_version, "tokenizer.json cannot be read .*: download it again, or update"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, change, message):
    """Catches the error of a library that does not name the file, or a traceback of it."""
    text = (TOKENIZER / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(change(text), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path, KINDS)


def test_other_files_of_the_tokenizer_are_checked(tmp_path):
    """Catches a pointer in place of tokenizer_config.json."""
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(POINTER)
    with pytest.raises(ValueError, match="tokenizer_config.json is a Git LFS pointer"):
        load_tokenizer(tmp_path, KINDS)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid JSON"):
        load_tokenizer(tmp_path, KINDS)
