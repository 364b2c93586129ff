"""Finds a T5 v1.1 encoder (directory, hub name, or the one in the package), reads its weights without torch, and writes one.

Weights come from model.safetensors or pytorch_model.bin, whole or in shards with an index. They are read tensor by tensor, cast and
placed at once, so host memory holds one tensor beside the result; the decoder of a full checkpoint is never read.
"""

import contextlib
import dataclasses
import hashlib
import importlib.resources
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Sharding

from imagen_jax.weights.torch_files import TorchFile
from imagen_jax.text.t5 import T5Config

EMBEDDED = "t5_tiny"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "spiece.model")
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json")
EMBEDDING_ALIAS = "encoder.embed_tokens.weight"  # the same tensor as shared.weight; files have either or both


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one file tensor goes: path in the parameter tree, its shape in the file, and whether it is transposed on the way."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool


def slots(config: T5Config) -> dict[str, Slot]:
    """Hugging Face name -> Slot, for every tensor of the encoder; Flax kernels are [in, out], the file's [out, in]."""
    inner = config.num_heads * config.d_kv
    table = {
        "shared.weight": Slot(("token_embedding",), (config.vocab_size, config.d_model), False),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": Slot(
            ("relative_bias",), (config.relative_attention_num_buckets, config.num_heads), False
        ),
        "encoder.final_layer_norm.weight": Slot(("final_norm", "scale"), (config.d_model,), False),
    }
    dense = {
        "layer.0.SelfAttention.q": (("attention", "query"), (inner, config.d_model)),
        "layer.0.SelfAttention.k": (("attention", "key"), (inner, config.d_model)),
        "layer.0.SelfAttention.v": (("attention", "value"), (inner, config.d_model)),
        "layer.0.SelfAttention.o": (("attention", "out"), (config.d_model, inner)),
        "layer.1.DenseReluDense.wi_0": (("mlp", "gate"), (config.d_ff, config.d_model)),
        "layer.1.DenseReluDense.wi_1": (("mlp", "up"), (config.d_ff, config.d_model)),
        "layer.1.DenseReluDense.wo": (("mlp", "down"), (config.d_model, config.d_ff)),
    }
    norms = {"layer.0.layer_norm": "attention_norm", "layer.1.layer_norm": "mlp_norm"}
    for i in range(config.num_layers):
        for name, (path, shape) in dense.items():
            table[f"encoder.block.{i}.{name}.weight"] = Slot((f"block_{i}", *path, "kernel"), shape, True)
        for name, norm in norms.items():
            table[f"encoder.block.{i}.{name}.weight"] = Slot((f"block_{i}", norm, "scale"), (config.d_model,), False)
    return table


class SafetensorsFile:
    """A safetensors file with the interface of TorchFile; each `read` copies one tensor out of the file."""

    def __init__(self, path: str | os.PathLike):
        import safetensors

        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            self._file = safetensors.safe_open(path, framework="numpy").__enter__()
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._file.__exit__(*exc)

    def read(self, name: str) -> np.ndarray:
        return self._file.get_tensor(name)


def _is_encoder(name: str) -> bool:
    return name.startswith("encoder.") or name == "shared.weight"


