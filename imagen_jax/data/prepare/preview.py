"""Estimates of the size and time of prepared data from a sample, before it is prepared."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imagen_jax.data import manifest_file, records
from imagen_jax.data.prepare import checks
from imagen_jax.data.prepare.caption_estimate import (
    WORK_BYTES,
    CaptionEstimate,
    FeatureSizes,
    caption_choices,
    spread,
    token_bytes,
)
from imagen_jax.data.prepare.captions import Encoded, encode, write_captions
from imagen_jax.data.prepare.choices import Choice, print_choices
from imagen_jax.data.prepare.resize import AS_IS, FORMATS, Resize
from imagen_jax.data.prepare.settings import Settings
from imagen_jax.data.sources.source import Source
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.text_inputs import UNNAMED

_IMAGES = 64  # items that are decoded and encoded
_NOTES = 10  # lines about files that are not read
_SIDES = (64, 256, 1024)  # sizes of stored images that `dry_run` compares


@dataclasses.dataclass(frozen=True)
class Sample:
    """Measurements of some items of a source.

    scale: items of the source per item of the sample.
    checked: for each way to store the images, the usable items.
    check_s: for each way, the seconds of reading and checking one after the other.
    captions: all usable captions.
    encoded: {name of the encoder: the captions with its features}.
    encode_s: seconds of encoding, by all encoders.
    """

    count: int
    scale: float
    checked: dict[Resize, list[checks.Checked]]
    check_s: dict[Resize, float]
    captions: list[str]
    encoded: dict[str, Encoded]
    encode_s: float

    def image_bytes(self, resize: Resize) -> int:
        """Bytes of the sample's images if they are stored in this way."""
        return sum(item.size for item in self.checked[resize])

    def image_s(self, resize: Resize, processes: int) -> float:
        """Seconds for all images; each is decoded again when it is written."""
        return 2 * self.scale * self.check_s[resize] / processes

    def caption_bytes(self, embedding: str) -> int:
        """Uncompressed bytes of the sample's features and texts."""
        size = float(sum(len(text.encode()) for text in self.captions))
        for encoded in self.encoded.values():
            size += sum(len(f) * token_bytes(f.shape[1], embedding) for f in encoded.features)
            size += encoded.pooled.nbytes
        return int(size)

    def estimate(self, settings: Settings, embedding: str) -> CaptionEstimate:
        """The stores of all captions of the source, with features of dtype `embedding`."""
        widths = {
            name: FeatureSizes(
                encoded.features[0].shape[1],
                float(np.mean([len(feature) for feature in encoded.features])),
                encoded.pooled.shape[1],
            )
            for name, encoded in self.encoded.items()
        }
        text_bytes = float(np.mean([len(text.encode()) for text in self.captions]))
        count = self.scale * len(self.captions)
        return CaptionEstimate.of(count, text_bytes, widths, settings.shard_size, embedding)


class Bytes(NamedTuple):
    """Estimated bytes: images as stored, captions with uncompressed features, work files."""

    images: int
    captions: int
    work: int


def preview(source: Source, encoders: Encoders | None, settings: Settings, hosts: int = 1) -> Bytes:
    """Checks and encodes a sample, and prints size and time of the whole.

    Args:
      encoders: None if captions are not stored now.
      settings: `processes` (for images, on each host), `min_size`, `resize`, `embedding`,
        `batch_size`.
      hosts: number of processes of the run.
    """
    sample = _take(source, encoders, settings, [settings.resize])
    size = _print_sample(source, sample, encoders, settings)
    images = sample.image_s(settings.resize, settings.processes * hosts)
    _print_time(images + sample.scale * sample.encode_s / hosts, settings, hosts)
    return size


