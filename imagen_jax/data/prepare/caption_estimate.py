"""Estimates of a caption store of any size, from the lengths of some captions."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from imagen_jax.data import records
from imagen_jax.data.prepare import checks
from imagen_jax.data.prepare.choices import Choice, print_choices, size_text
from imagen_jax.data.sources.source import Source

_CAPTIONS = 4096  # items whose captions are measured
# Work files for an image with one caption of 60 characters, which are removed at the end: checks
# (270), the selection's database (340) and plan (95).
WORK_BYTES = 700
# Measured on stores of 64 to 4096 features a token: zstd's compressed fraction of features, a
# record's frame, a shard's last block. bfloat16: the same for t5_tiny's features and for normal
# noise. int8: 0.91 for t5_tiny's features; of normal noise 0.93 at width 256, 0.90 at width 4096,
# because the largest of more features is larger, and the others become smaller integers.
ZSTD_LEAVES = {"bfloat16": 0.78, "int8": 0.91}
RECORD_BYTES = 250
TEXT_RECORD_BYTES = 100  # of a record with only a text of 33 to 82 bytes, compressed: 86 to 103
SHARD_BYTES = 2**15
_FEATURE_BYTES = {"bfloat16": 2, "int8": 1}
_SCALE_BYTES = {"bfloat16": 0, "int8": 4}  # per token; the bits of a float32 do not compress


def token_bytes(dim: int, embedding: str, leaves: float = 1.0) -> float:
    """Bytes of the features of a token.

    leaves: fraction that remains of the features after compression.
    """
    return leaves * _FEATURE_BYTES[embedding] * dim + _SCALE_BYTES[embedding]


@dataclasses.dataclass(frozen=True)
class StoreEstimate:
    """The estimate of one store of captions: texts, features of one encoder, or both.

    tokens, text_bytes: means over the captions. dim: features a token. embedding: their dtype.
    pooled_dim: features of the pooled vector.
    """

    captions: float
    tokens: float
    text_bytes: float
    dim: int
    shard_size: int
    embedding: str
    pooled_dim: int = 0

    @property
    def uncompressed(self) -> float:
        """Bytes of features and text: an upper bound without the records' frames."""
        return self.captions * (
            self.tokens * token_bytes(self.dim, self.embedding)
            + token_bytes(self.pooled_dim, "bfloat16")
            + self.text_bytes
        )

    @property
    def bytes(self) -> float:
        """Bytes on disk, with the features compressed to ZSTD_LEAVES of their size."""
        features = self.tokens * token_bytes(self.dim, self.embedding, ZSTD_LEAVES[self.embedding])
        features += token_bytes(self.pooled_dim, "bfloat16", ZSTD_LEAVES["bfloat16"])
        frame = RECORD_BYTES if self.dim else TEXT_RECORD_BYTES
        return self.captions * (features + self.text_bytes + frame) + self.shards * SHARD_BYTES

    @property
    def shards(self) -> int:
        return math.ceil(self.captions / self.shard_size)


@dataclasses.dataclass(frozen=True)
class FeatureSizes:
    """The features of a text encoder.

    dim: features a token. tokens: mean length of the captions. pooled_dim: features of the pooled
    vector that is stored.
    """

    dim: int
    tokens: float
    pooled_dim: int = 0


@dataclasses.dataclass(frozen=True)
class CaptionEstimate:
    """The estimate of all stores of captions. stores: {name of the encoder: its store}.

    "" is the store of the texts, or of texts and features of a single unnamed encoder.
    """

    stores: Mapping[str, StoreEstimate]

    @classmethod
    def of(
        cls,
        captions: float,
        text_bytes: float,
        sizes: Mapping[str, FeatureSizes],
        shard_size: int,
        embedding: str,
    ) -> "CaptionEstimate":
        """sizes: {name of the encoder: its features}, "" for a single unnamed one."""
        stores = {"": StoreEstimate(captions, 0, text_bytes, 0, shard_size, embedding)}
        for name, features in sizes.items():
            stores[name] = StoreEstimate(
                captions,
                features.tokens,
                0 if name else text_bytes,
                features.dim,
                shard_size,
                embedding,
                features.pooled_dim,
            )
        return cls(stores)

    @property
    def bytes(self) -> float:
        """Bytes on disk."""
        return sum(store.bytes for store in self.stores.values())

    @property
    def has_features(self) -> bool:
        """Whether there are more than texts."""
        return any(store.dim for store in self.stores.values())


