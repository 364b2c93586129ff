"""Estimates of the size and time of prepared data, before it is prepared.

`preview` measures a sample of a source. `preview_captions` scales a caption store to any size from
the lengths of some captions.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from imagen_jax.data.prepare import checks
from imagen_jax.data.sources.source import Source

_IMAGES = 64  # items that `preview` decodes and encodes
_CAPTIONS = 4096  # items whose captions `preview_captions` measures
# Work files for an image with one caption of 60 characters, which are removed at the end: checks
# (270), the selection's database (340) and plan (95).
WORK_BYTES = 700
# Measured on stores of 64 to 4096 features a token: zstd's compressed fraction of bfloat16 features
# (the same for t5_tiny's and for normal noise), a record's frame, a shard's last block.
ZSTD_LEAVES = 0.78
RECORD_BYTES = 250
SHARD_BYTES = 2**15


def preview(source: Source, encoder, settings: Any, crew: int = 1) -> int:
    """Checks and encodes a sample, and prints size and time of the whole.

    Args:
      encoder: None if captions are not encoded now.
      settings: `processes` (for images, in each process of the crew), `min_size`, `resize`,
        `batch_size`.
      crew: number of processes such as this one.

    Returns:
      The estimated bytes.
    """
    if not len(source):
        raise ValueError(f"the source is empty: {source.describe()}")
    indices = _spread(source, _IMAGES)
    start = time.monotonic()
    checked = [checks.check(source[i], settings.min_size, settings.resize) for i in indices]
    check_time = 2 * (time.monotonic() - start)  # images are decoded again when they are written
    usable = [item for item in checked if not item.reason]
    captions = [caption for item in usable for caption in item.captions]
    cut, text_time, text_bytes = _measure_encoding(encoder, captions, settings.batch_size)
    scale = len(source) / len(indices)
    image_bytes = sum(item.size for item in usable)
    seconds = scale * (check_time / settings.processes + text_time) / crew
    print(
        f"sample    {len(indices)} of {len(source)} images: {len(usable)} usable, {len(captions)}"
        f" captions, {cut} of them cut"
    )
    print(f"images    about {scale * len(usable):.0f}, {scale * image_bytes / 2**20:.1f} MiB")
    if encoder is not None:
        print(
            f"captions  at most {scale * len(captions):.0f}, {scale * text_bytes / 2**20:.1f} MiB"
            f" ({encoder.dim} features a token)"
        )
    print(f"work      about {len(source) * WORK_BYTES / 2**30:.2f} GiB of files until the end")
    _print_notes(source)
    print(f"time      about {seconds:.0f} s with {crew} x {settings.processes} processes")
    return int(scale * (image_bytes + text_bytes))


def _measure_encoding(encoder, captions: list[str], batch_size: int) -> tuple[int, float, int]:
    """Returns the number of cut captions, seconds, and bytes of features and text."""
    if not captions or encoder is None:
        return 0, 0.0, 0
    cut = sum(encoder.tokenize(captions)[1])
    encoder.encode(captions, batch_size)  # compiles
    start = time.monotonic()
    features = encoder.encode(captions, batch_size)
    seconds = time.monotonic() - start
    text_bytes = sum(len(text.encode()) for text in captions)
    return cut, seconds, sum(feature.nbytes for feature in features) + text_bytes


def _print_notes(source: Source) -> None:
    for note in source.notes():
        detail = note.get("detail") or f"{note['count']} files, such as {note['files'][0]}"
        print(f"not read  {note['id']}: {note['reason']}, {detail}")


@dataclasses.dataclass(frozen=True)
class StoreEstimate:
    """The estimate of a caption store.

    tokens, text_bytes: means over the captions. dim: features a token.
    """

    captions: int
    tokens: float
    text_bytes: float
    dim: int
    shard_size: int

    @property
    def uncompressed(self) -> float:
        """Bytes of features and text: an upper bound without the records' frames."""
        return self.captions * (2 * self.dim * self.tokens + self.text_bytes)

    @property
    def bytes(self) -> float:
        """Bytes on disk, with the features compressed to ZSTD_LEAVES of their size."""
        return (
            self.captions
            * (ZSTD_LEAVES * 2 * self.dim * self.tokens + self.text_bytes + RECORD_BYTES)
            + self.shards * SHARD_BYTES
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
    rate: float,
    chips: int,
    price: float,
) -> StoreEstimate:
    """Prints the size of a store of `captions` distinct captions like those of the source.

    It encodes nothing.

    Args:
      tokenize: the tokenize function of text.encoder.TextEncoder.
      rate: total captions per second of all `chips`; 0 if unknown.
      price: storage price per GiB and month; 0 if unknown.
    """
    indices = _spread(source, _CAPTIONS)
    usable = [text for i in indices for text in checks.usable_captions(source[i].captions)[0]]
    texts = list(dict.fromkeys(usable))
    if not texts:
        raise ValueError(f"no caption in {len(indices)} items of {source.describe()}")
    rows, cut = tokenize(texts)
    lengths = np.array([len(row) for row in rows])
    store = StoreEstimate(
        captions, lengths.mean(), np.mean([len(text.encode()) for text in texts]), dim, shard_size
    )
    error = lengths.std() / np.sqrt(len(lengths))
    measured = f"measured on {len(texts):,} of the source's, {100 * np.mean(cut):.1f} % truncated"
    print(f"captions  {captions:,} of {store.tokens:.1f} +- {error:.1f} tokens ({measured})")
    _print_store(store, images=captions * len(indices) / len(usable))
    if rate:
        _print_time(store, rate, chips)
    if price:
        print(
            f"price     {store.bytes / 2**30 * price:,.0f} per month at {price:g} per GiB and month"
        )
    return store


def _print_store(store: StoreEstimate, images: float) -> None:
    print(
        f"store     {_size(store.bytes)} in {store.shards:,} shards of {store.shard_size:,}"
        f" captions, {_size(store.bytes / store.shards)} each"
    )
    print(
        f"          {store.dim} features per token in bfloat16, {_size(store.uncompressed)}"
        f" uncompressed; zstd leaves about {ZSTD_LEAVES:g} of it"
    )
    work = images * WORK_BYTES / 2**30
    print(f"work      about {work:,.1f} GiB of files until the end, for {images:,.0f} images")


def _print_time(store: StoreEstimate, rate: float, chips: int) -> None:
    hours = store.captions / rate / 3600
    print(
        f"time      {hours:,.1f} h at {rate:,g} captions per second"
        + (f", {hours * chips:,.0f} chip-hours on {chips} chips" if chips else "")
    )
    print(f"          and {_size(store.bytes / store.captions * rate)} per second to write")


def _spread(source: Source, count: int) -> list[int]:
    return np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()


def _size(size: float) -> str:
    unit = min(max(int(math.log2(max(size, 1)) // 10), 2), 4)
    return f"{size / 2 ** (10 * unit):,.1f} {('MiB', 'GiB', 'TiB')[unit - 2]}"
