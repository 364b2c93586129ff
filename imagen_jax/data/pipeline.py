"""Batches for training and evaluation from prepared directories.

The global batch of step n is a pure function of (seed, n). No example is filtered. Grain's index
shuffle sets the order, and random choices use a generator keyed by the example's position. A run
therefore needs only its step number to resume, on any number of hosts and workers.

With data.mixture, every set has an order of its own, and positions are given to the sets in turn,
by weight. With data.buckets, every set has an order of its own in each bucket, and whole batches
are given to the buckets in turn, by their share of the images.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, Shaped, UInt8

from imagen_jax.data import sets, transforms, views
from imagen_jax.data.buckets import Bucket, open_buckets
from imagen_jax.data.example_text import ExampleText, StoredFeatures
from imagen_jax.data.examples import MIDDLE, Example, Examples, PixelCache
from imagen_jax.data.mixing import Mixed, interleave, stream_seed, whole_weights
from imagen_jax.data.records import Prepared, open_once
from imagen_jax.data.shard_cache import CopyAhead, Place, check_room
from imagen_jax.stage_sizes import Size, of_images, size_text
from imagen_jax.text_inputs import UNNAMED, TextInput

Batch = dict[str, Shaped[np.ndarray, "b ..."]]
# Per reading process: 2 threads, and up to 4 prefetched batches.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class _BatchRows:
    """Grain source: the given rows of every global batch of `size`, from step `start` on.

    streams: the examples of each bucket, infinite. weights: of the buckets, see `interleave`.
    """

    streams: Sequence[Mixed]
    weights: Sequence[int]
    size: int
    start: int
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return (sys.maxsize // self.size - self.start) * len(self.rows)

    def __getitem__(self, i: int) -> Example:
        step, row = divmod(i, len(self.rows))
        bucket, turn = interleave(self.start + step, self.weights)
        return self.streams[bucket][turn * self.size + self.rows[row]]


@dataclasses.dataclass(frozen=True)
class BucketShare:
    """One bucket of a run. size: height and width of its images. images: in all sets together.

    batches: the share of the steps whose batch is of this bucket.
    """

    size: Size
    images: int
    batches: float

    def __str__(self) -> str:
        share = f"{100 * self.batches:.3g} % of the batches"
        return f"bucket {size_text(self.size)}: {self.images:,} images, {share}"


@dataclasses.dataclass(frozen=True)
class _SetBuckets:
    """What one set has for each bucket of a run.

    counts: images of each bucket. buckets: the images; None: the only bucket has all of them.
    """

    prepared: Prepared
    weight: Fraction
    counts: Sequence[int]
    buckets: Sequence[Bucket | None]

    def share(self, bucket: int) -> Fraction:
        """The weight of the set's images in a bucket."""
        return self.weight * Fraction(self.counts[bucket], sum(self.counts))


def open_directory(data_cfg: Mapping[str, Any], path: str) -> Prepared:
    """Opens prepared data at a path once, with the shard cache of a config section `data`."""
    return open_once(path, Place.of(data_cfg))


def open_prepared(data_cfg: Mapping[str, Any]) -> Prepared:
    """Opens the only set of `data_cfg`, once per process, to read whole squares from it.

    `sets.DataSet.config` makes such a section from one with a mixture.

    Raises:
      ValueError: there is no prepared data, or it does not match the other fields, or there are
        several sets.
    """
    transforms.check_sizes(data_cfg)
    only, *more = sets.data_sets(data_cfg)
    if more:
        raise ValueError("data.mixture has several directories: read one of them at a time")
    prepared = open_directory(data_cfg, only.path)
    prepared.check_image_size(data_cfg["image_size"])
    return prepared


def open_sets(data_cfg: Mapping[str, Any]) -> tuple[Prepared, ...]:
    """Opens all sets of `data_cfg` for training: one for data.path, or those of data.mixture.

    Raises:
      ValueError: there is no prepared data, or it does not match the other fields. With buckets,
        `bucket_shares` compares the images with their sizes.
    """
    transforms.check_sizes(data_cfg)
    opened = tuple(open_directory(data_cfg, one.path) for one in sets.data_sets(data_cfg))
    for prepared in () if data_cfg["buckets"] else opened:
        views.check_squares(prepared, data_cfg)
    return opened


