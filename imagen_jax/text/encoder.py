"""The interface of a frozen text encoder, and its implementation for a Flax network."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Bool, Int, Shaped

from imagen_jax.text import tokenizer as tokenizers
from imagen_jax.text.program import EncodeProgram

# Tokens. Batches are padded to 16, 32, 64 ... tokens, so that few programs are compiled.
SHORTEST = 16
Features = BFloat16[np.ndarray, "_ d"]  # of one text; each has its own length
Pooled = BFloat16[np.ndarray, "n e"]  # one vector per text
Output = tuple[Shaped[Any, "b l d"], Shaped[Any, "b e"]]  # padded features, pooled vectors


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen text encoder, as used by prepare_data, sample and their previews.

    An implementation guarantees:

    - `encode` returns one array [l, dim] bfloat16 per text, in the order of the texts, without
      padding. l is the length of the text's row in `tokenize`; 1 <= l <= max_length, also for "".
    - `encode_pooled` returns the same features, bit for bit, and one vector per text.
    - A feature depends on its own text alone. Other texts, their number and the padding may change
      its rounding; with `fill` they do not.
    - `tokenize` needs no device. It raises ValueError for a text that is not valid Unicode.
    - `identity` is JSON: at least "name", "max_length", "dim", "dtype", and checksums of weights
      and tokenizer. A family with a choice of features adds it: "family", "layer", "pooling",
      "pooled_dim". Encoders with equal identities have equal features; stored features and trained
      models record it.
    """

    dim: int  # features per token
    pooled_dim: int  # features of the pooled vector of a text, 0 if there is none
    max_length: int  # tokens, including the final end-of-sequence
    identity: Mapping[str, Any]

    def tokenize(self, texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        """(token ids of each text, whether each was cut to max_length)."""
        ...

    def unknown(self, texts: list[str]) -> list[str]:
        """The characters of each text that the vocabulary lacks, "" if there are none."""
        ...

    def encode(self, texts: list[str], batch_size: int, fill: bool = False) -> list[Features]:
        """Features of each text. batch_size: texts of up to 32 tokens per device and batch.

        fill: every batch has that size, so that the same program encodes a text whatever other
        texts are encoded with it.
        """
        ...

    def encode_pooled(
        self, texts: list[str], batch_size: int, fill: bool = False
    ) -> tuple[list[Features], Pooled]:
        """(the result of `encode`, pooled vectors [n, pooled_dim] bfloat16)."""
        ...


def bucket_length(length: int, max_length: int) -> int:
    """The padded length of `length` tokens: the next power of two >= 16, at most `max_length`."""
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), max_length)


class FlaxEncoder:
    """The TextEncoder of a Flax network on a mesh, loaded by `weights.text_encoders`."""

    def __init__(
        self, program: EncodeProgram, params: Mapping, tokenizer: Any, identity: Mapping[str, Any]
    ):
        """params: arrays with the shapes and shardings of `program.params`.

        tokenizer: a transformers tokenizer. identity: see `TextEncoder`.
        """
        self.dim = identity["dim"]
        self.pooled_dim = identity.get("pooled_dim", 0)
        self.max_length = identity["max_length"]
        self.identity = identity
        self._tokenizer = tokenizer
        self._params = params
        self._program = program

    def tokenize(self, texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        """(token ids of each text, ending with end-of-sequence; whether each was cut)."""
        return tokenizers.tokenize(self._tokenizer, texts, self.max_length)

    @property
    def tokenizing(self) -> Callable[[list[str]], tuple[list[list[int]], list[bool]]]:
        """`tokenize` without the network: it can be pickled."""
        return functools.partial(tokenizers.tokenize, self._tokenizer, max_length=self.max_length)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the weights."""
        return self._program.rows.mesh

    def unknown(self, texts: list[str]) -> list[str]:
        """The characters of each text that the vocabulary lacks, "" if there are none."""
        return tokenizers.unknown_characters(self._tokenizer, texts)

    def encode(self, texts: list[str], batch_size: int, fill: bool = False) -> list[Features]:
        """Features of each text, unpadded: bfloat16 [l, dim], l = its number of tokens.

        Texts of similar length share a batch. A device gets `batch_size` rows of up to 32 tokens
        and proportionally fewer longer rows: in compiled programs of T5-XXL for v5e, a token costs
        14 % less with 2048 tokens per device than with 8192, because they stay on the chip. A
        smaller number of texts is rounded up to a power of two. With `fill` a device always gets
        `batch_size` rows.

        The number of devices does not change the rows that a device computes together, so it does
        not change a bit of the features, unless the weights are in several shards.
        """
        return self.encode_pooled(texts, batch_size, fill)[0]

    def encode_pooled(
        self, texts: list[str], batch_size: int, fill: bool = False
    ) -> tuple[list[Features], Pooled]:
        """(the result of `encode`, pooled vectors [n, pooled_dim] bfloat16), by one program."""
        if batch_size < 1:
            raise ValueError(f"text encoder batch_size {batch_size}: at least 1 is needed")
        rows, _ = self.tokenize(texts)
        features = [np.empty(0)] * len(rows)
        pooled = np.empty((len(rows), self.pooled_dim), ml_dtypes.bfloat16)
        for members, (out, vectors) in self._one_behind(self._batches(rows, batch_size, fill)):
            for i, feature in zip(members, np.asarray(out), strict=False):
                features[i] = feature[: len(rows[i])].astype(ml_dtypes.bfloat16)
            pooled[members] = np.asarray(vectors)[: len(members)]
        return features, pooled

    def run(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Output:
        """Features of padded token ids that are on the mesh; asynchronous, nothing is fetched.

        mask: True for tokens, False for the padding after them; no row is empty. b must be a
            multiple of the rows of the mesh. Features of padding are undefined.
        """
        return self._apply(tokens, jnp.sum(mask, axis=1, dtype=jnp.int32))

    def _apply(self, tokens: Int[Array, "b l"], lengths: Int[Array, "b"]) -> Output:
        out = self._program.apply(self._params, tokens, lengths)
        return out if self.pooled_dim else (out, np.empty((len(tokens), 0)))

    def _batches(
        self, rows: list[list[int]], batch_size: int, fill: bool
    ) -> Iterator[tuple[list[int], Output]]:
        """Yields (indices of the texts, (padded features [b l d], pooled vectors [b e])).

        They are dispatched but not awaited. Rows beyond the number of texts are filling.
        """
        buckets: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            buckets.setdefault(bucket_length(len(row), self.max_length), []).append(i)
        devices = self._program.devices
        for length, members in sorted(buckets.items()):
            rows_of_device = batch_size
            if not fill:
                most = max(1, batch_size * 32 // max(length, 32))
                rows_of_device = min(most, 1 << (len(members) - 1).bit_length())
            size = devices * rows_of_device
            for start in range(0, len(members), size):
                chosen = members[start : start + size]
                yield chosen, self._run([rows[i] for i in chosen], size, length)

    @staticmethod
    def _one_behind(batches: Iterator) -> Iterator:
        """Yields each batch once the next is dispatched, so unpacking overlaps with compute."""
        last = next(batches, None)
        for batch in batches:
            yield last
            last = batch
        if last is not None:
            yield last

    def _run(self, rows: list[list[int]], size: int, length: int) -> Output:
        """(features [size, length, dim], pooled vectors [size, pooled_dim]) of one padded batch.

        Rows beyond the texts have length 1, so that none is empty.
        """
        tokens = np.zeros((size, length), np.int32)
        lengths = np.ones(size, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            lengths[i] = len(row)
        return self._apply(*jax.device_put((tokens, lengths), self._program.rows))
