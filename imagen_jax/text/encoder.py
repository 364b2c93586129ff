"""Captions to features: tokenizer and frozen T5 encoder behind one object, the same for the embedded encoder and for T5-XXL."""

import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from imagen_jax.storage import sha256_file
from imagen_jax.text.loading import EMBEDDED, TOKENIZERS, find_encoder, load_params
from imagen_jax.text.program import EncodeProgram, one_device
from imagen_jax.text.t5 import T5Config

SHORTEST = 16  # tokens; batches are padded to 16, 32, 64 ... so that few programs are compiled
DTYPES = ("bfloat16", "float32")


def load_tokenizer(directory: pathlib.Path):
    """The transformers tokenizer of a directory, and the sha256 of the file it came from.

    tokenizer.json is read exactly as written (T5Tokenizer would replace its normaliser); spiece.model needs `sentencepiece`.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it advises, on import, to install torch
    from transformers import PreTrainedTokenizerFast, T5Tokenizer  # never AutoTokenizer: it imports torch where there is one

    file = next((directory / name for name in TOKENIZERS if (directory / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{directory} has no tokenizer: neither of {', '.join(TOKENIZERS)}")
    if file.suffix == ".model" and importlib.util.find_spec("sentencepiece") is None:  # transformers would ask for tiktoken
        raise ImportError(f"{file} can only be read with the package sentencepiece: pip install sentencepiece")
    kind = PreTrainedTokenizerFast if file.suffix == ".json" else T5Tokenizer
    tokenizer = kind.from_pretrained(directory, local_files_only=True)
    if tokenizer.eos_token_id is None or tokenizer("")["input_ids"] != [tokenizer.eos_token_id]:
        raise ValueError(f"{file} is not a T5 tokenizer: it does not end every text with its end-of-sequence token alone")
    return tokenizer, sha256_file(file)


def bucket_length(length: int, max_length: int) -> int:
    """The padded length of a text of `length` tokens: the next power of two from 16 up, at most `max_length`."""
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), max_length)


class TextEncoder:
    """A frozen text encoder. Use `TextEncoder.load`."""

    def __init__(self, program: EncodeProgram, params: dict, tokenizer, identity: dict):
        self.dim = identity["dim"]
        self.max_length = identity["max_length"]
        self.identity = identity
        self._tokenizer = tokenizer
        self._params = params
        self._program = program

    @classmethod
    def load(cls, name_or_dir: str, max_length: int, dtype: str = "bfloat16", place: Callable[[T5Config, str], Mesh] = one_device) -> "TextEncoder":
        """Loads a Hugging Face directory, a hub name, or "t5_tiny" (the embedded encoder).

        `max_length` counts tokens with the final end-of-sequence. `place` says on which devices such an encoder goes: `one_device` of
        this process, or all of them (`local_mesh`). Each process reads all weights, which their checksum needs in any case, tensor by
        tensor, and keeps of each what its devices hold.
        """
        if dtype not in DTYPES:
            raise ValueError(f"text encoder dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        if max_length < 1:
            raise ValueError(f"text encoder max_length {max_length}: at least 1 is needed, for the end-of-sequence token")
        directory = find_encoder(str(name_or_dir))
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"text encoder {str(name_or_dir)!r}: {directory} has no config.json")
        config = T5Config.from_json(directory / "config.json")
        tokenizer, tokenizer_sha256 = load_tokenizer(directory)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the encoder's embedding only {config.vocab_size}")
        program = EncodeProgram.create(config, dtype, place(config, dtype))
        params, weights_sha256 = load_params(directory, config, dtype, program.params)
        local = pathlib.Path(name_or_dir).is_dir() and name_or_dir != EMBEDDED
        identity = {
            "name": directory.resolve().name if local else str(name_or_dir),
            "weights_sha256": weights_sha256,
            "tokenizer_sha256": tokenizer_sha256,
            "max_length": max_length,
            "dtype": dtype,
            "dim": config.d_model,
        }
        return cls(program, params, tokenizer, identity)

    def tokenize(self, texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids of each text, ending with end-of-sequence, cut to max_length; and whether each was cut."""
        return tokenize(self._tokenizer, texts, self.max_length)

    def encode(self, texts: list[str], batch_size: int, fill: bool = False) -> list[np.ndarray]:
        """Features of each text, unpadded: bfloat16 [length, dim] with length = its number of tokens.

        Texts of similar length run together. Each device takes `batch_size` rows of up to 32 tokens, of more tokens so many fewer (as
        XXL's passes are planned for v5e, 2048 tokens a device cost a seventh less each than 8192: they stay on the chip). Fewer texts
        run in a batch of the next power of two. With `fill` there are always `batch_size` rows on a device: then the same program
        encodes a text whatever is encoded with it.
        """
        if batch_size < 1:
            raise ValueError(f"text encoder batch_size {batch_size}: at least 1 is needed")
        rows, _ = self.tokenize(texts)
        features: list[np.ndarray] = [np.empty(0)] * len(rows)
        for members, out in self._one_behind(self._batches(rows, batch_size, fill)):
            for i, feature in zip(members, np.asarray(out), strict=False):
                features[i] = feature[: len(rows[i])].astype(ml_dtypes.bfloat16)
        return features

    def _batches(self, rows: list[list[int]], batch_size: int, fill: bool) -> Iterator[tuple[list[int], jax.Array]]:
        """(positions of the texts, their padded features) batch by batch, started and not waited for."""
        buckets: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            buckets.setdefault(bucket_length(len(row), self.max_length), []).append(i)
        devices = self._program.mesh.size
        for length, members in sorted(buckets.items()):
            size = devices * (batch_size if fill else max(1, batch_size * 32 // max(length, 32)))
            if not fill:
                size = min(size, -(-(1 << (len(members) - 1).bit_length()) // devices) * devices)
            for start in range(0, len(members), size):
                chosen = members[start : start + size]
                yield chosen, self._run([rows[i] for i in chosen], size, length)

    @staticmethod
    def _one_behind(batches: Iterator) -> Iterator:
        """Each batch after the next one has been started, so that the devices compute while this process unpacks."""
        last = next(batches, None)
        for batch in batches:
            yield last
            last = batch
        if last is not None:
            yield last

    def _run(self, rows: list[list[int]], size: int, length: int) -> jax.Array:
        """One padded batch; rows beyond the texts have length 1, so that none is empty."""
        tokens = np.zeros((size, length), np.int32)
        lengths = np.ones(size, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            lengths[i] = len(row)
        tokens, lengths = jax.device_put((tokens, lengths), self._program.rows)
        return self._program.apply(self._params, tokens, lengths)


def tokenize(tokenizer, texts: list[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
    """Token ids of each text, ending with end-of-sequence, cut to max_length; and whether each was cut."""
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not _is_unicode(text):
            raise ValueError(f"caption {i} is not valid text: {text!r}")
    if not texts:
        return [], []
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    truncated = [len(row) > max_length for row in ids]
    eos = tokenizer.eos_token_id
    return [row[: max_length - 1] + [eos] if cut else row for row, cut in zip(ids, truncated, strict=True)], truncated


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
