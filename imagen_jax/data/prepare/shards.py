"""The shards of prepared data: written, and entered into the journal.

A shard is finished when its entry in the journal is there.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.data import first_records, records
from imagen_jax.data.manifest_file import SHARD_FIELDS
from imagen_jax.data.prepare import checks
from imagen_jax.data.prepare.kept import KeptImage, images_of
from imagen_jax.data.prepare.resize import Resize
from imagen_jax.data.sources.source import Source
from imagen_jax.distributed import shared_files
from imagen_jax.many_files import each
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import (
    entry_names,
    exists,
    file_size,
    file_sizes,
    read_object,
    write_atomically,
)

# Fields of the journal's entry of a shard with features; the manifest has their statistics.
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


def write_images(source: Source, partial: AnyPath, shard: Shard, resize: Resize) -> int:
    """Writes an image shard of the plan in the work directory; returns the number of its images."""
    images = images_of(partial / "plan", shard.split, shard.number, shard.rows)
    rows = (_image_row(source, image, resize) for image in images)
    journal(partial, shard.name, write(partial, shard.name, map(records.serialize_image, rows)))
    return len(images)


def _image_row(source: Source, image: KeptImage, resize: Resize) -> records.ImageRow:
    data = source[image.index].image or b""
    if checks.content_hash(data) != image.content:
        raise ValueError(
            f"image {image.id} changed while it was being prepared: remove the output directory and"
            " start again"
        )
    return records.ImageRow(
        checks.stored_bytes(data, resize),
        image.height,
        image.width,
        image.id,
        tuple(image.caption_ids),
    )


def write(partial: AnyPath, name: str, rows: Iterable[bytes]) -> dict[str, Any]:
    """Writes a shard beside the work directory; returns its entry for the journal."""
    first: list[str] = []

    def noted() -> Iterator[bytes]:
        for row in rows:
            if not first:
                first.append(hashlib.sha256(row).hexdigest())
            yield row

    return records.write_shard(partial.parent, name, noted()) | {FIRST: first[0]}


def journal(partial: AnyPath, name: str, entry: Mapping) -> None:
    """Enters a written shard into the journal. Each shard has a file there."""
    write_atomically(_entry(partial, name), json.dumps(entry).encode())


def finished(partial: AnyPath, shard: Shard) -> dict | None:
    """The journal's entry of a shard, None if the shard is not finished."""
    if not exists(_entry(partial, shard.name)):
        return None
    return _checked_entry(partial, shard, file_size(partial.parent / shard.name))


def _checked_entry(partial: AnyPath, shard: Shard, size: int | None) -> dict | None:
    """`finished` for a shard that has an entry. size: in bytes, None if there is no such file.

    The first record is compared on a local disk; to read it in a bucket takes the whole shard.
    """
    if size is None:
        return None
    file, written = _entry(partial, shard.name), partial.parent / shard.name
    remedy = f"remove it; {AGAIN}"
    fields = _FEATURE_FIELDS if shard.has_features else SHARD_FIELDS
    entry = read_object(file, fields, remedy)
    if entry["rows"] != shard.rows:
        raise ValueError(f"{file} has {entry['rows']} rows instead of {shard.rows}; {remedy}")
    if size != entry["bytes"]:
        return None
    first = entry.get(FIRST)  # the journal of an earlier version lacks it
    if in_bucket(partial) or not first or first_records.of_file(written) == first:
        return entry
    return None


def _entries(partial: AnyPath, shards: Sequence[Shard]) -> Iterator[dict | None]:
    """`finished` for each of many shards, in order.

    In a bucket, lists the journal and the stores, and reads only entries of shards that are there.
    """
    if not in_bucket(partial):
        return (finished(partial, shard) for shard in shards)
    names = set(entry_names(partial / "journal")) if shards else set()
    stores = {(partial.parent / shard.name).parent for shard in shards}
    sizes = {name: size for store in stores for name, size in file_sizes(store).items()}

    def read(shard: Shard) -> dict | None:
        if _entry(partial, shard.name).name not in names:
            return None
        return _checked_entry(partial, shard, sizes.get(Path(shard.name).name))

    return each(read, shards, partial)


def unfinished(partial: AnyPath, shards: Sequence[Shard]) -> list[Shard]:
    """Those of the shards that are still to be written."""
    return [shard for shard, entry in zip(shards, _entries(partial, shards)) if entry is None]


def all_finished(partial: AnyPath, shards: Sequence[Shard]) -> dict[str, dict]:
    """The journal's entries by shard, with the number of truncated captions as "cut".

    Raises ValueError if a shard that some process has finished is no longer there.
    """
    for shard in shards:
        shared_files.wait_to_see(_entry(partial, shard.name))
    entries = {}
    for shard, entry in zip(shards, _entries(partial, shards)):
        if entry is None:
            raise ValueError(f"finished shards were deleted from {partial.parent}; {AGAIN}")
        entries[shard.name] = entry | {"cut": len(entry.get("cut", ()))}
    return entries


def _entry(partial: AnyPath, name: str) -> AnyPath:
    return partial / "journal" / f"{Path(name).name}.json"
