"""Tokenizers in Hugging Face directories, and text to token ids."""

import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from imagen_jax.caption_text import is_text
from imagen_jax.checksums import sha256_file
from imagen_jax.storage import check_content, read_json

EXTRAS = ("tokenizer_config.json", "special_tokens_map.json")  # read by transformers if present


def no_options(file: pathlib.Path) -> dict[str, Any]:
    """The options of a tokenizer whose files say everything."""
    return {}


def load_tokenizer(
    directory: pathlib.Path,
    kinds: Mapping[str, str],
    options: Callable[[pathlib.Path], Mapping[str, Any]] = no_options,
) -> tuple[Any, pathlib.Path, str]:
    """(transformers tokenizer, the file it was read from, that file's sha256).

    kinds: file name -> name of the transformers class that reads it, in order of preference.
    PreTrainedTokenizerFast reads tokenizer.json exactly as written; T5Tokenizer would replace its
    normaliser. A SentencePiece .model needs the package `sentencepiece`.
    options: the file -> arguments of that class that no file states.

    Raises:
        FileNotFoundError: the directory has none of the files.
        ImportError: `sentencepiece` is needed and not installed.
        ValueError: a file is empty, a Git LFS pointer, or cannot be read; the message names it.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice to install torch
    import transformers

    file = next((directory / name for name in kinds if (directory / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{directory} has no tokenizer: none of {', '.join(kinds)}")
    # Without this check transformers would ask for tiktoken.
    if file.suffix == ".model" and importlib.util.find_spec("sentencepiece") is None:
        raise ImportError(
            f"{file} can only be read with the package sentencepiece: pip install sentencepiece"
        )
    check_content(file)
    for path in (directory / name for name in EXTRAS):
        if path.is_file():
            read_json(path)  # transformers would blame no file
    arguments = options(file)
    # Never AutoTokenizer: it imports torch if that is installed.
    kind = getattr(transformers, kinds[file.name])
    try:
        tokenizer = kind.from_pretrained(directory, local_files_only=True, **arguments)
    except Exception as error:  # tokenizers raises a bare Exception for an unknown format
        raise ValueError(
            f"the tokenizer {file} cannot be read ({' '.join(str(error).split())}): download it"
            " again, or update the packages transformers and tokenizers"
        ) from error
    return tokenizer, file, sha256_file(file)


def set_end_token(tokenizer: Any, file: pathlib.Path, kind: str) -> None:
    """Sets `eos_token` to the token that ends each text.

    Raises ValueError unless each text is between a start and an end token. kind: what the tokenizer
    in `file` should be, for the message.
    """
    ends = tokenizer("")["input_ids"]
    if len(ends) != 2 or ends[0] == ends[1]:
        raise ValueError(
            f"{file} is not a {kind} tokenizer: it does not put each text between a start and an"
            " end token"
        )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[1])


def tokenize(
    tokenizer: Any, texts: list[str], max_length: int
) -> tuple[list[list[int]], list[bool]]:
    """(token ids of each text, whether each was cut to `max_length`).

    A text that is cut keeps its last token, end-of-sequence.

    Raises:
        ValueError: a text is not a string or not valid Unicode.
    """
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not is_text(text):
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


def unknown_characters(tokenizer: Any, texts: list[str]) -> list[str]:
    """The characters of each text that the vocabulary lacks, each once; "" if there are none.

    The whole text where the unknown token stands for no single character of it. CLIP's unknown
    token is its end-of-text token; there the last token of a text is not counted.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not texts:
        return [""] * len(texts)

    last = -1 if unknown == getattr(tokenizer, "eos_token_id", None) else None

    def inner(texts: list[str]) -> list[list[int]]:
        return [row[:last] for row in tokenizer(texts, verbose=False)["input_ids"]]

    rows = inner(list(texts))
    affected = [text for text, row in zip(texts, rows, strict=True) if unknown in row]
    characters = sorted(set("".join(affected)))
    alone = inner(characters) if characters else []
    lacking = {c for c, row in zip(characters, alone, strict=True) if unknown in row}
    return [
        "".join(c for c in dict.fromkeys(text) if c in lacking) or text if unknown in row else ""
        for text, row in zip(texts, rows, strict=True)
    ]
