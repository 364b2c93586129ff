"""Checksums of the first record of each shard, which tell shards apart without reading them whole.

    DIR/first_records.json   {"manifest": hash of the manifest, "sha256": {shard: SHA-256}}

ArrayRecord files have sizes in steps of 64 KiB, so a shard of another encoder or place often has
the right size. The manifest does not list the file: data of earlier versions lacks it, and its hash
is the same with and without it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import exists, read_object, write_atomically

FILE = "first_records.json"


class WrongShard(ValueError):
    """A shard is not the one that the manifest lists."""


def write(root: AnyPath, manifest_hash: str, sums: Mapping[str, str]) -> None:
    """Writes the file of prepared data at `root`. sums: {shard: checksum of its first record}."""
    content = {"manifest": manifest_hash, "sha256": sums}
    write_atomically(root / FILE, json.dumps(content, indent=1).encode())


def read(root: AnyPath, manifest_hash: str) -> dict[str, str]:
    """{shard: checksum of its first record} of prepared data; {} if it lacks the file.

    Raises ValueError if the file is damaged or belongs to another manifest.
    """
    file = root / FILE
    if not exists(file):
        return {}
    remedy = "copy the directory again, or remove the file: first records are then not compared"
    content = read_object(file, {"manifest": str, "sha256": dict}, remedy)
    if content["manifest"] != manifest_hash:
        raise ValueError(f"{file} belongs to another manifest: {remedy}")
    return content["sha256"]


def of_shard(reader: Any) -> str:
    """The checksum of the first record of an open shard."""
    return hashlib.sha256(reader.read([0])[0]).hexdigest()


def check(path: str | os.PathLike, reader: Any, expected: str) -> None:
    """Raises WrongShard unless the first record of the shard at `path` has a checksum.

    reader: of the shard. expected: "" accepts any.
    """
    if expected and of_shard(reader) != expected:
        raise WrongShard(
            f"{path} is not the shard that the manifest lists, its first record differs: copy the"
            " directory again, or remove it and prepare the data again; prepare_data --verify"
            " compares every shard"
        )


def of_file(path: Path) -> str:
    """`of_shard` for a file; "" if it cannot be read."""
    from array_record.python import array_record_module

    try:
        return of_shard(array_record_module.ArrayRecordReader(str(path)))
    except (RuntimeError, IndexError, ValueError):
        return ""
