"""The manifest of prepared data: a directory is complete when it has one."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from imagen_jax.checksums import sha256_file
from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import check_object, entry_names, exists, read_object

MANIFEST = "manifest.json"
PARTIAL = "partial"  # the directory of the work files, in a prepared directory that is unfinished
FORMAT_VERSION = 1
INT8_FORMAT_VERSION = 2  # features in int8; versions of the program from before int8 refuse it
NAMED_FORMAT_VERSION = 3  # features of named encoders, or texts alone

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


def manifest_hash(content: Mapping) -> str:
    """SHA-256 of the canonical JSON of a manifest without its field `hash`."""
    body = {key: value for key, value in content.items() if key != "hash"}
    return hashlib.sha256(
        json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def read_manifest(path: AnyPath) -> dict[str, Any]:
    """The manifest of a prepared directory.

    Raises ValueError if the directory is missing, incomplete or of another format version, or if
    the manifest is damaged.
    """
    file = path / MANIFEST
    remedy = "copy the directory again, or remove it and prepare the data again"
    if not exists(file):
        raise ValueError(_no_manifest(path))
    manifest = read_object(file, {"format_version": int}, remedy)
    version = manifest["format_version"]
    if version not in (FORMAT_VERSION, INT8_FORMAT_VERSION, NAMED_FORMAT_VERSION):
        raise ValueError(
            f"{file} has format {version}, but this program reads 1 to {NAMED_FORMAT_VERSION}:"
            " prepare the data again, or install a newer version of this program"
        )
    check_fields(file, manifest, version == NAMED_FORMAT_VERSION, remedy)
    if manifest["hash"] != manifest_hash(manifest):
        raise ValueError(f"{file} was changed after it was written: prepare the data again")
    check_shards(file, manifest, remedy)
    return manifest


def verify_shards(path: AnyPath, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ValueError that names the first shard whose content differs from its checksum."""
    for name in names:
        if sha256_file(path / name) != manifest["shards"][name]["sha256"]:
            raise ValueError(
                f"{path / name} is damaged (its checksum differs): remove {path} and prepare the"
                " data again"
            )


def _no_manifest(path: AnyPath) -> str:
    """Why a directory has no manifest, and what to do."""
    earlier = path.with_name(f"{path.name}.partial")  # of versions that renamed it at the end
    if path.suffix == ".partial" or exists(path / PARTIAL) or exists(earlier):
        return (
            f"{path} is not complete: the same prepare_data command continues it (after"
            " --images_only, with --encoder or --text_only in its place)"
        )
    what = "is not prepared data" if exists(path) else "does not exist"
    return f"{path} {what} (no {MANIFEST}): run python -m imagen_jax.prepare_data"


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


def check_present(root: AnyPath, shards: Iterable[str]) -> None:
    """Raises ValueError if a shard is missing; one listing for each store, not one for a shard."""
    names = list(shards)
    present = {
        f"{folder}/{name}"
        for folder in {name.split("/")[0] for name in names}
        for name in entry_names(root / folder)
    }
    for name in names:
        if name not in present:
            raise ValueError(f"{root / name} is missing or cut short: prepare the data again")
