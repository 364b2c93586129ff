"""Reads a parameter tree from a foreign file, and writes one, by a map from names to leaves.

Tensors are read one by one, cast and placed at once, so host memory holds one tensor beside the
result. Every tensor of the map must be in the file with its shape, and no other may be there.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from imagen_jax.weights.leaves import flatten, unflatten
from imagen_jax.weights.tensor_files import open_tensors


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor's place: path in the parameter tree, shape in the file, transposed on the way.

    Flax kernels are [in, out]; torch's linear layers are [out, in], so they are transposed.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool

    @property
    def name(self) -> str:
        """The path as "block_0/mlp/gate/kernel"."""
        return "/".join(self.path)


def everything(name: str) -> bool:
    """A map of the whole file."""
    return True


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Which tensors of a file are which leaves of a parameter tree.

    slots: by the tensor's name in the file.
    covers: whether the map must explain a tensor, by its name: everything, or a part of the file
        such as the encoder. Other tensors are not read.
    aliases: other names of tensors; a file may have either or both.
    """

    slots: Mapping[str, Slot]
    covers: Callable[[str], bool] = everything
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_tree(
    path: pathlib.Path, names: NameMap, dtype: str, abstract: Mapping | None = None
) -> tuple[dict[str, Any], str]:
    """(parameter tree in `dtype`, sha256 of the tensors of the map as they are stored).

    path: a file of tensors, or a directory in the Hugging Face layout. The sha256 is the same for
    every file format and number of shards.
    abstract: the tree as shapes with shardings; without it all leaves are on the default device.

    Raises:
        FileNotFoundError: the weights or a shard are absent.
        ValueError: a tensor is missing, misshapen, unexpected or not floating point (with its
            name), or a file is damaged.
    """
    shardings = {} if abstract is None else flatten(abstract)
    leaves, digests = {}, []
    with open_tensors(path, names.covers) as tensors:
        shapes = tensors.shapes
        stored = _stored_names(shapes, names.aliases)
        _check({name: shapes[stored[name]] for name in stored}, names, path)
        for name in [name for name in stored if name in names.slots]:
            slot, array = names.slots[name], tensors.read(stored[name])
            if array.dtype.kind not in "fV":  # V: bfloat16
                raise ValueError(f"{path}: {name} is {array.dtype}, not a floating-point tensor")
            digests.append(_digest(name, array))
            sharding = shardings[slot.name].sharding if shardings else None
            array = array.T if slot.transposed else array
            leaves[slot.name] = _place(array, np.dtype(dtype), sharding)
    return unflatten(leaves), hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def write_tree(path: pathlib.Path, params: Mapping, names: NameMap, dtype: str) -> None:
    """Writes a parameter tree as one safetensors file in `dtype`, atomically.

    Raises:
        ValueError: a leaf of the map is missing or misshapen, or the map lacks a leaf of the tree.
    """
    from safetensors.numpy import save_file

    leaves = flatten(params)
    unknown = sorted(leaves.keys() - {slot.name for slot in names.slots.values()})
    if unknown:
        raise ValueError(f"{path} has no place for {_listed(unknown)}")
    tensors = {}
    for name, slot in names.slots.items():
        if slot.name in leaves:
            array = np.asarray(leaves[slot.name])
            array = array.T if slot.transposed else array
            tensors[name] = np.array(array, np.dtype(dtype), order="C")
    _check({name: array.shape for name, array in tensors.items()}, names, path)
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, path)


def _stored_names(found: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Name in the map -> name in the file, in the order of the files."""
    stored = {name: name for name in found if name not in aliases}
    for alias in (name for name in found if name in aliases):
        stored.setdefault(aliases[alias], alias)
    return stored


def _check(found: Mapping[str, tuple[int, ...]], names: NameMap, where: pathlib.Path) -> None:
    """Raises ValueError with the names of missing, misshapen or unexpected tensors."""
    slots = names.slots
    faults = {
        "lacks": sorted(slots.keys() - found.keys()),
        "has tensors whose shapes do not match the configuration:": [
            f"{name} is {found[name]}, not {slot.shape}"
            for name, slot in slots.items()
            if name in found and found[name] != slot.shape
        ],
        "has unexpected": sorted(n for n in found if n not in slots and names.covers(n)),
    }
    for what, faulty in faults.items():
        if faulty:
            raise ValueError(f"{where} {what} {_listed(faulty)}")


def _listed(names: list[str]) -> str:
    """The first five names, and the number of the others."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _digest(name: str, array: np.ndarray) -> str:
    """A tensor's line in the checksum: name, dtype, shape and sha256 of its bytes."""
    content = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest()
    return f"{name} {array.dtype} {array.shape} {content}"


def _place(array: np.ndarray, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    """Casts to `dtype` and puts each device's part on it."""
    if sharding is None:
        return jax.device_put(np.array(array, dtype, order="C")).block_until_ready()

    def part(index):
        return np.array(array[index], dtype, order="C")

    return jax.make_array_from_callback(array.shape, sharding, part).block_until_ready()
