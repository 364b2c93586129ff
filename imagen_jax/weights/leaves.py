"""Paths of leaves, format version and error type, for checkpoints and exports."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from imagen_jax.object_storage import AnyPath
from imagen_jax.sharding import path_name
from imagen_jax.storage import check_object, read_json

FORMAT_VERSION = 1
REMEDY = "use another checkpoint, or restore a copy of this one"
Tree = Any


class CheckpointError(ValueError):
    """A checkpoint or export that is missing, incomplete, damaged, or could not be written."""


def read_document(path: AnyPath) -> dict[str, Any]:
    """The content of a checkpoint's meta.json: format_version, step, leaves, meta.

    Raises CheckpointError if it is not JSON, a field is missing or of a wrong type, or the format
    version is another one.
    """
    try:
        document = read_json(path, REMEDY)
        check_version(path, document)
        check_object(path, document, {"step": int, "leaves": dict, "meta": dict}, REMEDY)
        for name, spec in document["leaves"].items():
            if not _is_spec(spec):
                text = f"{path} is damaged (leaf {name} is {spec!r:.60}, not [shape, dtype])"
                raise ValueError(f"{text}; {REMEDY}")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return document


def _is_spec(spec: Any) -> bool:
    """Whether parsed JSON is [shape, name of a dtype]."""
    try:
        (*shape,), name = spec
        parse_dtype(name)
    except (TypeError, ValueError):
        return False
    return all(type(n) is int and n > 0 for n in shape)


def parse_dtype(name: str) -> np.dtype:
    """The dtype of a name in meta.json, such as "bfloat16"."""
    return np.dtype(getattr(ml_dtypes, name, name))


def check_version(path: AnyPath, document: Any) -> None:
    """Raises CheckpointError unless `document`, the content of `path`, has FORMAT_VERSION."""
    try:
        check_object(path, document, {"format_version": int}, REMEDY)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if (version := document["format_version"]) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}; this version of imagen_jax reads format {FORMAT_VERSION}"
        )


def flatten(tree: Tree) -> dict[str, Any]:
    """A tree as {"ema/down_0/block_0/conv_1/kernel": leaf, ...}, in tree order.

    Subtrees without leaves (None, empty states) are omitted.

    Raises:
        ValueError: a leaf is not an array or has size zero (orbax cannot store one), or a path
            component contains "/".
    """
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(path)
        if name in flat or name.count("/") != max(0, len(path) - 1):
            raise ValueError(f"the path {name} is ambiguous: a key of the tree contains '/'")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            kind = type(leaf).__name__
            raise ValueError(f"leaf {name} is a {kind}; only arrays can be stored")
        if 0 in leaf.shape:
            shape = tuple(leaf.shape)
            raise ValueError(
                f"leaf {name} has shape {shape}; an array of size zero cannot be stored"
            )
        flat[name] = leaf
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten` for nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def check_leaves(directory: AnyPath, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first leaf in which `stored` and `wanted` differ."""
    faults = []
    for path in sorted(stored.keys() | wanted.keys()):
        if path not in stored:
            faults.append(f"leaf {path} is missing from the checkpoint")
        elif path not in wanted:
            faults.append(f"the checkpoint has an extra leaf {path}")
        else:
            have = tuple(stored[path][0]), stored[path][1]
            want = tuple(wanted[path].shape), np.dtype(wanted[path].dtype).name
            if have != want:
                faults.append(
                    f"leaf {path} is {have[1]}{list(have[0])} in the checkpoint, but the state"
                    f" needs {want[1]}{list(want[0])}"
                )
            elif getattr(wanted[path], "sharding", None) is None:
                faults.append(f"leaf {path} of the abstract state has no sharding")
    if faults:
        more = f" (and {len(faults) - 1} more such faults)" if len(faults) > 1 else ""
        raise ValueError(f"checkpoint {directory} does not fit the state: {faults[0]}{more}")


def check_fit(params: Tree, model: Tree, label: str = "") -> None:
    """Raises ValueError with the first leaf that is missing, unexpected or of another shape.

    model: the parameters of the model, or their shapes. label: what the message calls `params`.
    """
    shapes = lambda tree: {
        path_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    needed, loaded = shapes(model), shapes(params)
    wrong = sorted(
        name for name in needed.keys() | loaded.keys() if needed.get(name) != loaded.get(name)
    )
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{label}{len(wrong)} weights do not fit the model, {name} first: it is"
            f" {loaded.get(name, 'missing')}, the model has {needed.get(name, 'none')}; give"
            " weights of the same config"
        )


def to_json(value: Any) -> str:
    """JSON with sorted keys. Raises ValueError if `value`, the caller's meta, is not JSON."""
    try:
        return json.dumps(value, indent=1, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"meta cannot be written as JSON: {error}") from error


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
