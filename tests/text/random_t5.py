"""Random T5 weights and small encoders on disk. Weights depend on name, shape and seed alone, so
goldens need not store them.
"""

import json
import pathlib
import zlib

import numpy as np

from imagen_jax.text.t5_network import T5Config
from imagen_jax.weights.name_map import Slot
from imagen_jax.weights.t5_files import name_map

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "goldens"
TOKENIZER = GOLDENS / "t5_tokenizer"

# name -> (config fields, scale of the embedding); "epsilon" and "faint" make a wrong epsilon
# visible, "original" is the variant without a gate
CASES = {
    "deep": (dict(d_model=32, d_ff=48, d_kv=8, num_heads=3, num_layers=4, vocab_size=100), 1.0),
    "far": (
        dict(
            d_model=16,
            d_ff=40,
            d_kv=5,
            num_heads=4,
            num_layers=2,
            vocab_size=60,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=20,
        ),
        1.0,
    ),
    "epsilon": (
        dict(
            d_model=24,
            d_ff=16,
            d_kv=16,
            num_heads=2,
            num_layers=3,
            vocab_size=50,
            layer_norm_epsilon=0.1,
        ),
        1.0,
    ),
    "faint": (dict(d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=1, vocab_size=50), 1e-3),
    "original": (
        dict(
            d_model=24,
            d_ff=40,
            d_kv=6,
            num_heads=4,
            num_layers=3,
            vocab_size=70,
            feed_forward_proj="relu",
        ),
        1.0,
    ),
}


def random_tensor(
    name: str, shape: tuple[int, ...], seed: int, embedding_scale: float = 1.0
) -> np.ndarray:
    """fp32 values of the Hugging Face tensor `name`, scaled so that features have unit size."""
    x = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape)
    if name.endswith("norm.weight"):
        x = 1 + 0.2 * x
    elif name in ("shared.weight", "encoder.embed_tokens.weight"):
        x = x * embedding_scale
    elif "relative_attention_bias" not in name:
        x = x * shape[1] ** -0.5
    return x.astype(np.float32)


def random_weights(
    config: T5Config, seed: int, embedding_scale: float = 1.0
) -> dict[str, np.ndarray]:
    """All encoder tensors by their Hugging Face names."""
    return {
        name: random_tensor(name, slot.shape, seed, embedding_scale)
        for name, slot in name_map(config).slots.items()
    }


def as_params(config: T5Config, weights: dict[str, np.ndarray]) -> dict:
    """The parameter tree of T5Encoder, built without the loader."""
    params: dict = {}
    for name, slot in name_map(config).slots.items():
        put(params, slot, weights[name].T if slot.transposed else weights[name])
    return params


def put(params: dict, slot: Slot, value: np.ndarray) -> None:
    for key in slot.path[:-1]:
        params = params.setdefault(key, {})
    params[slot.path[-1]] = value


def random_tokens(
    config: T5Config, seed: int, lengths: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, also random in the padding, and the mask of the given lengths)."""
    rng = np.random.RandomState(seed)
    tokens = rng.randint(2, config.vocab_size, (len(lengths), max(lengths))).astype(np.int32)
    return tokens, np.arange(max(lengths))[None, :] < np.array(lengths)[:, None]


def write_encoder(
    directory: pathlib.Path, config: T5Config, weights: dict[str, np.ndarray]
) -> pathlib.Path:
    """Writes config.json and model.safetensors, without a tokenizer."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_json()))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
