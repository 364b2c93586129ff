"""Reads and writes the parameter tree of a foreign file by a map from tensor names to leaves.

Tensors are read, cast and placed one by one, so host memory holds the result and one tensor. The
file must have every tensor of the map, with its shape, and no other.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Shaped

from imagen_jax.weights.leaves import flatten, unflatten
from imagen_jax.weights.tensor_files import open_tensors

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}  # in the file


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor's path in the parameter tree, its shape in the file, whether it is transposed.

    Kernels are transposed: those of linear layers are [out, in] in the file and [in, out] in the
    tree, those of convolutions [out, in, h, w] and [h, w, in, out].
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool

    @property
    def name(self) -> str:
        """The path as "block_0/mlp/gate/kernel"."""
        return "/".join(self.path)


def everything(name: str) -> bool:
    """`NameMap.covers` of a map of the whole file."""
    return True


@dataclasses.dataclass(frozen=True)
class NameMap:
    """A map from the tensors of a file to the leaves of a parameter tree.

    slots: tensor name in the file -> slot.
    covers: tensor name -> whether the map must have a slot for it. Other tensors, such as those of
        a decoder, are not read.
    aliases: alternative tensor name -> name in `slots`; a file may have either or both.
    advice: tensor name -> what to do if a file lacks it, for the message.
    """

    slots: Mapping[str, Slot]
    covers: Callable[[str], bool] = everything
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    advice: Mapping[str, str] = dataclasses.field(default_factory=dict)


def tensor_name(path: str, names: Mapping[str, str], blocks: str, parts: Mapping[str, str]) -> str:
    """The Hugging Face name of a leaf of a transformer: `map_tree`'s rename.

    names: leaves outside of the blocks -> tensor name. blocks: prefix of the blocks in the file,
    such as "encoder.layer". parts: part of a block, such as "mlp/up" -> its name in the file.
    """
    if path in names:
        return names[path]
    block, part, leaf = re.fullmatch(r"block_(\d+)/(.+)/(\w+)", path).groups()
    return f"{blocks}.{block}.{parts[part]}.{_LEAVES[leaf]}"


def map_tree(
    shapes: Mapping[str, Any],
    rename: Callable[[str], str],
    covers: Callable[[str], bool] = everything,
) -> NameMap:
    """The map of a parameter tree, given as arrays or shapes, in which all kernels are transposed.

    rename: path of a leaf, such as "block_0/mlp/up/kernel" -> tensor name in the file.
    """
    slots = {}
    for path, leaf in flatten(shapes).items():
        kernel = path.endswith("kernel")
        shape = leaf.shape[:-3:-1] + leaf.shape[:-2] if kernel else leaf.shape
        slots[rename(path)] = Slot(tuple(path.split("/")), tuple(shape), kernel)
    return NameMap(slots, covers)


def read_tree(
    path: pathlib.Path, names: NameMap, dtype: str, abstract: Mapping | None = None
) -> tuple[dict[str, Any], str]:
    """(parameter tree in `dtype`, SHA-256 of the tensors of the map as stored).

    path: a file of tensors, or a directory in the Hugging Face layout. The SHA-256 does not depend
    on the file format or the number of shards.
    abstract: the tree as shapes with shardings; without it all leaves are on the default device.

    Raises:
        FileNotFoundError: the weights or a shard are absent.
        ValueError: a file is damaged, or a tensor is missing, unexpected, not floating point or has
            another shape; the message names it.
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
            array = _from_torch(array) if slot.transposed else array
            leaves[slot.name] = _place(array, np.dtype(dtype), sharding)
    return unflatten(leaves), hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def write_tree(path: pathlib.Path, params: Mapping, names: NameMap, dtype: str) -> None:
    """Writes a parameter tree as one safetensors file in `dtype`, atomically.

    Raises:
        ValueError: a leaf of the map is missing or has another shape, or the map lacks a leaf.
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
            array = _to_torch(array) if slot.transposed else array
            tensors[name] = np.array(array, np.dtype(dtype), order="C")
    _check({name: array.shape for name, array in tensors.items()}, names, path)
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, path)


def _from_torch(kernel: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """A kernel [out, in, ...] as [..., in, out]."""
    return np.moveaxis(kernel, (0, 1), (-1, -2))


def _to_torch(kernel: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The inverse of `_from_torch`."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _stored_names(tensors: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """{name in the map: name in the file}, in the order of the files."""
    stored = {name: name for name in tensors if name not in aliases}
    for alias in (name for name in tensors if name in aliases):
        stored.setdefault(aliases[alias], alias)
    return stored


def _check(shapes: Mapping[str, tuple[int, ...]], names: NameMap, path: pathlib.Path) -> None:
    """Raises ValueError naming tensors that are missing, unexpected or of another shape.

    shapes: tensor name -> shape in the file `path`.
    """
    slots = names.slots
    faults = {
        "lacks": sorted(slots.keys() - shapes.keys()),
        "has tensors whose shapes do not match the configuration:": [
            f"{name} is {shapes[name]}, not {slot.shape}"
            for name, slot in slots.items()
            if name in shapes and shapes[name] != slot.shape
        ],
        "has unexpected": sorted(
            name for name in shapes if name not in slots and names.covers(name)
        ),
    }
    for fault, tensors in faults.items():
        if tensors:
            advice = "".join(f": {names.advice[name]}" for name in tensors if name in names.advice)
            raise ValueError(f"{path} {fault} {_listed(tensors)}{advice}")


def _listed(names: list[str]) -> str:
    """The first five names, and the number of the others."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _digest(name: str, array: Shaped[np.ndarray, "..."]) -> str:
    """A tensor's line in the checksum: name, dtype, shape and SHA-256 of its bytes."""
    content = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest()
    return f"{name} {array.dtype} {array.shape} {content}"


def _place(
    array: Shaped[np.ndarray, "*d"], dtype: np.dtype, sharding: Sharding | None
) -> Shaped[jax.Array, "*d"]:
    """Casts an array to `dtype` and puts each shard on its device."""
    if sharding is None:
        return jax.device_put(np.array(array, dtype, order="C")).block_until_ready()

    def shard(index):
        return np.array(array[index], dtype, order="C")

    return jax.make_array_from_callback(array.shape, sharding, shard).block_until_ready()
