"""Loads text encoders by hub name or directory, and recognises their architecture.

A new family needs a network in text/, a name map in this folder and an entry in ENCODER_FAMILIES.
Its sizes in text/sizes.py let `plan` name it.
"""

import dataclasses
import functools
import importlib.resources
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imagen_jax import sharding
from imagen_jax.storage import check_local, read_json
from imagen_jax.text import choice as choices
from imagen_jax.text.bert_network import Bert, BertConfig
from imagen_jax.text.choice import Choice
from imagen_jax.text.clip import CLIPText
from imagen_jax.text.encoder import FlaxEncoder, TextEncoder
from imagen_jax.text.encoder_list import parse_encoders
from imagen_jax.text.program import EncodeProgram, fewest_parts, parameter_shapes, weight_bytes
from imagen_jax.text.t5_network import T5Config, T5Encoder
from imagen_jax.text.tokenizer import tokenize
from imagen_jax.weights import bert_files, clip_files, t5_files
from imagen_jax.weights.name_map import NameMap, read_tree
from imagen_jax.weights.tensor_files import WEIGHTS, shard_names

EMBEDDED = "t5_tiny"
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "merges.txt")
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Family:
    """The parts of a text encoder that depend on its architecture.

    recognises: parsed config.json -> whether it describes this family.
    read_config: parsed config.json -> sizes, with `.dim`, `.vocab_size`, `.pooled_dim`,
        `.max_length` (of the longest text, None for any), `.with_choice(choice)` and `.identity`
        (what is chosen). Raises ValueError for a variant that is not supported.
    network: (sizes, dtype) -> Flax network, called (tokens, mask) -> features, or (features, pooled
        vectors) if `.pooled_dim` is not 0.
    name_map: sizes -> map from tensor names to the network's parameters.
    tokenizers: alternative names of the tokenizer's file.
    load_tokenizer: directory -> (transformers tokenizer, SHA-256 of its file).
    """

    recognises: Callable[[Mapping[str, Any]], bool]
    read_config: Callable[[Mapping[str, Any]], Any]
    network: Callable[[Any, Any], Any]
    name_map: Callable[[Any], NameMap]
    tokenizers: Sequence[str]
    load_tokenizer: Callable[[pathlib.Path], tuple[Any, str]]


ENCODER_FAMILIES = {
    "t5": Family(
        recognises=t5_files.is_t5,
        read_config=T5Config.from_json,
        network=T5Encoder,
        name_map=t5_files.name_map,
        tokenizers=tuple(t5_files.TOKENIZERS),
        load_tokenizer=t5_files.load_tokenizer,
    ),
    "clip": Family(
        recognises=clip_files.is_clip,
        read_config=clip_files.read_text_config,
        network=CLIPText,
        name_map=clip_files.encoder_map,
        tokenizers=tuple(clip_files.TOKENIZERS),
        load_tokenizer=clip_files.load_tokenizer,
    ),
    "bert": Family(
        recognises=bert_files.is_bert,
        read_config=BertConfig.from_json,
        network=Bert,
        name_map=bert_files.name_map,
        tokenizers=tuple(bert_files.TOKENIZERS),
        load_tokenizer=bert_files.load_tokenizer,
    ),
}


def one_device(weights: int) -> Mesh:
    """A mesh of this process's first device, for weights of any size (bytes)."""
    return sharding.batch_mesh(jax.local_devices()[:1])


def local_mesh(weights: int) -> Mesh:
    """A mesh of all devices of this process, with `weights` bytes in as few shards as fit."""
    devices = jax.local_devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    return sharding.batch_mesh(devices, fewest_parts(weights, memory, len(devices)))


def encode_program(network: Any, shapes: Mapping[str, Any], mesh: Mesh) -> EncodeProgram:
    """The forward pass of `network` on `mesh`. shapes: the result of `parameter_shapes`."""
    params = sharding.shard_encoder(shapes, mesh)
    return EncodeProgram.create(network, params, sharding.batch_sharding(mesh))


def load_text_encoder(
    name_or_dir: str,
    max_length: int,
    dtype: str = "bfloat16",
    make_mesh: Callable[[int], Mesh] = one_device,
    length_field: str = "--max_length",
) -> FlaxEncoder:
    """Loads a text encoder from a Hugging Face directory or hub name, or "t5_tiny" (embedded).

    name_or_dir: may end with a choice of features, such as "@layer=-1" (`text/choice.py`).
    max_length: tokens, including the final end-of-sequence.
    make_mesh: bytes of weights -> mesh: `one_device` of this process, or all its devices
        (`local_mesh`).
    length_field: where the user gives max_length, for a message.

    Each process reads all weights, tensor by tensor, because their checksum needs all of them, and
    keeps the shards of its own devices.

    Raises:
        FileNotFoundError: there is no such encoder, or one of its files is absent.
        ValueError: an argument is invalid, the family is unknown, a file is damaged, or files do
            not fit together.
    """
    if dtype not in DTYPES:
        raise ValueError(f"text encoder dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if max_length < 1:
        raise ValueError(
            f"text encoder max_length {max_length}: at least 1 is needed, for the end-of-sequence"
            " token"
        )
    name, choice = choices.parse(name_or_dir)
    directory = find_encoder(name)
    family, config = _read_config(directory, choice)
    check_length(max_length, config.max_length, name, length_field)
    tokenizer, tokenizer_sha256 = family.load_tokenizer(directory)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the encoder's embedding only "
            f"{config.vocab_size}"
        )
    network = family.network(config, jnp.dtype(dtype))
    shapes = parameter_shapes(network, dtype)
    program = encode_program(network, shapes, make_mesh(weight_bytes(shapes)))
    names = family.name_map(config)
    params, weights_sha256 = read_tree(directory, names, dtype, program.params)
    local = pathlib.Path(name).is_dir() and name != EMBEDDED
    identity = {
        "name": directory.resolve().name if local else name,
        "weights_sha256": weights_sha256,
        "tokenizer_sha256": tokenizer_sha256,
        "max_length": max_length,
        "dtype": dtype,
        "dim": config.dim,
        **config.identity,
    }
    return FlaxEncoder(program, params, tokenizer, identity)


