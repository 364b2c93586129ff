"""Batches for training and evaluation from a prepared directory.

The global batch of step n is a pure function of (seed, n). No example is filtered. Grain's index
shuffle sets the order, and random choices use a generator keyed by the example's position. A run
therefore needs only its step number to resume, on any number of hosts and workers.
"""

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, Shaped, UInt8

from imagen_jax.data import transforms
from imagen_jax.data.example_text import ExampleText, StoredText, TextOf
from imagen_jax.data.records import ImageStore, Prepared, open_once
from imagen_jax.text_inputs import UNNAMED, TextInput

Batch = dict[str, Shaped[np.ndarray, "b ..."]]
Example = dict[str, Shaped[np.ndarray | np.generic, "..."]]  # one row of a batch
Pixels = UInt8[np.ndarray, "s s 3"]
_CENTRE = (0.5, 0.5)
# Per reading process: 2 threads, and up to 4 prefetched batches.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class _PixelCache:
    """Cache of decoded images at the stage's size and their caption ids, limited in bytes.

    It never evicts: in a shuffled epoch every image is equally likely to be needed next. A pickled
    copy, in a worker process, starts empty.
    """

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._used = 0
        self._rows: dict[int, tuple[Pixels, tuple[int, ...]]] = {}

    def __reduce__(self):
        return _PixelCache, (self._limit,)

    def get(self, row: int) -> tuple[Pixels, tuple[int, ...]] | None:
        return self._rows.get(row)

    def put(self, row: int, pixels: Pixels, caption_ids: tuple[int, ...]) -> None:
        with self._lock:
            if row not in self._rows and self._used + pixels.nbytes <= self._limit:
                self._used += pixels.nbytes
                self._rows[row] = (pixels, caption_ids)


@dataclasses.dataclass(frozen=True)
class _Examples(grain.transforms.RandomMap):
    """Maps the row of an image to the arrays of one example.

    The sizes, `decode` and `flip` are fields of the config's section `data`.
    text_of: caption id -> the text fields of the example.
    random_caption: use a random caption of the image; otherwise its first one.
    """

    images: ImageStore
    text_of: TextOf
    image_size: int
    lowres_size: int
    crop_size: int
    decode: str
    flip: bool
    random_caption: bool
    cache: _PixelCache

    def random_map(self, row: int, rng: np.random.Generator) -> Example:
        # All four are always drawn, so that disabling one choice does not change the others.
        caption, top, left, mirror = rng.random(4).tolist()
        return self.make(
            row, caption if self.random_caption else 0.0, (top, left), self.flip and mirror < 0.5
        )

    def make(self, row: int, caption: float, corner: tuple[float, float], mirror: bool) -> Example:
        """Returns one example.

        caption: position among the image's captions, as a fraction in [0, 1).
        corner: position of the crop, as fractions in [0, 1).
        """
        full_image, caption_ids = self._full_image(row)
        caption_id = caption_ids[int(caption * len(caption_ids))]
        example = {
            **self.text_of(caption_id),
            "index": np.int64(row),
            "caption_id": np.int64(caption_id),
        }
        for name, pixels in self._crop_with_lowres(full_image, corner).items():
            example[name] = np.ascontiguousarray(pixels[:, ::-1] if mirror else pixels)
        return example

    def image(self, row: int) -> Pixels:
        """The image as in `eval_rows`: cropped at the centre, not mirrored."""
        return self._crop_with_lowres(self._full_image(row)[0], _CENTRE)["image"]

    def _crop_with_lowres(self, full_image: Pixels, corner: tuple[float, float]) -> Example:
        lowres_or_full_size = self.lowres_size or self.image_size
        image, lowres = transforms.crop_pair(
            full_image, lowres_or_full_size, self.crop_size or self.image_size, corner
        )
        return {"image": image, "lowres": lowres} if self.lowres_size else {"image": image}

    def _full_image(self, row: int) -> tuple[Pixels, tuple[int, ...]]:
        cached = self.cache.get(row)
        if cached is not None:
            return cached
        stored = self.images[row]
        pixels = transforms.decode_square(stored.image, self.image_size, self.decode)
        self.cache.put(row, pixels, stored.caption_ids)
        return pixels, stored.caption_ids


