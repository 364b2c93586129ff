"""Captions to features: tokenizer and frozen T5 encoder behind one object, the same for the embedded encoder and for T5-XXL."""

import functools
import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from imagen_jax.integrity import sha256_file
from imagen_jax.text.loading import EMBEDDED, TOKENIZERS, find_encoder, load_params
from imagen_jax.text.t5 import T5Config, T5Encoder

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

    def __init__(self, config: T5Config, params: dict, tokenizer, identity: dict, mesh: Mesh | None):
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the encoder's embedding only {config.vocab_size}")
        self.dim = config.d_model
        self.max_length = identity["max_length"]
        self.identity = identity
        self._tokenizer = tokenizer
        self._params = params
        self._mesh = mesh
        self._apply = self._compile(T5Encoder(config, jnp.dtype(identity["dtype"])))

    @classmethod
    def load(cls, name_or_dir: str, max_length: int, dtype: str = "bfloat16", mesh: Mesh | None = None) -> "TextEncoder":
        """Loads a Hugging Face directory, a hub name, or "t5_tiny" (the embedded encoder).

        `max_length` counts tokens with the final end-of-sequence; with a mesh the weights are sharded over all its axes.
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
        params, weights_sha256 = load_params(directory, config, dtype, mesh)
        local = pathlib.Path(name_or_dir).is_dir() and name_or_dir != EMBEDDED
        identity = {
            "name": directory.resolve().name if local else str(name_or_dir),
            "weights_sha256": weights_sha256,
            "tokenizer_sha256": tokenizer_sha256,
            "max_length": max_length,
            "dtype": dtype,
            "dim": config.d_model,
        }
        return cls(config, params, tokenizer, identity, mesh)

    def _compile(self, model: T5Encoder):
        def apply(params, tokens: Int[Array, "b l"], lengths: Int[Array, " b"]) -> Float[Array, "b l d"]:
            mask = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
            return model.apply({"params": params}, tokens, mask).astype(jnp.bfloat16)

        if self._mesh is None:
            return jax.jit(apply)
        return jax.jit(apply, out_shardings=NamedSharding(self._mesh, PartitionSpec()))  # whole on every host, to be fetched

    def tokenize(self, texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids of each text, ending with end-of-sequence, cut to max_length; and whether each was cut."""
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not _is_unicode(text):
                raise ValueError(f"caption {i} is not valid text: {text!r}")
        if not texts:
            return [], []
        ids = self._tokenizer(list(texts), verbose=False)["input_ids"]
        truncated = [len(row) > self.max_length for row in ids]
        eos = self._tokenizer.eos_token_id
        return [row[: self.max_length - 1] + [eos] if cut else row for row, cut in zip(ids, truncated, strict=True)], truncated

    def encode(self, texts: list[str], batch_size: int, fill: bool = False) -> list[np.ndarray]:
        """Features of each text, unpadded: bfloat16 [length, dim] with length = its number of tokens.

        Texts of similar length run together, in batches of `batch_size` rows; fewer texts in one of the next power of two, or, with
        `fill`, of `batch_size` too: then the same program encodes a text whatever is encoded with it.
        """
        if batch_size < 1:
            raise ValueError(f"text encoder batch_size {batch_size}: at least 1 is needed")
        rows, _ = self.tokenize(texts)
        buckets: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            buckets.setdefault(bucket_length(len(row), self.max_length), []).append(i)
        features: list[np.ndarray] = [np.empty(0)] * len(rows)
        for length, members in sorted(buckets.items()):
            size = batch_size if fill else min(batch_size, 1 << (len(members) - 1).bit_length())
            for start in range(0, len(members), size):
                chosen = members[start : start + size]
                out = self._run([rows[i] for i in chosen], size, length)
                for i, feature in zip(chosen, out, strict=False):
                    features[i] = feature[: len(rows[i])].copy()
        return features

    def _run(self, rows: list[list[int]], size: int, length: int) -> np.ndarray:
        """One padded batch; rows beyond the texts have length 1, so that none is empty."""
        tokens = np.zeros((size, length), np.int32)
        lengths = np.ones(size, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            lengths[i] = len(row)
        if self._mesh is not None:
            split = PartitionSpec(self._mesh.axis_names if size % self._mesh.size == 0 else None)
            place = functools.partial(jax.device_put, device=NamedSharding(self._mesh, split))
            tokens, lengths = place(tokens), place(lengths)
        return np.asarray(self._apply(self._params, tokens, lengths)).astype(ml_dtypes.bfloat16, copy=False)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