def _shards(weights: pathlib.Path) -> list[str]:
    """The names of the files that hold encoder tensors: the weights file itself, or what its index says."""
    if not weights.name.endswith(".index.json"):
        return [weights.name]
    index = json.loads(weights.read_text()).get("weight_map", {})
    return sorted({file for name, file in index.items() if _is_encoder(name)})


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold encoder tensors."""
    found = next((name for name in WEIGHTS if (directory / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{directory} has no weights: none of {', '.join(WEIGHTS)}")
    files = _shards(directory / found)
    for file in files:
        if pathlib.Path(file).name != file or not (directory / file).is_file():
            raise FileNotFoundError(f"{directory / found} names the shard {file!r}, which is not in {directory}")
    return [directory / file for file in files]


def _check(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Slot], where: pathlib.Path) -> None:
    """ValueError naming every tensor that is missing, of another shape, or an encoder tensor the config does not explain."""
    missing = sorted(set(wanted) - set(found))
    misshapen = [f"{n} is {found[n]}, not {s.shape}" for n, s in wanted.items() if n in found and found[n] != s.shape]
    unexpected = sorted(n for n in found if _is_encoder(n) and n not in wanted)
    for what, names in (("lacks", missing), ("has other shapes than its config says:", misshapen), ("has unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{where} {what} {', '.join(names[:5])}{more}")


def _place(array: np.ndarray, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    """Cast to `dtype` and onto the devices, each of which gets its part."""
    if sharding is None:
        return jax.device_put(np.array(array, dtype, order="C")).block_until_ready()
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index], dtype, order="C")).block_until_ready()


def _read_all(files: list, where: Mapping[str, tuple[int, str]], wanted: Mapping[str, Slot]) -> Iterator[tuple[str, Slot, np.ndarray]]:
    """The wanted tensors, file by file, as they are stored."""
    for i, file in enumerate(files):
        for name, slot in wanted.items():
            if where[name][0] == i:
                yield name, slot, file.read(where[name][1])


def load_params(directory: pathlib.Path, config: T5Config, dtype: str, abstract: Mapping | None = None) -> tuple[dict, str]:
    """The parameter tree of T5Encoder in `dtype`, and the sha256 of the encoder's tensors as stored (the same for any file layout).

    `abstract` is the tree as shapes with the shardings that the tensors are to have; without it they are on the default device.
    Raises FileNotFoundError for absent files, ValueError with the names of missing, misshapen or unexpected tensors.
    """
    wanted = slots(config)
    params: dict = {}
    digests = []
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path))
            for path in _weight_files(directory)
        ]
        where = {name: (i, name) for i, file in enumerate(files) for name in file.shapes}
        if EMBEDDING_ALIAS in where:
            alias = where.pop(EMBEDDING_ALIAS)
            where.setdefault("shared.weight", alias)
        _check({name: files[i].shapes[stored] for name, (i, stored) in where.items()}, wanted, directory)
        for name, slot, array in _read_all(files, where, wanted):
            if array.dtype.kind not in "fV":  # V: bfloat16
                raise ValueError(f"{directory}: {name} is {array.dtype}, not a floating-point tensor")
            digest = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest()
            digests.append(f"{name} {array.dtype} {array.shape} {digest}")
            leaf, where_to = params, abstract
            for key in slot.path[:-1]:
                leaf, where_to = leaf.setdefault(key, {}), where_to and where_to[key]
            sharding = where_to and where_to[slot.path[-1]].sharding
            leaf[slot.path[-1]] = _place(array.T if slot.transposed else array, np.dtype(dtype), sharding)
    return params, hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def save_encoder(directory: str | os.PathLike, config: T5Config, params: Mapping, tokenizer, dtype: str = "bfloat16") -> None:
    """Writes config.json, model.safetensors (in `dtype`) and the tokenizer in the layout that Hugging Face reads."""
    from safetensors.numpy import save_file

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, slot in slots(config).items():
        leaf = params
        for key in slot.path:
            leaf = leaf[key]
        array = np.asarray(leaf)
        tensors[name] = np.array(array.T if slot.transposed else array, np.dtype(dtype), order="C")
    _check({name: array.shape for name, array in tensors.items()}, slots(config), directory)
    partial = directory / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config.to_json() | {"torch_dtype": str(dtype)}, indent=2) + "\n")
    tokenizer.save_pretrained(directory)


def find_encoder(name_or_dir: str) -> pathlib.Path:
    """The directory of an encoder: a directory itself, the embedded one, or a hub name (from the cache or downloaded).

    FileNotFoundError where there is no such thing, or the hub cannot be reached and its cache lacks the files.
    """
    if name_or_dir == EMBEDDED:
        return pathlib.Path(str(importlib.resources.files("imagen_jax") / "assets" / EMBEDDED))
    directory = pathlib.Path(name_or_dir).expanduser()
    if directory.is_dir():
        return directory
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_dir):
        raise FileNotFoundError(f"text encoder {name_or_dir!r}: no such directory, and not a hub name of the form owner/name")
    try:
        return _from_hub(name_or_dir, cached=True)  # a complete copy in the cache needs no network
    except FileNotFoundError:
        return _from_hub(name_or_dir, cached=False)


def _from_hub(name: str, cached: bool) -> pathlib.Path:
    """Finds or downloads what the encoder needs, and of a sharded checkpoint only the shards that hold encoder tensors."""
    config = _fetch(name, "config.json", cached)
    if config is None:
        raise FileNotFoundError(
            f"text encoder {name!r}: not a directory, not in the Hugging Face cache, and the hub cannot be reached or has no such "
            "model; download it where there is a network (hf download) and give its directory"
        )
    directory = config.parent
    weights = next((w for w in WEIGHTS if _fetch(name, w, cached)), None)
    wanted = [] if weights is None else _shards(directory / weights)
    absent = [file for file in wanted if not _fetch(name, file, cached)] if weights else [" or ".join(WEIGHTS)]
    if absent:
        raise FileNotFoundError(f"text encoder {name!r}: neither the hub nor its cache has {', '.join(absent)}")
    if not any([_fetch(name, file, cached) for file in TOKENIZERS]):
        raise FileNotFoundError(f"text encoder {name!r}: neither the hub nor its cache has its tokenizer ({' or '.join(TOKENIZERS)})")
    for file in TOKENIZER_EXTRAS:
        _fetch(name, file, cached)
    return directory


def _fetch(name: str, file: str, cached: bool) -> pathlib.Path | None:
    """One file of a hub repository, from the cache or (unless `cached`) downloaded; None where there is none."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(name, file, local_files_only=cached))
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError):
        return None
    except errors.HfHubHTTPError as error:
        raise OSError(f"text encoder {name!r}: {error}") from error