@dataclasses.dataclass(frozen=True)
class _Part:
    """Grain source: the given rows of every global batch of `size`, from step `start` on."""

    stream: grain.MapDataset
    size: int
    start: int
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return (len(self.stream) // self.size - self.start) * len(self.rows)

    def __getitem__(self, i: int) -> Example:
        step, row = divmod(i, len(self.rows))
        return self.stream[(self.start + step) * self.size + self.rows[row]]


def open_prepared(data_cfg: Mapping[str, Any]) -> Prepared:
    """Opens the data at data_cfg["path"], once per process.

    Raises:
      ValueError: there is no prepared data, or it does not match the other fields.
    """
    transforms.check_sizes(data_cfg)
    prepared = open_once(data_cfg["path"])
    prepared.check_image_size(data_cfg["image_size"])
    return prepared


def _examples(
    data_cfg: Mapping[str, Any], split: str, text: ExampleText | None = None
) -> _Examples:
    prepared = open_prepared(data_cfg)
    text = text or StoredText([TextInput(UNNAMED, 0, data_cfg["text_length"])])
    return _Examples(
        images=prepared.images(split),
        text_of=text.open(prepared),
        image_size=data_cfg["image_size"],
        lowres_size=data_cfg["lowres_size"],
        crop_size=data_cfg["crop_size"],
        decode=data_cfg["decode"],
        flip=data_cfg["flip"],
        random_caption=data_cfg["caption"] == "random",
        cache=_PixelCache((data_cfg["cache_mib"] << 20) // max(1, data_cfg["workers"])),
    )


def batches(
    data_cfg: Mapping[str, Any],
    seed: int,
    start_step: int,
    split: str = "train",
    rows: Sequence[int] | None = None,
    text: ExampleText | None = None,
) -> Iterator[Batch]:
    """Yields the batches of steps start_step, start_step + 1, ... indefinitely.

    The global batch of a step does not depend on the number of processes. Each image appears once
    per epoch; an epoch may end inside a batch. Call `.close()` when done.

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
      image uint8 [b s s 3]; lowres uint8 [b r r 3], if lowres_size > 0; the text fields, such as
      text bfloat16 [b l d], padded with zeros, and text_mask bool [b l]; index int64 [b], the row
      in the image store; caption_id int64 [b]. s is image_size, r is lowres_size and l the input's
      length. With crop_size > 0, s is crop_size and r is crop_size * lowres_size / image_size.

    Raises:
      ValueError: the data is not prepared or does not match data_cfg, or a shard is damaged.
    """
    size = data_cfg["batch_size"]
    examples = _examples(data_cfg, split, text)
    examples_stream = (
        grain.MapDataset.range(len(examples.images))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(examples)
    )
    part = _Part(examples_stream, size, start_step, tuple(range(size) if rows is None else rows))
    batches_stream = grain.MapDataset.source(part).batch(len(part.rows), drop_remainder=True)
    reader = batches_stream.to_iter_dataset(_READ)
    if data_cfg["workers"]:
        _mark_flags_parsed()
        reader = reader.mp_prefetch(grain.MultiprocessingOptions(num_workers=data_cfg["workers"]))
    return iter(reader)


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
    examples = _examples(data_cfg, split)
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
    """Returns the given rows as one batch, without random choices.

    Each row has its first caption and a centre crop, and is not mirrored. The keys are those of
    `batches`, with the same `text`.
    """
    examples = _examples(data_cfg, split, text)
    rows = [examples.make(int(row), 0.0, _CENTRE, False) for row in indices]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