@dataclasses.dataclass(frozen=True)
class TokenizerFacts:
    """What is known of a text encoder without its weights.

    tokenize: the tokenize function of text.encoder.TextEncoder. dim, pooled_dim: as there.
    """

    tokenize: Callable[[list[str]], tuple[list[list[int]], list[bool]]]
    dim: int
    pooled_dim: int = 0


def preview_captions(
    source: Source,
    encoders: Mapping[str, TokenizerFacts],
    captions: int,
    shard_size: int,
    embedding: str,
    rate: float,
    chips: int,
    price: float,
) -> CaptionEstimate:
    """Prints the size of stores of `captions` distinct captions like those of the source.

    It encodes nothing.

    Args:
      encoders: by name; "" for a single unnamed one, {} for texts alone.
      embedding: the chosen dtype of the stored features, of records.EMBEDDINGS.
      rate: total captions per second of all `chips`, by all encoders; 0 if unknown.
      price: storage price per GiB and month; 0 if unknown.

    Returns:
      The estimate with the chosen dtype.
    """
    indices = spread(source, _CAPTIONS)
    usable = [text for i in indices for text in checks.usable_captions(source[i].captions)[0]]
    texts = list(dict.fromkeys(usable))
    if not texts:
        raise ValueError(f"no caption in {len(indices)} items of {source.describe()}")
    text_bytes = float(np.mean([len(text.encode()) for text in texts]))
    if not encoders:
        print(f"captions  {captions:,} (measured on {len(texts):,} of the source's)")
    sizes = {name: _measure(name, one, texts, captions) for name, one in encoders.items()}
    stores = {
        name: CaptionEstimate.of(captions, text_bytes, sizes, shard_size, name)
        for name in records.EMBEDDINGS
    }
    _print_stores(stores[embedding])
    work = captions * len(indices) / len(usable)
    print(
        f"work      about {work * WORK_BYTES / 2**30:,.1f} GiB of files until the end, for"
        f" {work:,.0f} images"
    )
    if rate:
        _print_time(stores[embedding].bytes, captions, rate, chips)
    seconds = dict.fromkeys(stores, captions / rate if rate else None)
    print_choices(caption_choices(stores, embedding, seconds), price)
    return stores[embedding]


def _measure(name: str, encoder: TokenizerFacts, texts: list[str], captions: int) -> FeatureSizes:
    """The features of an encoder for captions like these; prints their lengths."""
    rows, cut = encoder.tokenize(texts)
    lengths = np.array([len(row) for row in rows])
    error = lengths.std() / np.sqrt(len(lengths))
    measured = f"measured on {len(texts):,} of the source's, {100 * np.mean(cut):.1f} % truncated"
    of = f" of {name}" if name else ""
    print(f"captions  {captions:,} of {lengths.mean():.1f} +- {error:.1f} tokens{of} ({measured})")
    return FeatureSizes(encoder.dim, float(lengths.mean()), encoder.pooled_dim if name else 0)


def caption_choices(
    stores: Mapping[str, CaptionEstimate], chosen: str, seconds: Mapping[str, float | None]
) -> list[Choice]:
    """A row for each dtype of features, from its estimate and its seconds of preparation.

    Texts alone have one row.
    """
    if not stores[chosen].has_features:
        return [Choice("captions, text only", stores[chosen].bytes, seconds[chosen], True)]
    return [
        Choice(f"captions, {name}", store.bytes, seconds[name], name == chosen)
        for name, store in stores.items()
    ]


def _print_stores(estimate: CaptionEstimate) -> None:
    for name, store in estimate.stores.items():
        of = f" of {name}" if name else ""
        print(
            f"store     {size_text(store.bytes)} in {store.shards:,} shards of"
            f" {store.shard_size:,} captions, {size_text(store.bytes / store.shards)} each{of}"
        )
        if store.dim:
            pooled = f", {store.pooled_dim} of the pooled vector" if store.pooled_dim else ""
            print(
                f"          {store.dim} features per token in {store.embedding}{pooled},"
                f" {size_text(store.uncompressed)} uncompressed; zstd leaves about"
                f" {ZSTD_LEAVES[store.embedding]:g} of it"
            )


def _print_time(size: float, captions: int, rate: float, chips: int) -> None:
    hours = captions / rate / 3600
    print(
        f"time      {hours:,.1f} h at {rate:,g} captions per second"
        + (f", {hours * chips:,.0f} chip-hours on {chips} chips" if chips else "")
    )
    print(f"          and {size_text(size / captions * rate)} per second to write")


def spread(source: Source, count: int) -> list[int]:
    """At most `count` indices of items, evenly spaced over the source."""
    return np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()
