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
    """The estimate of a caption store.

    tokens, text_bytes: means over the captions. dim: features a token. embedding: their dtype.
    """

    captions: float
    tokens: float
    text_bytes: float
    dim: int
    shard_size: int
    embedding: str

    @property
    def uncompressed(self) -> float:
        """Bytes of features and text: an upper bound without the records' frames."""
        return self.captions * (
            self.tokens * token_bytes(self.dim, self.embedding) + self.text_bytes
        )

    @property
    def bytes(self) -> float:
        """Bytes on disk, with the features compressed to ZSTD_LEAVES of their size."""
        features = self.tokens * token_bytes(self.dim, self.embedding, ZSTD_LEAVES[self.embedding])
        return (
            self.captions * (features + self.text_bytes + RECORD_BYTES) + self.shards * SHARD_BYTES
        )

    @property
    def shards(self) -> int:
        return math.ceil(self.captions / self.shard_size)


def preview_captions(
    source: Source,
    tokenize: Callable[[list[str]], tuple[list[list[int]], list[bool]]],
    dim: int,
    captions: int,
    shard_size: int,
    embedding: str,
    rate: float,
    chips: int,
    price: float,
) -> StoreEstimate:
    """Prints the size of a store of `captions` distinct captions like those of the source.

    It encodes nothing.

    Args:
      tokenize: the tokenize function of text.encoder.TextEncoder.
      embedding: the chosen dtype of the stored features, of records.EMBEDDINGS.
      rate: total captions per second of all `chips`; 0 if unknown.
      price: storage price per GiB and month; 0 if unknown.

    Returns:
      The estimate with the chosen dtype.
    """
    indices = spread(source, _CAPTIONS)
    usable = [text for i in indices for text in checks.usable_captions(source[i].captions)[0]]
    texts = list(dict.fromkeys(usable))
    if not texts:
        raise ValueError(f"no caption in {len(indices)} items of {source.describe()}")
    rows, cut = tokenize(texts)
    lengths = np.array([len(row) for row in rows])
    text_bytes = np.mean([len(text.encode()) for text in texts])
    stores = {
        name: StoreEstimate(captions, lengths.mean(), text_bytes, dim, shard_size, name)
        for name in records.EMBEDDINGS
    }
    error = lengths.std() / np.sqrt(len(lengths))
    measured = f"measured on {len(texts):,} of the source's, {100 * np.mean(cut):.1f} % truncated"
    print(f"captions  {captions:,} of {lengths.mean():.1f} +- {error:.1f} tokens ({measured})")
    _print_store(stores[embedding], images=captions * len(indices) / len(usable))
    if rate:
        _print_time(stores[embedding], rate, chips)
    seconds = dict.fromkeys(stores, captions / rate if rate else None)
    print_choices(caption_choices(stores, embedding, seconds), price)
    return stores[embedding]


def caption_choices(
    stores: Mapping[str, StoreEstimate], chosen: str, seconds: Mapping[str, float | None]
) -> list[Choice]:
    """A row for each dtype of features, from its estimate and its seconds of preparation."""
    return [
        Choice(f"captions, {name}", store.bytes, seconds[name], name == chosen)
        for name, store in stores.items()
    ]


def _print_store(store: StoreEstimate, images: float) -> None:
    print(
        f"store     {size_text(store.bytes)} in {store.shards:,} shards of {store.shard_size:,}"
        f" captions, {size_text(store.bytes / store.shards)} each"
    )
    print(
        f"          {store.dim} features per token in {store.embedding},"
        f" {size_text(store.uncompressed)} uncompressed; zstd leaves about"
        f" {ZSTD_LEAVES[store.embedding]:g} of it"
    )
    work = images * WORK_BYTES / 2**30
    print(f"work      about {work:,.1f} GiB of files until the end, for {images:,.0f} images")


def _print_time(store: StoreEstimate, rate: float, chips: int) -> None:
    hours = store.captions / rate / 3600
    print(
        f"time      {hours:,.1f} h at {rate:,g} captions per second"
        + (f", {hours * chips:,.0f} chip-hours on {chips} chips" if chips else "")
    )
    print(f"          and {size_text(store.bytes / store.captions * rate)} per second to write")


def spread(source: Source, count: int) -> list[int]:
    """At most `count` indices of items, evenly spaced over the source."""
    return np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()
