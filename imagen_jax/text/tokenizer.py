"""Tokenizers of Hugging Face directories, and texts to token ids."""

import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from imagen_jax.storage import sha256_file


def load_tokenizer(
    directory: pathlib.Path, kinds: Mapping[str, str]
) -> tuple[Any, pathlib.Path, str]:
    """(transformers tokenizer, the file it was read from, that file's sha256).

    kinds: file name -> name of the transformers class that reads it, in order of preference.
    tokenizer.json is read exactly as written only by PreTrainedTokenizerFast: T5Tokenizer would
    replace its normaliser. A SentencePiece .model needs `sentencepiece`.

    Raises:
        FileNotFoundError: the directory has none of the files.
        ImportError: `sentencepiece` is not installed, but is needed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice to install torch
    import transformers

    file = next((directory / name for name in kinds if (directory / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{directory} has no tokenizer: neither of {', '.join(kinds)}")
    # Without this check transformers would ask for tiktoken.
    if file.suffix == ".model" and importlib.util.find_spec("sentencepiece") is None:
        raise ImportError(
            f"{file} can only be read with the package sentencepiece: pip install sentencepiece"
        )
    # Never AutoTokenizer: it imports torch where that is installed.
    kind = getattr(transformers, kinds[file.name])
    return kind.from_pretrained(directory, local_files_only=True), file, sha256_file(file)


def tokenize(
    tokenizer: Any, texts: list[str], max_length: int
) -> tuple[list[list[int]], list[bool]]:
    """(token ids of each text, whether each was cut to `max_length`).

    A text that is cut keeps its last token, end-of-sequence.

    Raises:
        ValueError: a text is not a string or not valid Unicode.
    """
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not _is_unicode(text):
            raise ValueError(f"caption {i} is not valid text: {text!r}")
    if not texts:
        return [], []
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    truncated = [len(row) > max_length for row in ids]
    end = [tokenizer.eos_token_id]
    rows = [
        row[: max_length - 1] + end if cut else row for row, cut in zip(ids, truncated, strict=True)
    ]
    return rows, truncated


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