def identity(data_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the data of a run, for the checkpoints' meta.

    manifest_hash: that of the manifest; with data.mixture, the SHA-256 of those of the sets, joined
    in order, which are then in mixture_hashes.
    """
    hashes = [open_directory(data_cfg, one.path).hash for one in sets.data_sets(data_cfg)]
    if not data_cfg["mixture"]:
        return {"manifest_hash": hashes[0]}
    joined = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return {"manifest_hash": joined, "mixture_hashes": hashes}


def bucket_shares(data_cfg: Mapping[str, Any]) -> tuple[BucketShare, ...]:
    """The images of each bucket that has some, and how often it comes; () without data.buckets.

    The first call for data of earlier versions reads all records, to learn the images' sizes.

    Raises ValueError if an image is too small for its bucket.
    """
    if not data_cfg["buckets"]:
        return ()
    found = _set_buckets(data_cfg, "train")
    total = sum(one.weight for one in found)
    shares = [
        BucketShare(
            size,
            sum(one.counts[i] for one in found),
            float(sum(one.share(i) for one in found) / total),
        )
        for i, size in enumerate(of_images(data_cfg))
    ]
    return tuple(share for share in shares if share.images)


def _set_buckets(data_cfg: Mapping[str, Any], split: str) -> list[_SetBuckets]:
    """The images of every set, by bucket."""
    found = []
    for one, prepared in zip(sets.data_sets(data_cfg), open_sets(data_cfg), strict=True):
        if data_cfg["buckets"]:
            scale = views.smallest_scale(data_cfg)
            buckets = open_buckets(prepared, split, of_images(data_cfg), scale)
            counts = [*map(len, buckets)]
        else:
            buckets, counts = [None], [len(prepared.images(split))]
        found.append(_SetBuckets(prepared, Fraction(one.weight), counts, buckets))
    return found


def _text(data_cfg: Mapping[str, Any], text: ExampleText | None) -> ExampleText:
    return text or StoredFeatures([TextInput(UNNAMED, 0, data_cfg["text_length"])])


def _cache(data_cfg: Mapping[str, Any]) -> PixelCache:
    return PixelCache((data_cfg["cache_mib"] << 20) // max(1, data_cfg["workers"]))


def _streams(
    data_cfg: Mapping[str, Any], seed: int, split: str, text: ExampleText | None
) -> tuple[list[Mixed], tuple[int, ...]]:
    """(the examples of each bucket that has images, the weights of these buckets)."""
    found, cache = _set_buckets(data_cfg, split), _cache(data_cfg)
    texts = [_text(data_cfg, text).open(one.prepared) for one in found]
    several_sets = bool(data_cfg["mixture"])

    def shuffled(position: int, i: int, target: Size) -> grain.MapDataset:
        """The examples of bucket i of the set at this position of the mixture."""
        one = found[position]
        which = position if several_sets else None
        stored = one.prepared.images(split), texts[position]
        examples = Examples(*stored, data_cfg, target, cache, which, one.buckets[i])
        # Runs from before mixtures and buckets used `seed` itself, and must resume.
        plain = not several_sets and not data_cfg["buckets"]
        return _shuffled(examples, one.counts[i], seed if plain else stream_seed(seed, position, i))

    streams, weights = [], []
    for i, target in enumerate(of_images(data_cfg)):
        members = [position for position, one in enumerate(found) if one.counts[i]]
        if members:
            shares = [found[position].share(i) for position in members]
            own = [shuffled(position, i, target) for position in members]
            streams.append(Mixed(own, whole_weights(shares)))
            weights.append(sum(shares))
    return streams, whole_weights(weights)


def _shuffled(examples: Examples, count: int, seed: int) -> grain.MapDataset:
    """The examples of the numbers below `count`, each once an epoch, without end."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat().random_map(examples)


def _plain(data_cfg: Mapping[str, Any], split: str, text: ExampleText | None = None) -> Examples:
    """The examples of an evaluation: whole squares of one set."""
    prepared = open_prepared(data_cfg)
    size = data_cfg["image_size"]
    text_of = _text(data_cfg, text).open(prepared)
    return Examples(prepared.images(split), text_of, data_cfg, (size, size), _cache(data_cfg))


def batches(
    data_cfg: Mapping[str, Any],
    seed: int,
    start_step: int,
    split: str = "train",
    rows: Sequence[int] | None = None,
    text: ExampleText | None = None,
) -> Iterator[Batch]:
    """Yields the batches of steps start_step, start_step + 1, ... indefinitely.

    The global batch of a step does not depend on the number of processes. Each image of a set
    appears once per epoch of the set, with buckets once per epoch of its bucket; an epoch may end
    inside a batch. Call `.close()` when done.

    Args:
      data_cfg: the config's section `data`; imagen_jax/schema.py describes its fields. batch_size
        is that of the global batch. cache_mib is shared by all workers of this process.
      split: "train" or "heldout".
      seed: seed of the order and of the random choices, in [0, 2^32).
      start_step: the first step.
      rows: the rows of each global batch that this process reads, in this order; None: all of them.
      text: how the text fields are read; None: the features of the only encoder, padded to
        text_length.

    Yields:
      image uint8 [b h w 3]; lowres uint8 [b k q 3], if lowres_size > 0; the text fields, such as
      text bfloat16 [b l d], padded with zeros, and text_mask bool [b l]; index int64 [b], the row
      in the image store; caption_id int64 [b]; with data.mixture, set int64 [b], the position in
      the mixture of the set that `index` and `caption_id` refer to. l is the input's length. h and
      w are image_size, or crop_size if it is not 0, or the size of the step's bucket. k and q are
      h and w times lowres_size / image_size.

    Raises:
      ValueError: the data is not prepared or does not match data_cfg, or a shard is damaged.
    """
    size = data_cfg["batch_size"]
    streams, weights = _streams(data_cfg, seed, split, text)
    ahead = _copy_ahead(data_cfg, split)
    rows = tuple(range(size) if rows is None else rows)
    source = _BatchRows(streams, weights, size, start_step, rows)
    batches_stream = grain.MapDataset.source(source).batch(len(rows), drop_remainder=True)
    reader = batches_stream.to_iter_dataset(_READ)
    if data_cfg["workers"]:
        _mark_flags_parsed()
        reader = reader.mp_prefetch(grain.MultiprocessingOptions(num_workers=data_cfg["workers"]))
    return _Reading(iter(reader), ahead) if ahead else iter(reader)


def _copy_ahead(data_cfg: Mapping[str, Any], split: str) -> CopyAhead | None:
    """Begins to copy the shards in buckets that the batches of a split need; None without any."""
    opened = [open_directory(data_cfg, one.path) for one in sets.data_sets(data_cfg)]
    wanted = [
        (prepared.shard_cache, prepared.entries_of_opened(split))
        for prepared in opened
        if prepared.shard_cache
    ]
    if not wanted:
        return None
    check_room(wanted)
    return CopyAhead(wanted)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """An iterator over batches that ends copying when it is closed."""

    batches: Iterator[Batch]
    ahead: CopyAhead

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self.batches)

    def close(self) -> None:
        """Ends reading and copying."""
        self.ahead.close()
        self.batches.close()


