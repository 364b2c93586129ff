"""Tokenizers of directories, and texts to ids. T5's own rules are in weights/test_t5_files.py."""

import hashlib
import shutil

import pytest

from imagen_jax.text.tokenizer import load_tokenizer, tokenize
from tests.text.random_t5 import TOKENIZER

KINDS = {"tokenizer.json": "PreTrainedTokenizerFast", "spiece.model": "T5Tokenizer"}


class Words:
    """A tokenizer with begin and end of sequence, as CLIP has; a token is a word's length."""

    eos_token_id = 99

    def __call__(self, texts, verbose):
        return {"input_ids": [[98, *map(len, text.split()), 99] for text in texts]}


def test_a_cut_text_keeps_its_end():
    """Catches a long caption that loses its end-of-sequence, is cut one off or is not counted."""
    rows, cut = tokenize(Words(), ["a red apple", "a red", ""], max_length=4)
    assert rows == [[98, 1, 3, 99], [98, 1, 3, 99], [98, 99]]
    assert cut == [True, False, False]
    assert tokenize(Words(), [], 4) == ([], [])


def test_invalid_unicode_is_named():
    """Catches a lone surrogate that reaches the tokenizer's own error."""
    with pytest.raises(ValueError, match="caption 1 is not valid text"):
        tokenize(Words(), ["a", "\ud800"], 4)


def test_the_preferred_file_and_its_checksum(tmp_path):
    """Catches the second file taken where both are, and a checksum of another file."""
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
