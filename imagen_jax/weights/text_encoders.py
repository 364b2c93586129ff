"""Text encoders by name or directory: finds one, picks its family, loads it.

A new family is a network in text/, a name map in this folder, and an entry in FAMILIES.
"""

import dataclasses
import functools
import importlib.resources
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from imagen_jax.text.encoder import FlaxEncoder, TextEncoder
from imagen_jax.text.program import EncodeProgram, one_device, parameter_shapes, weight_bytes
from imagen_jax.text.t5 import T5Config, T5Encoder
from imagen_jax.text.tokenizer import tokenize
from imagen_jax.weights import t5
from imagen_jax.weights.name_map import NameMap, read_tree
from imagen_jax.weights.tensor_files import WEIGHTS, shard_names

EMBEDDED = "t5_tiny"
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json")
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Family:
    """The parts of a text encoder that depend on its architecture.

    recognises: whether a parsed config.json is of this family.
    read_config: parsed config.json -> sizes, with `.dim` and `.vocab_size`; ValueError for a
        variant that is not supported.
    network: (sizes, dtype) -> Flax network, called (tokens, mask) -> features.
    name_map: sizes -> the network's parameters in the files.
    tokenizers: names of the tokenizer's file; one of them is needed.
    load_tokenizer: directory -> (transformers tokenizer, sha256 of its file).
    """

    recognises: Callable[[Mapping[str, Any]], bool]
    read_config: Callable[[Mapping[str, Any]], Any]
    network: Callable[[Any, Any], Any]
    name_map: Callable[[Any], NameMap]
    tokenizers: Sequence[str]
    load_tokenizer: Callable[[pathlib.Path], tuple[Any, str]]


FAMILIES = {
    "t5": Family(
        recognises=t5.is_t5,
        read_config=T5Config.from_json,
        network=T5Encoder,
        name_map=t5.name_map,
        tokenizers=tuple(t5.TOKENIZERS),
        load_tokenizer=t5.load_tokenizer,
    )
}


def load_text_encoder(
    name_or_dir: str,
    max_length: int,
    dtype: str = "bfloat16",
    place: Callable[[int], Mesh] = one_device,
) -> TextEncoder:
    """Loads a Hugging Face directory, a hub name, or "t5_tiny" (the embedded encoder).

    max_length: tokens, with the final end-of-sequence.
    place: bytes of weights -> mesh: `one_device` of this process, or all of them (`local_mesh`).

    Each process reads all weights, tensor by tensor, as their checksum needs them in any case, and
    keeps its devices' part of each.

    Raises:
        FileNotFoundError: there is no such encoder, or one of its files is absent.
        ValueError: an argument is invalid, the family is unknown, or files do not fit together.
    """
    if dtype not in DTYPES:
        raise ValueError(f"text encoder dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if max_length < 1:
        raise ValueError(
            f"text encoder max_length {max_length}: at least 1 is needed, for the end-of-sequence"
            " token"
        )
    directory = find_encoder(name_or_dir)
    family, config = _read_config(directory)
    tokenizer, tokenizer_sha256 = family.load_tokenizer(directory)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the encoder's embedding only "
            f"{config.vocab_size}"
        )
    network = family.network(config, jnp.dtype(dtype))
    shapes = parameter_shapes(network, dtype)
    program = EncodeProgram.create(network, shapes, place(weight_bytes(shapes)))
    names = family.name_map(config)
    params, weights_sha256 = read_tree(directory, names, dtype, program.params)
    local = pathlib.Path(name_or_dir).is_dir() and name_or_dir != EMBEDDED
    identity = {
        "name": directory.resolve().name if local else name_or_dir,
        "weights_sha256": weights_sha256,
        "tokenizer_sha256": tokenizer_sha256,
        "max_length": max_length,
        "dtype": dtype,
        "dim": config.dim,
    }
    return FlaxEncoder(program, params, tokenizer, identity)


def load_tokenize(name_or_dir: str, max_length: int) -> tuple[Callable, int]:
    """(TextEncoder.tokenize, TextEncoder.dim) of an encoder, without its weights."""
    directory = find_encoder(name_or_dir)
    family, config = _read_config(directory)
    tokenizer, _ = family.load_tokenizer(directory)
    return functools.partial(tokenize, tokenizer, max_length=max_length), config.dim


def read_network(directory: pathlib.Path, dtype: str) -> Any:
    """The Flax network that a directory's config.json (or that file itself) describes."""
    family, config = _read_config(directory)
    return family.network(config, jnp.dtype(dtype))


def find_encoder(name_or_dir: str) -> pathlib.Path:
    """The directory of an encoder: itself, the embedded one, or a hub name's in the cache.

    A hub name that is not in the cache is downloaded.

    Raises:
        FileNotFoundError: there is no such encoder, or the hub cannot be reached and its cache
            lacks the files.
    """
    if name_or_dir == EMBEDDED:
        return pathlib.Path(str(importlib.resources.files("imagen_jax") / "assets" / EMBEDDED))
    directory = pathlib.Path(name_or_dir).expanduser()
    if directory.is_dir():
        return directory
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_dir):
        raise FileNotFoundError(
            f"text encoder {name_or_dir!r}: no such directory, and not a hub name of the form"
            " owner/name"
        )
    try:
        return _from_hub(name_or_dir, cached=True)  # a complete copy in the cache needs no network
    except FileNotFoundError:
        return _from_hub(name_or_dir, cached=False)


def _read_config(path: pathlib.Path) -> tuple[Family, Any]:
    """(family, sizes) of a directory's config.json, or of that file itself.

    Raises ValueError with the known families if none recognises it.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"text encoder {path} has no config.json")
    raw = json.loads(file.read_text())
    for family in FAMILIES.values():
        if family.recognises(raw):
            return family, family.read_config(raw)
    kind = raw.get("model_type") or raw.get("architectures") or "no model_type"
    raise ValueError(
        f"{file} describes an unknown text encoder ({kind}): the known families are "
        f"{', '.join(FAMILIES)}"
    )


def _from_hub(name: str, cached: bool) -> pathlib.Path:
    """Finds or downloads an encoder's files, and only those shards that hold its tensors."""
    file = _fetch(name, "config.json", cached)
    if file is None:
        raise FileNotFoundError(
            f"text encoder {name!r}: not a directory, not in the Hugging Face cache, and the hub"
            " cannot be reached or has no such model; download it where there is a network"
            " (hf download) and give its directory"
        )
    directory = file.parent
    family, config = _read_config(directory)
    lacking = f"text encoder {name!r}: neither the hub nor its cache has"
    weights = next((weights for weights in WEIGHTS if _fetch(name, weights, cached)), None)
    if weights is None:
        raise FileNotFoundError(f"{lacking} {' or '.join(WEIGHTS)}")
    shards = shard_names(directory / weights, family.name_map(config).covers)
    absent = [shard for shard in shards if not _fetch(name, shard, cached)]
    if absent:
        raise FileNotFoundError(f"{lacking} {', '.join(absent)}")
    if not any(_fetch(name, tokenizer, cached) for tokenizer in family.tokenizers):
        raise FileNotFoundError(f"{lacking} its tokenizer ({' or '.join(family.tokenizers)})")
    for extra in TOKENIZER_EXTRAS:
        _fetch(name, extra, cached)
    return directory


def _fetch(name: str, file: str, cached: bool) -> pathlib.Path | None:
    """One file of a hub repository, from the cache or (unless `cached`) downloaded, or None."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(name, file, local_files_only=cached))
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError):
        return None
    except errors.HfHubHTTPError as error:
        raise OSError(f"text encoder {name!r}: {error}") from error
