"""Estimates of the size and time of prepared data from a sample, before it is prepared."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import BFloat16

from imagen_jax.data import records
from imagen_jax.data.prepare import checks
from imagen_jax.data.prepare.caption_estimate import (
    WORK_BYTES,
    StoreEstimate,
    caption_choices,
    spread,
    token_bytes,
)
from imagen_jax.data.prepare.captions import write_captions
from imagen_jax.data.prepare.choices import Choice, print_choices
from imagen_jax.data.prepare.resize import AS_IS, FORMATS, Resize
from imagen_jax.data.prepare.settings import Settings
from imagen_jax.data.sources.source import Source

_IMAGES = 64  # items that are decoded and encoded
_NOTES = 10  # lines about files that are not read
_SIDES = (64, 256, 1024)  # sizes of stored images that `dry_run` compares


@dataclasses.dataclass(frozen=True)
class Sample:
    """Measurements of some items of a source.

    scale: items of the source per item of the sample.
    checked: for each way to store the images, the usable items.
    check_s: for each way, the seconds of reading and checking one after the other.
    captions: all usable captions, with their features [l d].
    cut: number of captions that were truncated.
    encode_s: seconds of encoding.
    """

    count: int
    scale: float
    checked: dict[Resize, list[checks.Checked]]
    check_s: dict[Resize, float]
    captions: list[str]
    features: list[BFloat16[np.ndarray, "_ d"]]
    cut: int
    encode_s: float

    def image_bytes(self, resize: Resize) -> int:
        """Bytes of the sample's images if they are stored in this way."""
        return sum(item.size for item in self.checked[resize])

    def image_s(self, resize: Resize, processes: int) -> float:
        """Seconds for all images; each is decoded again when it is written."""
        return 2 * self.scale * self.check_s[resize] / processes

    def caption_bytes(self, dim: int, embedding: str) -> int:
        """Uncompressed bytes of the sample's features and texts."""
        tokens = sum(len(feature) for feature in self.features)
        text = sum(len(text.encode()) for text in self.captions)
        return int(tokens * token_bytes(dim, embedding)) + text


class Bytes(NamedTuple):
    """Estimated bytes: images as stored, captions with uncompressed features, work files."""

    images: int
    captions: int
    work: int


def preview(source: Source, encoder, settings: Settings, hosts: int = 1) -> Bytes:
    """Checks and encodes a sample, and prints size and time of the whole.

    Args:
      encoder: None if captions are not encoded now.
      settings: `processes` (for images, on each host), `min_size`, `resize`, `embedding`,
        `batch_size`.
      hosts: number of processes of the run.
    """
    sample = _take(source, encoder, settings, [settings.resize])
    size = _print_sample(source, sample, encoder, settings)
    images = sample.image_s(settings.resize, settings.processes * hosts)
    _print_time(images + sample.scale * sample.encode_s / hosts, settings, hosts)
    return size


def dry_run(source: Source, encoder, settings: Settings, hosts: int, price: float) -> None:
    """Prints the estimate of `preview`, with a table of other ways to store images and captions.

    Args:
      settings, hosts: as of `preview`; settings also has `shard_size`.
      price: storage price per GiB and month; 0 if unknown.
    """
    sizes = [Resize(side, kind) for side in _SIDES for kind in FORMATS]
    sample = _take(source, encoder, settings, list(dict.fromkeys([AS_IS, *sizes, settings.resize])))
    _print_sample(source, sample, encoder, settings)
    choices = _image_choices(sample, settings, hosts)
    if sample.features:
        choices += _caption_choices(source, sample, encoder.dim, settings, hosts)
    _print_time(sum(choice.seconds for choice in choices if choice.chosen), settings, hosts)
    print_choices(choices, price)