def dry_run(
    source: Source, encoders: Encoders | None, settings: Settings, hosts: int, price: float
) -> None:
    """Prints the estimate of `preview`, with a table of other ways to store images and captions.

    Args:
      settings, hosts: as of `preview`; settings also has `shard_size`.
      price: storage price per GiB and month; 0 if unknown.
    """
    sizes = [Resize(side, kind) for side in _SIDES for kind in FORMATS]
    resizes = list(dict.fromkeys([AS_IS, *sizes, settings.resize]))
    sample = _take(source, encoders, settings, resizes)
    _print_sample(source, sample, encoders, settings)
    choices = _image_choices(sample, settings, hosts)
    if encoders is not None and sample.captions:
        choices += _caption_choices(source, sample, settings, hosts)
    _print_time(sum(choice.seconds for choice in choices if choice.chosen), settings, hosts)
    print_choices(choices, price)


def _take(
    source: Source, encoders: Encoders | None, settings: Settings, resizes: Sequence[Resize]
) -> Sample:
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
        *_encode(encoders, captions, settings.batch_size),
    )


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Returns the result and the seconds that it took."""
    start = time.monotonic()
    return work(), time.monotonic() - start


def _encode(
    encoders: Encoders | None, captions: list[str], batch_size: int
) -> tuple[dict[str, Encoded], float]:
    """Returns the captions encoded by each encoder, and seconds without compilation."""
    encoded: dict[str, Encoded] = {}
    seconds = 0.0
    for name in encoders.in_turn() if captions and encoders is not None else ():
        run = lambda: encode(encoders.load(name), captions, batch_size, name != UNNAMED)
        run()  # compiles
        encoded[name], took = _timed(run)
        seconds += took
    return encoded, seconds


def _print_sample(
    source: Source, sample: Sample, encoders: Encoders | None, settings: Settings
) -> Bytes:
    """Prints the sizes of the whole as `settings` would store it."""
    usable, captions = len(sample.checked[settings.resize]), len(sample.captions)
    image_bytes = sample.scale * sample.image_bytes(settings.resize)
    text_bytes = 0.0
    told = [f"{len(e.cut)}{f' ({name})' * bool(name)}" for name, e in sample.encoded.items()]
    print(
        f"sample    {sample.count} of {len(source)} images: {usable} usable, {captions} captions,"
        f" {', '.join(told) or 0} of them truncated"
    )
    print(f"images    about {sample.scale * usable:.0f}, {image_bytes / 2**20:.1f} MiB")
    if encoders is not None:
        text_bytes = sample.scale * sample.caption_bytes(settings.embedding)
        stored = sample.estimate(settings, settings.embedding).bytes if captions else 0.0
        print(
            f"captions  at most {sample.scale * captions:.0f}, {stored / 2**20:.1f} MiB on disk"
            f" ({_widths(encoders, settings.embedding)})"
        )
    print(f"work      about {len(source) * WORK_BYTES / 2**30:.2f} GiB of files until the end")
    _print_notes(source.notes())
    return Bytes(int(image_bytes), int(text_bytes), len(source) * WORK_BYTES)


def _widths(encoders: Encoders, embedding: str) -> str:
    """The widths of the stored features, for a message."""
    dims = {name: identity["dim"] for name, identity in encoders.identities.items()}
    told = [f"{dim}{f' of {name}' * bool(name)}" for name, dim in dims.items()]
    return f"{', '.join(told)} features a token in {embedding}" if told else "only texts"


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
    source: Source, sample: Sample, settings: Settings, hosts: int
) -> list[Choice]:
    """A row for each dtype of features: their time is that of encoding and of writing."""
    stores, seconds = {}, {}
    for name in records.EMBEDDINGS:
        stores[name] = sample.estimate(settings, name)
        write_s = _timed(lambda: _write(source, sample, name))[1] / settings.processes
        seconds[name] = sample.scale * (sample.encode_s + write_s) / hosts
    return caption_choices(stores, settings.embedding, seconds)


def _write(source: Source, sample: Sample, embedding: str) -> None:
    """Writes the captions of the sample to shards that are then deleted."""
    with tempfile.TemporaryDirectory() as directory:
        for name, encoded in sample.encoded.items():
            shard = records.shard_name(records.caption_store(name), "train", 0, 1)
            work = Path(directory) / manifest_file.PARTIAL
            write_captions(source, work, shard, encoded, embedding)
