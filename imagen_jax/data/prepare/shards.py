"""The shards of prepared data: encoded, written, and entered into the journal.

A shard is finished when its entry in the journal is there.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import BFloat16

from imagen_jax.data import quantization, records
from imagen_jax.data.prepare import checks
from imagen_jax.data.prepare.crew import AGAIN
from imagen_jax.data.prepare.resize import Resize
from imagen_jax.data.prepare.selection import KeptImage, Plan
from imagen_jax.data.sources.source import Source
from imagen_jax.storage import read_object, write_atomically


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard to write: number in its split, and number of rows."""

    name: str
    split: str
    number: int
    rows: int


def shards_of(store: str, split: str, rows: list[int]) -> list[Shard]:
    """The shards of a split with these numbers of rows."""
    name = lambda number: records.shard_name(store, split, number, len(rows))
    return [Shard(name(number), split, number, count) for number, count in enumerate(rows)]


def encode_shard(
    encoder,
    partial: Path,
    name: str,
    texts: list[str],
    first_id: int,
    batch_size: int,
    embedding: str,
) -> tuple:
    """Encodes a caption shard; returns the task of writing it."""
    _, cut = encoder.tokenize(texts)
    return (
        partial,
        name,
        texts,
        encoder.encode(texts, batch_size),
        [first_id + i for i, was_cut in enumerate(cut) if was_cut],
        embedding,
    )


def write_captions(
    _: Source,
    partial: Path,
    name: str,
    texts: list[str],
    features: list[BFloat16[np.ndarray, "_ d"]],
    cut: list[int],
    embedding: str,
) -> int:
    norms = np.concatenate(
        [np.linalg.norm(feature.astype(np.float64), axis=1) for feature in features]
    )
    if not np.isfinite(norms).all():
        bad = next(
            text
            for text, feature in zip(texts, features, strict=True)
            if not np.isfinite(feature.astype(np.float32)).all()
        )
        raise ValueError(
            f"the text encoder returns features that are not finite for the caption {bad!r}"
        )
    rows = (
        records.serialize_caption(records.CaptionRow(text, feature), embedding)
        for text, feature in zip(texts, features, strict=True)
    )
    entry = records.write_shard(partial / "result", name, rows)
    lengths = [len(feature) for feature in features]
    entry["cut"] = cut
    entry["tokens"] = {"min": min(lengths), "max": max(lengths), "sum": sum(lengths)}
    entry["norm"] = {"min": norms.min(), "max": norms.max(), "sum": norms.sum()}
    if embedding == "int8":
        entry["error"] = quantization.error_sums(features)
    _journal(partial, name, entry)
    return len(texts)


def write_images(source: Source, partial: Path, plan: Plan, shard: Shard, resize: Resize) -> int:
    images = plan.images_of(shard.split, shard.number)
    rows = (_image_row(source, image, resize) for image in images)
    _journal(
        partial,
        shard.name,
        records.write_shard(partial / "result", shard.name, map(records.serialize_image, rows)),
    )
    return len(images)


def _image_row(source: Source, image: KeptImage, resize: Resize) -> records.ImageRow:
    data = source[image.index].image or b""
    if checks.content_hash(data) != image.content:
        raise ValueError(
            f"image {image.id} changed while it was being prepared: remove the .partial directory"
            " and start again"
        )
    return records.ImageRow(
        checks.stored_bytes(data, resize),
        image.height,
        image.width,
        image.id,
        tuple(image.caption_ids),
    )


def _journal(partial: Path, name: str, entry: Mapping) -> None:
    write_atomically(partial / "journal" / f"{Path(name).name}.json", json.dumps(entry).encode())


def finished(partial: Path, name: str) -> dict | None:
    """The journal's entry of a shard, None if the shard is not finished."""
    file, shard = partial / "journal" / f"{Path(name).name}.json", partial / "result" / name
    if not file.is_file() or not shard.is_file():
        return None
    entry = read_object(file, records.SHARD_FIELDS, f"remove it; {AGAIN}")
    return entry if shard.stat().st_size == entry["bytes"] else None


def cut_captions(partial: Path, name: str) -> list[int]:
    """The ids of the truncated captions of a shard."""
    return finished(partial, name)["cut"]