def encoder_loaders(
    text: str,
    max_length: int,
    dtype: str = "bfloat16",
    make_mesh: Callable[[int], Mesh] = one_device,
) -> dict[str, Callable[[], TextEncoder]]:
    """{name: function that loads the encoder} of the encoders of `encoder_list.parse_encoders`.

    Encoders with a name read at most their own longest text. Raises as `load_text_encoder`.
    """
    load = functools.partial(load_text_encoder, dtype=dtype, make_mesh=make_mesh)
    return {
        name: functools.partial(load, encoder, prepared_length(name, encoder, max_length))
        for name, encoder in parse_encoders(text).items()
    }


def prepared_length(name: str, name_or_dir: str, max_length: int) -> int:
    """Tokens of an encoder in prepared data: `readable_length` of one with a name."""
    return readable_length(name_or_dir, max_length) if name else max_length


def readable_length(name_or_dir: str, length: int) -> int:
    """`length`, or the tokens of the encoder's longest text if that is shorter."""
    longest = longest_text(name_or_dir)
    return length if longest is None else min(length, longest)


def load_tokenize(name_or_dir: str, max_length: int) -> tuple[Callable, int, int]:
    """(TextEncoder.tokenize, .dim, .pooled_dim) of an encoder; its weights may be absent."""
    name, choice = choices.parse(name_or_dir)
    directory = find_encoder(name)
    family, config = _read_config(directory, choice)
    check_length(max_length, config.max_length, name, "--max_length")
    tokenizer, _ = family.load_tokenizer(directory)
    tokenize_texts = functools.partial(tokenize, tokenizer, max_length=max_length)
    return tokenize_texts, config.dim, config.pooled_dim


def longest_text(name_or_dir: str) -> int | None:
    """Tokens of the longest text that an encoder can read; None if there is no limit."""
    name, choice = choices.parse(name_or_dir)
    return _read_config(find_encoder(name), choice)[1].max_length


def read_network(path: pathlib.Path, dtype: str, choice: Choice = choices.DEFAULT) -> Any:
    """The Flax network that a directory, or a config.json, describes."""
    family, config = _read_config(path, choice)
    return family.network(config, jnp.dtype(dtype))


def check_length(max_length: int, longest: int | None, name: str, field: str) -> None:
    """Raises ValueError if the encoder cannot read texts of `max_length` tokens."""
    if longest is not None and max_length > longest:
        raise ValueError(
            f"text encoder {name} reads at most {longest} tokens, not {max_length}: set {field} to"
            f" {longest} or less"
        )


def find_encoder(name_or_dir: str) -> pathlib.Path:
    """The directory of an encoder, embedded, local or in the cache of the Hugging Face hub.

    name_or_dir: without a choice of features.

    A hub name that is not in the cache is downloaded.

    Raises:
        FileNotFoundError: there is no such encoder, or the hub cannot be reached and its cache
            lacks the files.
        ValueError: it is a URL.
    """
    check_local("text encoder", name_or_dir)
    if name_or_dir == EMBEDDED:
        return pathlib.Path(str(importlib.resources.files("imagen_jax") / "assets" / EMBEDDED))
    directory = pathlib.Path(name_or_dir).expanduser()
    if directory.is_dir():
        return directory
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_dir):
        raise FileNotFoundError(
            f"text encoder {name_or_dir!r}: no such directory, and not a hub name of the form"
            " owner/name; check the path"
        )
    try:
        return _from_hub(name_or_dir, cached=True)  # a complete copy in the cache needs no network
    except FileNotFoundError:
        return _from_hub(name_or_dir, cached=False)


def _read_config(path: pathlib.Path, choice: Choice = choices.DEFAULT) -> tuple[Family, Any]:
    """(family, sizes) of a directory's config.json, or of that file itself.

    Raises ValueError if it is not valid JSON or no family recognises it.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"text encoder {path} has no config.json")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is not a model's configuration: it holds no JSON object")
    for family in ENCODER_FAMILIES.values():
        if family.recognises(raw):
            try:
                return family, family.read_config(raw).with_choice(choice)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
    kind = raw.get("model_type") or raw.get("architectures") or "no model_type"
    raise ValueError(
        f"{file} describes an unknown text encoder ({kind}): the supported families are "
        f"{', '.join(ENCODER_FAMILIES)}"
    )


def _from_hub(name: str, cached: bool) -> pathlib.Path:
    """Finds or downloads an encoder's files, of its shards only those with its tensors."""
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
    """The path of one file of a hub repository, None if it does not exist.

    cached: only looks into the cache; otherwise the file is downloaded.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(name, file, local_files_only=cached))
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError):
        return None
    except errors.HfHubHTTPError as error:
        raise OSError(f"text encoder {name!r}: {error}") from error