def _mark_flags_parsed() -> None:
    """Marks absl flags as parsed.

    Grain's workers read them, and nothing parses them outside absl.app.run.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def eval_images(
    data_cfg: Mapping[str, Any], indices: Sequence[int], split: str
) -> UInt8[np.ndarray, "n s s 3"]:
    """Returns only the images of `eval_rows`, uint8 [n s s 3]; reads no text."""
    examples = _plain(data_cfg, split)
    return np.stack([examples.image(int(row)) for row in indices])


def eval_caption_ids(
    data_cfg: Mapping[str, Any], indices: Sequence[int], split: str
) -> Int[np.ndarray, " n"]:
    """Returns only `caption_id` of `eval_rows`; decodes no image."""
    images = open_prepared(data_cfg).images(split)
    return np.array([images[int(row)].caption_ids[0] for row in indices], np.int64)


def eval_rows(
    data_cfg: Mapping[str, Any],
    indices: Sequence[int],
    split: str,
    text: ExampleText | None = None,
) -> Batch:
    """Returns the given rows of a single set as one batch, without random choices.

    Each row has its first caption and a centre crop of the centre square, whatever data.view and
    data.buckets are, and is not mirrored. The keys are those of `batches`, with the same `text`.
    """
    examples = _plain(data_cfg, split, text)
    rows = [examples.make(int(row), 0.0, MIDDLE, False) for row in indices]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
