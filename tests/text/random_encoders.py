"""Random BERTs and CLIP text towers. Weights depend on tensor name, shape and seed alone, so
goldens need not store them.
"""

import functools
import json
import pathlib
import zlib

import numpy as np

from imagen_jax.text.bert_network import Bert, BertConfig
from imagen_jax.text.clip import CLIPText, CLIPTextConfig
from imagen_jax.weights import bert_files, clip_files
from imagen_jax.weights.leaves import unflatten
from imagen_jax.weights.name_map import NameMap

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "goldens" / "text_encoders.npz"
SEED = 11
LENGTHS = (12, 5, 2)
_bert = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, vocab_size=50)
_clip = dict(width=24, layers=3, heads=3, projection_dim=10, vocab_size=50, max_length=14)
# "wide" makes a wrong epsilon, MLP width and number of token types visible.
BERTS = {
    "bert": BertConfig(**_bert, intermediate_size=96, max_position_embeddings=16),
    "wide": BertConfig(
        **_bert,
        intermediate_size=40,
        max_position_embeddings=12,
        type_vocab_size=1,
        layer_norm_eps=0.1,
    ),
}
CLIPS = {
    "quick": CLIPTextConfig(**_clip),
    "exact": CLIPTextConfig(**_clip, activation="gelu"),
}
Config = BertConfig | CLIPTextConfig


@functools.cache
def names_of(config: Config) -> NameMap:
    return (bert_files.name_map if isinstance(config, BertConfig) else clip_files.encoder_map)(
        config
    )


def network_of(config: Config, dtype: str = "float32"):
    return (Bert if isinstance(config, BertConfig) else CLIPText)(config, dtype)


def random_tensor(name: str, shape: tuple[int, ...], seed: int = SEED) -> np.ndarray:
    """fp32 values of the Hugging Face tensor `name`, scaled so that features have unit size."""
    x = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape)
    if name.endswith("bias"):
        x = 0.2 * x
    elif len(shape) == 1:
        x = 1 + 0.2 * x
    elif "embedding" not in name:
        x = x * shape[1] ** -0.5
    return x.astype(np.float32)


def random_weights(config: Config, seed: int = SEED) -> dict[str, np.ndarray]:
    """All tensors of an encoder by their Hugging Face names."""
    slots = names_of(config).slots
    return {name: random_tensor(name, slot.shape, seed) for name, slot in slots.items()}


def random_params(config: Config, seed: int = SEED) -> dict:
    """The parameter tree, built without the loader."""
    weights = random_weights(config, seed)
    return unflatten(
        {
            slot.name: weights[name].T if slot.transposed else weights[name]
            for name, slot in names_of(config).slots.items()
        }
    )


def random_tokens(
    vocab_size: int, lengths: tuple[int, ...] = LENGTHS, seed: int = SEED
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, also random in the padding, and the mask). The highest id ends each text."""
    tokens = np.random.RandomState(seed).randint(0, vocab_size - 1, (len(lengths), max(lengths)))
    tokens[np.arange(len(lengths)), np.array(lengths) - 1] = vocab_size - 1
    mask = np.arange(max(lengths))[None, :] < np.array(lengths)[:, None]
    return tokens.astype(np.int32), mask


def bert_json(config: BertConfig) -> dict:
    """The config.json of a BERT."""
    fields = {k: v for k, v in vars(config).items() if k not in ("layer", "pooling")}
    return {"model_type": "bert", "hidden_act": "gelu", **fields}


def clip_json(config: CLIPTextConfig) -> dict:
    """The config.json of a text tower alone."""
    return {
        "model_type": "clip_text_model",
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "projection_dim": config.projection_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.max_length,
        "vocab_size": config.vocab_size,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
    }


def write_encoder(directory: pathlib.Path, config: Config, weights=None) -> pathlib.Path:
    """Writes config.json and model.safetensors, without a tokenizer."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    fields = bert_json(config) if isinstance(config, BertConfig) else clip_json(config)
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(weights or random_weights(config), directory / "model.safetensors")
    return directory
