"""The shards of prepared data: written, and entered into the journal.

A shard is finished when its entry in the journal is there.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from imagen_jax.data import first_records, records
from imagen_jax.data.manifest_fields import SHARD_FIELDS
from imagen_jax.data.prepare import checks
from imagen_jax.data.prepare.kept import KeptImage, images_of
from imagen_jax.data.prepare.resize import Resize
from imagen_jax.data.sources.source import Source
from imagen_jax.distributed import agreement
from imagen_jax.storage import read_object, write_atomically

# Of the journal's entry of a shard with features, whose statistics are part of the manifest.
_FEATURE_FIELDS = SHARD_FIELDS | {"cut": list, "tokens": dict, "norm": dict}
FIRST = "first_sha256"  # of a journal's entry: checksum of the shard's first record
AGAIN = "run the same command again; it continues"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard to write: number in its split, and number of rows.

    has_features: whether its entry in the journal has statistics of text features.
    """

    name: str
    split: str
    number: int
    rows: int
    has_features: bool = False


def shard_of(store: str, split: str, number: int, rows: int, size: int) -> Shard:
    """Shard `number` of a split of `rows` rows, with `size` rows per shard."""
    name = records.shard_name(store, split, number, math.ceil(rows / size))
    return Shard(name, split, number, min(size, rows - number * size))


def shards_of(store: str, split: str, rows: int, size: int) -> list[Shard]:
    """All shards of a split of `rows` rows, with `size` rows per shard."""
    return [shard_of(store, split, n, rows, size) for n in range(math.ceil(rows / size))]


def write_images(source: Source, partial: Path, shard: Shard, resize: Resize) -> int:
    """Writes an image shard of the plan in the work directory; returns the number of its images."""
    images = images_of(partial / "plan", shard.split, shard.number, shard.rows)
    rows = (_image_row(source, image, resize) for image in images)
    journal(
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


def journal(partial: Path, name: str, entry: Mapping) -> None:
    """Enters a written shard into the journal, with the checksum of its first record."""
    first = {FIRST: first_records.of_file(partial / "result" / name)}
    write_atomically(_entry(partial, name), json.dumps({**entry, **first}).encode())


def finished(partial: Path, shard: Shard) -> dict | None:
    """The journal's entry of a shard, None if the shard is not finished."""
    file, written = _entry(partial, shard.name), partial / "result" / shard.name
    if not file.is_file() or not written.is_file():
        return None
    remedy = f"remove it; {AGAIN}"
    fields = _FEATURE_FIELDS if shard.has_features else SHARD_FIELDS
    entry = read_object(file, fields, remedy)
    if entry["rows"] != shard.rows:
        raise ValueError(f"{file} has {entry['rows']} rows instead of {shard.rows}; {remedy}")
    if written.stat().st_size != entry["bytes"]:
        return None
    first = entry.get(FIRST)  # the journal of an earlier version lacks it
    return entry if not first or first_records.of_file(written) == first else None


def all_finished(partial: Path, shards: Iterable[Shard]) -> dict[str, dict]:
    """The journal's entries by shard, with the number of truncated captions as "cut".

    Raises ValueError if a shard that some process has finished is no longer there.
    """
    entries = {}
    for shard in shards:
        agreement.wait_to_see(_entry(partial, shard.name))
        entry = finished(partial, shard)
        if entry is None:
            raise ValueError(f"finished shards were deleted from {partial}; {AGAIN}")
        entries[shard.name] = entry | {"cut": len(entry.get("cut", ()))}
    return entries


def _entry(partial: Path, name: str) -> Path:
    return partial / "journal" / f"{Path(name).name}.json"
