"""T5 encoders in the Hugging Face layout: config.json, tokenizer, tensor names.

Of a full checkpoint only the encoder is read; shards with decoder tensors alone may be absent.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from imagen_jax.text import tokenizer as tokenizers
from imagen_jax.text.t5_network import T5Config
from imagen_jax.weights.name_map import NameMap, Slot, write_tree

MODEL_TYPES = ("t5", "mt5")  # mT5 is T5 v1.1 with another vocabulary
OWN_FIELDS = ("d_kv", "feed_forward_proj", "relative_attention_num_buckets")
TOKENIZERS = {"tokenizer.json": "PreTrainedTokenizerFast", "spiece.model": "T5Tokenizer"}
EMBEDDING_ALIAS = "encoder.embed_tokens.weight"  # the same tensor as shared.weight


def is_t5(config: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json describes a T5; without model_type, its fields decide."""
    if "model_type" in config:
        return config["model_type"] in MODEL_TYPES
    return any(field in config for field in OWN_FIELDS)


def name_map(config: T5Config) -> NameMap:
    """The map from Hugging Face tensor names to the leaves of T5Encoder's parameters."""
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    buckets = (config.relative_attention_num_buckets, config.num_heads)
    slots = {
        "shared.weight": Slot(("token_embedding",), (config.vocab_size, config.d_model), False),
        bias: Slot(("relative_bias",), buckets, False),
        "encoder.final_layer_norm.weight": Slot(("final_norm", "scale"), (config.d_model,), False),
    }
    for i in range(config.num_layers):
        block = _block_slots(config, f"block_{i}")
        slots |= {f"encoder.block.{i}.{name}.weight": slot for name, slot in block.items()}
    return NameMap(slots, _is_encoder, {EMBEDDING_ALIAS: "shared.weight"})


def load_tokenizer(directory: pathlib.Path) -> tuple[Any, str]:
    """(tokenizer of a directory, SHA-256 of its file).

    Raises:
        FileNotFoundError: the directory has none.
        ValueError: it cannot be read, or does not end every text with end-of-sequence.
    """
    tokenizer, file, sha256 = tokenizers.load_tokenizer(directory, TOKENIZERS)
    end = tokenizer.eos_token_id
    if end is None or tokenizer("")["input_ids"] != [end]:
        raise ValueError(
            f"{file} is not a T5 tokenizer: it does not end every text with one end-of-sequence"
            " token"
        )
    return tokenizer, sha256


def save_encoder(
    directory: str | os.PathLike,
    config: T5Config,
    params: Mapping,
    tokenizer: Any,
    dtype: str = "bfloat16",
) -> None:
    """Writes config.json, model.safetensors (in `dtype`) and the tokenizer as Hugging Face does."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tree(directory / "model.safetensors", params, name_map(config), dtype)
    fields = config.to_json() | {"torch_dtype": str(dtype)}
    text = json.dumps(fields, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(directory)


def _is_encoder(name: str) -> bool:
    return name.startswith("encoder.") or name == "shared.weight"


def _block_slots(config: T5Config, block: str) -> dict[str, Slot]:
    """The slots of one block; names lack the prefix of the block and ".weight"."""
    width, inner, hidden = config.d_model, config.num_heads * config.d_kv, config.d_ff
    kernels = {
        "layer.0.SelfAttention.q": (("attention", "query"), (inner, width)),
        "layer.0.SelfAttention.k": (("attention", "key"), (inner, width)),
        "layer.0.SelfAttention.v": (("attention", "value"), (inner, width)),
        "layer.0.SelfAttention.o": (("attention", "out"), (width, inner)),
        "layer.1.DenseReluDense.wo": (("mlp", "down"), (width, hidden)),
    }
    mlp = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
    kernels |= {
        f"layer.1.DenseReluDense.{name}": (("mlp", path), (hidden, width))
        for name, path in mlp.items()
    }
    norms = {"layer.0.layer_norm": "attention_norm", "layer.1.layer_norm": "mlp_norm"}
    slots = {
        name: Slot((block, *path, "kernel"), shape, True) for name, (path, shape) in kernels.items()
    }
    return slots | {
        name: Slot((block, norm, "scale"), (width,), False) for name, norm in norms.items()
    }
