"""Images by aspect ratio: the bucket of each image, and the rows of each bucket, on disk."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt32

from imagen_jax.data.image_sizes import ImageSizes, open_sizes
from imagen_jax.data.index_files import MappedArray, build_once, cache_directory
from imagen_jax.data.records import ImageRow, Prepared
from imagen_jax.data.views import TOLERANCE
from imagen_jax.stage_sizes import Size, size_text

FORMAT_VERSION = 2  # of the file of rows
_DIGEST_WORDS = 8  # SHA-256, as uint32, at the end of that file
_HASHED = 1 << 20  # words that are hashed at once


@dataclasses.dataclass(frozen=True)
class BucketRows:
    """The rows of the images in one bucket, ascending; a part of a file that all buckets share."""

    mapped: MappedArray
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        if not 0 <= number < self.count:
            raise IndexError(f"a bucket of {self.count} images has no image {number}")
        return int(self.mapped.array[self.start + number])


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The images of one bucket.

    rows: of the bucket. sizes: of all images, to be compared. buckets: all of them. number: of this
    one.
    """

    rows: BucketRows
    sizes: ImageSizes
    buckets: tuple[Size, ...]
    number: int

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> int:
        """The row of an image of this bucket. Raises ValueError if there is no such row."""
        row = self.rows[number]
        if row >= len(self.sizes):
            raise ValueError(f"{self.rows.mapped.path} is damaged: remove it; it is written again")
        return row

    def check(self, row: int, stored: ImageRow) -> None:
        """Raises ValueError unless a record has its known size, and belongs to the bucket."""
        self.sizes.check(row, stored)
        size = np.array([(stored.height, stored.width)], np.uint32)
        if int(nearest(size, self.buckets)[0]) != self.number:
            raise ValueError(
                f"{self.rows.mapped.path} is damaged: row {row} is {stored.height}x{stored.width},"
                f" not an image of bucket {size_text(self.buckets[self.number])}; remove it; it is"
                " written again"
            )


def nearest(sizes: UInt32[np.ndarray, "n 2"], buckets: Sequence[Size]) -> Int[np.ndarray, " n"]:
    """The bucket of each image: that with the nearest aspect ratio, |log ratio|; ties to the first.

    Ratios of whole numbers are compared, not their logarithms, so all machines agree.
    """
    height, width = sizes.astype(np.int64).T
    far = []
    for bucket_height, bucket_width in buckets:
        a, b = height * bucket_width, width * bucket_height
        far.append(np.maximum(a, b) / np.minimum(a, b))
    return np.argmin(far, axis=0)


def too_small(
    sizes: UInt32[np.ndarray, "n 2"],
    of: Int[np.ndarray, " n"],
    buckets: Sequence[Size],
    scale: float,
) -> Bool[np.ndarray, " n"]:
    """Whether the smallest window of an image, of `scale`, does not cover its bucket's size.

    of: the bucket of each image.
    """
    return (sizes * scale < np.array(buckets)[of] - TOLERANCE).any(axis=1)


def open_buckets(
    prepared: Prepared, split: str, buckets: Sequence[Size], scale: float
) -> list[Bucket]:
    """The images of each bucket.

    The rows are in a file in the directory for temporary files, named by what they depend on, also
    the sizes: the file of sizes may be replaced. A damaged file is written again.

    scale: of the smallest window, see `views.smallest_scale`.

    Raises ValueError if an image is too small for its bucket.
    """
    sizes = open_sizes(prepared, split)
    key = json.dumps([FORMAT_VERSION, prepared.hash, split, buckets, scale, sizes.sha256()])
    name = f"buckets-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    path = cache_directory() / name
    build_once(
        path,
        lambda temporary: _write(temporary, prepared, sizes, buckets, scale),
        lambda found: _is_intact(found, len(sizes) + len(buckets)),
    )
    mapped, every = MappedArray(path), tuple(buckets)
    counts = mapped.array[len(sizes) : -_DIGEST_WORDS].tolist()
    starts = np.cumsum([0, *counts]).tolist()
    parts = enumerate(zip(starts, counts))
    return [Bucket(BucketRows(mapped, *part), sizes, every, i) for i, part in parts]


def _write(
    path: Path, prepared: Prepared, sizes: ImageSizes, buckets: Sequence[Size], scale: float
) -> None:
    """Writes uint32 [images + buckets + 8]: the rows, bucket by bucket, the buckets' counts, and
    the SHA-256 of both.
    """
    counts, small = np.zeros(len(buckets), np.int64), 0
    for _, part in sizes.chunks():
        of = nearest(part, buckets)
        counts += np.bincount(of, minlength=len(buckets))
        small += int(too_small(part, of, buckets, scale).sum())
    if small:
        raise ValueError(_small_images(prepared, small, len(sizes), buckets, scale))
    words = len(sizes) + len(buckets)
    rows = np.lib.format.open_memmap(path, "w+", np.uint32, (words + _DIGEST_WORDS,))
    ends = np.cumsum(counts) - counts
    for start, part in sizes.chunks():
        of = nearest(part, buckets)
        for bucket in range(len(buckets)):
            here = np.flatnonzero(of == bucket) + start
            rows[ends[bucket] : ends[bucket] + len(here)] = here
            ends[bucket] += len(here)
    rows[len(sizes) : words] = counts
    rows[words:] = _digest(rows[:words])
    rows.flush()


def _digest(words: UInt32[np.ndarray, " n"]) -> UInt32[np.ndarray, " 8"]:
    digest = hashlib.sha256()
    for start in range(0, len(words), _HASHED):
        digest.update(words[start : start + _HASHED].tobytes())
    return np.frombuffer(digest.digest(), np.uint32)


def _is_intact(path: Path, words: int) -> bool:
    """Whether a file of rows has so many words, and their checksum."""
    try:
        found = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        return False
    if found.shape != (words + _DIGEST_WORDS,) or found.dtype != np.uint32:
        return False
    return np.array_equal(found[words:], _digest(found[:words]))


def _small_images(
    prepared: Prepared, small: int, total: int, buckets: Sequence[Size], scale: float
) -> str:
    enough = math.ceil(max(map(max, buckets)) / scale - TOLERANCE)
    smaller = f" at data.view_scale[0] = {scale:g}" if scale != 1.0 else ""
    return (
        f"{prepared.path} has {small:,} of {total:,} images that do not cover the size of their"
        f" bucket in data.buckets{smaller}: give smaller buckets, or prepare with --min_size; any"
        f" image with sides of {enough} or more is large enough"
    )
