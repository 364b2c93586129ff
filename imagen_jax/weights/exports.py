"""One-file exports of parameters: bfloat16 safetensors with metadata and checksum in the header."""

import errno
import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
from jaxtyping import BFloat16
from safetensors.numpy import save_file

from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import absolute, as_path, disk_limit, missing_content, written_whole
from imagen_jax.weights import leaves

log = logging.getLogger(__name__)
HEADER_KEY = "imagen_jax"  # the one entry of an export's safetensors metadata
NOT_EXPORTED = (
    "sha256",
    "unlogged",
    "skipped_steps",
)  # meta of a checkpoint that does not describe its weights


def export_params(params: leaves.Tree, meta: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Writes a nested dict of float arrays as one bfloat16 safetensors file, atomically.

    The file's header holds `meta` and a checksum.

    Raises:
        ValueError: a leaf is not floating point, `meta` is not JSON, or `path` is a URL of an
            unknown scheme.
    """
    path = absolute(as_path("export", path))
    arrays = {}
    for name, leaf in leaves.flatten(params).items():
        if not jax.numpy.issubdtype(leaf.dtype, np.floating):
            raise ValueError(
                f"leaf {name} is {leaf.dtype}; an export holds floating point parameters only"
            )
        arrays[name] = np.ascontiguousarray(leaf, dtype=ml_dtypes.bfloat16).reshape(leaf.shape)
    kept = {name: value for name, value in meta.items() if name not in NOT_EXPORTED}
    document = json.loads(leaves.to_json(kept | {"format_version": leaves.FORMAT_VERSION}))
    header = leaves.to_json({"meta": document, "sha256": _digest(arrays, document)})
    with written_whole(path) as writing:
        try:
            save_file(arrays, writing, metadata={HEADER_KEY: header})
        except safetensors.SafetensorError as error:
            number = disk_limit(str(error)) or errno.EIO
            raise OSError(number, os.strerror(number), os.fspath(path)) from error
        os.umask(mask := os.umask(0))
        writing.chmod(0o666 & ~mask)  # safetensors creates files that only the owner can read


def read_export(path: AnyPath) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a file by `export_params`: (nested dict of bfloat16 numpy arrays, meta).

    `meta` also has "which" and the file's "sha256".

    Raises:
        CheckpointError: the file is damaged, was not written by `export_params`, or has another
            format version.
    """
    if reason := missing_content(path):
        raise leaves.CheckpointError(f"{path} {reason}")
    data = path.read_bytes()
    try:
        tensors = safetensors.deserialize(data)
        # deserialize() has validated the header, but does not return this part of it.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header = header.get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError) as error:
        reason = leaves.first_line(error)
        message = f"{path} is not a readable safetensors file ({reason}): export or copy it again"
        raise leaves.CheckpointError(message) from error
    if HEADER_KEY not in header:
        message = f"{path} is a safetensors file, but not one written by imagen_jax.export"
        raise leaves.CheckpointError(message)
    try:
        arrays = {
            name: np.frombuffer(tensor["data"], ml_dtypes.bfloat16).reshape(tensor["shape"])
            for name, tensor in tensors
        }
        document = json.loads(header[HEADER_KEY])
        meta = document["meta"]
        intact = document["sha256"] == _digest(arrays, meta)
    except (ValueError, KeyError, TypeError) as error:
        reason = leaves.first_line(error)
        raise leaves.CheckpointError(
            f"{path} is damaged ({reason}): export or copy it again"
        ) from error
    if not intact:
        raise leaves.CheckpointError(
            f"{path} is damaged: its content does not match its checksum; export or copy it again"
        )
    leaves.check_version(path, meta)
    sha256 = hashlib.sha256(data).hexdigest()
    return leaves.unflatten(arrays), {"which": "exported"} | meta | {"sha256": sha256}


def check_which(path: AnyPath, held: str, which: str) -> None:
    """Raises ValueError if an exported file holds other weights than `which`.

    held: the weights that the file holds, "exported" if it does not record them. "ema", the
    default of all commands, takes any; a warning says so if they are others.
    """
    if held == "exported":
        _warn_once(f"{path} does not record which weights it holds; they are used as {which!r}")
    elif which == "ema" != held:
        _warn_once(f"{path} holds the weights {held!r}, which are used as 'ema'")
    elif which != held:
        raise ValueError(
            f"{path} holds the weights {held!r}, not {which!r}: choose {held!r}, or export"
            f" {which!r} from the checkpoint"
        )


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


def _digest(arrays: Mapping[str, BFloat16[np.ndarray, "..."]], meta: dict[str, Any]) -> str:
    """SHA-256 of names, shapes, bytes and meta, independent of the file's layout."""
    digest = hashlib.sha256(leaves.to_json(meta).encode())
    for name in sorted(arrays):
        digest.update(f"\n{name} {list(arrays[name].shape)}\n".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