def _take(source: Source, encoder, settings: Settings, resizes: Sequence[Resize]) -> Sample:
    """Measures a sample with each of these ways to store images.

    Reads each item once. If there are several ways, the first is AS_IS; where another one leaves an
    image as it is, it has the result of the first.
    """
    if not len(source):
        raise ValueError(f"the source is empty: {source.describe()}")
    indices = spread(source, _IMAGES)
    checked, check_s = {resize: [] for resize in resizes}, dict.fromkeys(resizes, 0.0)
    for i in indices:
        item, read_s = _timed(lambda: source[i])
        as_is = _timed(lambda: checks.check(item, settings.min_size, resizes[0]))
        size = as_is[0].width, as_is[0].height
        for resize in resizes:
            other = resize is not resizes[0] and resize.applies(size)
            result, seconds = (
                _timed(lambda: checks.check(item, settings.min_size, resize)) if other else as_is
            )
            check_s[resize] += read_s + seconds
            if not result.reason:
                checked[resize].append(result)
    captions = [text for item in checked[resizes[0]] for text in item.captions]
    return Sample(
        len(indices),
        len(source) / len(indices),
        checked,
        check_s,
        captions,
        *_encode(encoder, captions, settings.batch_size),
    )


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Returns the result and the seconds that it took."""
    start = time.monotonic()
    return work(), time.monotonic() - start


def _encode(
    encoder, captions: list[str], batch_size: int
) -> tuple[list[BFloat16[np.ndarray, "_ d"]], int, float]:
    """Returns features, number of cut captions, and seconds without compilation."""
    if not captions or encoder is None:
        return [], 0, 0.0
    cut = sum(encoder.tokenize(captions)[1])
    encoder.encode(captions, batch_size)  # compiles
    features, seconds = _timed(lambda: encoder.encode(captions, batch_size))
    return features, cut, seconds


def _print_sample(source: Source, sample: Sample, encoder, settings: Settings) -> Bytes:
    """Prints the sizes of the whole as `settings` would store it."""
    usable, captions = len(sample.checked[settings.resize]), len(sample.captions)
    image_bytes = sample.scale * sample.image_bytes(settings.resize)
    text_bytes = 0.0
    print(
        f"sample    {sample.count} of {len(source)} images: {usable} usable, {captions} captions,"
        f" {sample.cut} of them truncated"
    )
    print(f"images    about {sample.scale * usable:.0f}, {image_bytes / 2**20:.1f} MiB")
    if encoder is not None:
        text_bytes = sample.scale * sample.caption_bytes(encoder.dim, settings.embedding)
        print(
            f"captions  at most {sample.scale * captions:.0f}, {text_bytes / 2**20:.1f} MiB before"
            f" compression ({encoder.dim} features a token in {settings.embedding})"
        )
    print(f"work      about {len(source) * WORK_BYTES / 2**30:.2f} GiB of files until the end")
    _print_notes(source.notes())
    return Bytes(int(image_bytes), int(text_bytes), len(source) * WORK_BYTES)


def _print_notes(notes: Sequence[dict[str, Any]]) -> None:
    for note in notes[:_NOTES]:
        detail = note.get("detail") or f"{note['count']} files, such as {note['files'][0]}"
        print(f"not read  {note['id']}: {note['reason']}, {detail}")
    if len(notes) > _NOTES:
        print(f"not read  and {len(notes) - _NOTES} more; skipped.jsonl will list them")


def _print_time(seconds: float, settings: Settings, hosts: int) -> None:
    told = f"{hosts} processes, each with" if hosts > 1 else "one process with"
    print(f"time      about {seconds:.0f} s in {told} {settings.processes} workers")


def _image_choices(sample: Sample, settings: Settings, hosts: int) -> list[Choice]:
    """A row for each way to store images that changes one, and for the chosen way."""
    sizes = lambda resize: [(item.height, item.width) for item in sample.checked[resize]]
    return [
        Choice(
            f"images, {resize.side} {resize.format}" if resize.side else "images, as they are",
            sample.scale * sample.image_bytes(resize),
            sample.image_s(resize, settings.processes * hosts),
            resize == settings.resize,
        )
        for resize in sample.checked
        if resize in (AS_IS, settings.resize) or sizes(resize) != sizes(AS_IS)
    ]


def _caption_choices(
    source: Source, sample: Sample, dim: int, settings: Settings, hosts: int
) -> list[Choice]:
    """A row for each dtype of features: their time is that of encoding and of writing."""
    count = len(sample.captions)
    means = [np.mean([len(feature) for feature in sample.features])]
    means += [np.mean([len(text.encode()) for text in sample.captions])]
    stores, seconds = {}, {}
    for name in records.EMBEDDINGS:
        stores[name] = StoreEstimate(sample.scale * count, *means, dim, settings.shard_size, name)
        write_s = _timed(lambda: _write(source, sample, name))[1] / settings.processes
        seconds[name] = sample.scale * (sample.encode_s + write_s) / hosts
    return caption_choices(stores, settings.embedding, seconds)


def _write(source: Source, sample: Sample, embedding: str) -> None:
    """Writes the captions of the sample to a shard that is then deleted."""
    name = records.shard_name("captions", "train", 0, 1)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_captions(source, place, name, sample.captions, sample.features, [], embedding)
