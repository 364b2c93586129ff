"""The fields of a manifest of prepared data that readers need."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import check_object

# {dotted name: type}.
_FIELDS = {
    "hash": str,
    "shards": dict,
    "counts.images": dict,
    "image_sizes.min_side": int,
    "embedding": dict,
}
_UNNAMED = {"encoder.name": str, "encoder.dim": int, "embedding.length.max": int}
_NAMED = {"encoders": dict, "embedding_dtype": str}
SHARD_FIELDS = {"rows": int, "bytes": int, "sha256": str}


def check_fields(file: AnyPath, manifest: Mapping[str, Any], named: bool, remedy: str) -> None:
    """Raises ValueError if a field is missing or of another type.

    named: whether the format is that of named text encoders. remedy: what to do, for the message.
    """
    check_object(file, manifest, _FIELDS | (_NAMED if named else _UNNAMED), remedy)
    for name in manifest["encoders"] if named else ():
        fields = {f"encoders.{name}.name": str, f"encoders.{name}.dim": int}
        fields[f"embedding.{name}.length.max"] = int
        check_object(file, manifest, fields, remedy)


def check_shards(file: AnyPath, manifest: Mapping[str, Any], remedy: str) -> None:
    """Raises ValueError if the entry of a shard is damaged."""
    for name, entry in manifest["shards"].items():
        check_object(f"{file}, {name},", entry, SHARD_FIELDS, remedy)


def check_present(root: Path, shards: Iterable[str]) -> None:
    """Raises ValueError if a shard is missing; one listing for each store, not one for a shard."""
    names = list(shards)
    present = {
        f"{folder}/{name}"
        for folder in {name.split("/")[0] for name in names}
        if (root / folder).is_dir()
        for name in os.listdir(root / folder)
    }
    for name in names:
        if name not in present:
            raise ValueError(f"{root / name} is missing or cut short: prepare the data again")
