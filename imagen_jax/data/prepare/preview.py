"""What preparing data will take: of a source, from a sample of it; of a caption store of any size,
from the lengths of some captions.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from imagen_jax.data.prepare import checks
from imagen_jax.data.sources.source import Source

_IMAGES = 64  # decoded and encoded for the preview of a source
_CAPTIONS = (
    4096  # items of the source whose captions are measured for the preview of a caption store
)
# a process's memory for an image and its captions when it decides what is kept (measured: 970 with
# one caption, 1110 with two)
PLAN_BYTES = 1000
# Measured on stores of 64 to 4096 features a token: what zstd leaves of bfloat16 features (of
# t5_tiny's and of normal noise alike), a record's frame, a shard's last block.
ZSTD_LEAVES = 0.78
RECORD_BYTES = 250
SHARD_BYTES = 2**15


def preview(source: Source, encoder, settings: Any, crew: int = 1) -> int:
    """Check and encode a sample, print what the whole will take with `crew` such processes as this
    one, return the estimated bytes.

    settings: `processes` for images in each, `min_size`, `batch_size`.
    """
    if not len(source):
        raise ValueError(f"the source is empty: {source.describe()}")
    indices = _spread(source, _IMAGES)
    start = time.monotonic()
    found = [checks.check(source[i], settings.min_size) for i in indices]
    check_time = 2 * (time.monotonic() - start)  # a second time when the images are written
    usable = [item for item in found if not item.reason]
    captions = [caption for item in usable for caption in item.captions]
    cut, text_time, text_bytes = 0, 0.0, 0
    if captions:
        cut = sum(encoder.tokenize(captions)[1])
        encoder.encode(captions, settings.batch_size)  # compiles
        start = time.monotonic()
        features = encoder.encode(captions, settings.batch_size)
        text_time = time.monotonic() - start
        text_bytes = sum(feature.nbytes for feature in features) + sum(
            len(text.encode()) for text in captions
        )
    scale = len(source) / len(indices)
    image_bytes = sum(item.size for item in usable)
    total = int(scale * (image_bytes + text_bytes))
    seconds = scale * (check_time / settings.processes + text_time) / crew
    print(
        f"sample    {len(indices)} of {len(source)} images: {len(usable)} usable, {len(captions)}"
        f" captions, {cut} of them cut"
    )
    print(f"images    about {scale * len(usable):.0f}, {scale * image_bytes / 2**20:.1f} MiB")
    print(
        f"captions  at most {scale * len(captions):.0f}, {scale * text_bytes / 2**20:.1f} MiB"
        f" ({encoder.dim} features a token)"
    )
    print(
        f"memory    about {len(source) * PLAN_BYTES / 2**30:.2f} GiB in each process for what is"
        " known of the images"
    )
    print(f"time      about {seconds:.0f} s with {crew} x {settings.processes} processes")
    return total


@dataclasses.dataclass(frozen=True)
class CaptionStore:
    """A caption store that does not exist: so many captions of so many tokens and bytes of text on
    average, `dim` features a token.
    """

    captions: int
    tokens: float
    text_bytes: float
    dim: int
    shard_size: int

    @property
    def uncompressed(self) -> float:
        """Bytes of features and text; the store is never larger by more than its records'
        frames.
        """
        return self.captions * (2 * self.dim * self.tokens + self.text_bytes)

    @property
    def bytes(self) -> float:
        """Bytes on disk, with what zstd is assumed to leave of the features."""
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
) -> CaptionStore:
    """Print what a store of `captions` distinct captions like the source's takes; nothing is
    encoded.

    tokenize: as text.encoder.TextEncoder's. rate: captions a second of all `chips` together, 0: not
    known. price: of a GiB for a month, 0: not known; none is assumed.
    """
    indices = _spread(source, _CAPTIONS)
    checked = [
        caption
        for i in indices
        for caption in (" ".join(text.split()) for text in source[i].captions)
        if caption and checks.is_text(caption)
    ]
    texts = list(dict.fromkeys(checked))
    if not texts:
        raise ValueError(f"no caption in {len(indices)} items of {source.describe()}")
    rows, cut = tokenize(texts)
    lengths = np.array([len(row) for row in rows])
    store = CaptionStore(
        captions, lengths.mean(), np.mean([len(text.encode()) for text in texts]), dim, shard_size
    )
    error = lengths.std() / np.sqrt(len(lengths))
    measured = f"measured on {len(texts):,} of the source's, {100 * np.mean(cut):.1f} % of them cut"
    print(f"captions  {captions:,} of {store.tokens:.1f} +- {error:.1f} tokens ({measured})")
    print(
        f"store     {_told(store.bytes)} in {store.shards:,} shards of {shard_size:,} captions,"
        f" {_told(store.bytes / store.shards)} each"
    )
    print(
        f"          {dim} features a token in bfloat16, {_told(store.uncompressed)}, of which zstd"
        f" is assumed to leave {ZSTD_LEAVES:g}"
    )
    images = captions * len(indices) / len(checked)
    print(
        f"memory    about {images * PLAN_BYTES / 2**30:,.1f} GiB in each process for what is known"
        f" of {images:,.0f} images"
    )
    if rate:
        hours = captions / rate / 3600
        print(
            f"time      {hours:,.1f} h at {rate:,g} captions a second"
            + (f", {hours * chips:,.0f} chip-hours on {chips} chips" if chips else "")
        )
        print(f"          which is {_told(store.bytes / captions * rate)} a second to be written")
    if price:
        print(f"price     {store.bytes / 2**30 * price:,.0f} a month at {price:g} a GiB and month")
    return store


def _spread(source: Source, count: int) -> list[int]:
    return np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()


def _told(size: float) -> str:
    unit = min(max(int(math.log2(max(size, 1)) // 10), 2), 4)
    return f"{size / 2 ** (10 * unit):,.1f} {('MiB', 'GiB', 'TiB')[unit - 2]}"
