"""The T5 v1.1 encoder network in Flax, Imagen's frozen text encoder (section 2.1).

Sizes are in Raffel et al. 2020 and the v1.1 release. Differences from an ordinary transformer: RMS
norm without mean or bias, no biases, attention without the 1/sqrt(d_kv) factor, one table of
relative position biases shared by all layers, a gated tanh-GELU MLP. Parameters are a plain nested
dict; `weights/t5_files.py` maps each to its Hugging Face name.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.storage import read_object

# Added to the logits of padding. It is finite, so that a row of padding alone gives finite values.
MASKED = -1e10


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder, with the field names of a Hugging Face config.json."""

    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_layers: int
    vocab_size: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @property
    def dim(self) -> int:
        """Features per token."""
        return self.d_model

    @classmethod
    def from_json(cls, source: str | pathlib.Path | Mapping) -> "T5Config":
        """Reads a Hugging Face config.json, given as a path or parsed.

        Raises ValueError if it is not valid JSON or describes another architecture.
        """
        raw = source if isinstance(source, Mapping) else read_object(pathlib.Path(source), {})
        projection = raw.get("feed_forward_proj", "relu")
        if projection != "gated-gelu":
            raise ValueError(
                f"feed_forward_proj is {projection!r}: only T5 v1.1 encoders ('gated-gelu') are"
                " supported"
            )
        fields = dataclasses.fields(cls)
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in raw]
        if missing:
            raise ValueError(f"not a T5 config: it lacks {', '.join(missing)}")
        for f in fields:
            value = raw.get(f.name, f.default)
            if type(value) not in (int, float) or (f.type is int and type(value) is not int):
                raise ValueError(f"{f.name} is {value!r}, not a number; download the file again")
        return cls(**{f.name: raw[f.name] for f in fields if f.name in raw})

    def to_json(self) -> dict:
        """The content of a config.json for `from_json` and transformers."""
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
            "use_cache": False,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
            **dataclasses.asdict(self),
        }


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "l l"]:
    """The bucket of key position - query position, [query, key]; a compile-time constant.

    Half of the buckets are for keys after the query. In each half, one half are exact distances
    and the others are log-spaced up to `max_distance`.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    per_side = num_buckets // 2
    exact = per_side // 2
    distance = np.abs(offset)
    # float32 and one division, as in the reference: float64 moves distances at a bucket's edge.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    spaced = exact + (ratio * np.float32(per_side - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(spaced, per_side - 1))
    return (bucket + np.where(offset > 0, per_side, 0)).astype(np.int32)


class RMSNorm(nn.Module):
    """Scales features to unit root mean square, in fp32; no mean, no bias."""

    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)[None, None, :]).astype(self.dtype)


def projection(name: str, features: int, fan: int, dtype: DTypeLike) -> nn.Dense:
    """A dense layer without bias, initialised with variance 1 / fan."""
    init = nn.initializers.normal(fan**-0.5)
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init, name=name)


class SelfAttention(nn.Module):
    """Multi-head attention without 1/sqrt(d_kv): the query's initialisation has that factor."""

    config: T5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "b h l l"]
    ) -> Float[Array, "b l d"]:
        c = self.config
        inner = c.num_heads * c.d_kv
        project = functools.partial(projection, dtype=self.dtype)

        def heads(y):
            return y.reshape(*y.shape[:2], c.num_heads, c.d_kv)

        query = heads(project("query", inner, c.d_model * c.d_kv)(x))
        key = heads(project("key", inner, c.d_model)(x))
        value = heads(project("value", inner, c.d_model)(x))
        logits = (
            jnp.einsum("bqhk,bmhk->bhqm", query, key, preferred_element_type=jnp.float32) + bias
        )
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqm,bmhk->bqhk", weights, value)
        return project("out", c.d_model, inner)(mixed.reshape(*x.shape[:2], inner))


class GatedMLP(nn.Module):
    """gelu(x gate) * (x up), then down, with the tanh approximation of the GELU."""

    config: T5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        project = functools.partial(projection, dtype=self.dtype)

        hidden = jax.nn.gelu(project("gate", c.d_ff, c.d_model)(x), approximate=True) * project(
            "up", c.d_ff, c.d_model
        )(x)
        return project("down", c.d_model, c.d_ff)(hidden)


class Block(nn.Module):
    """Pre-norm attention and MLP, with residuals in fp32.

    In bf16, small updates to its large channels would be rounded away.
    """

    config: T5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "b h l l"]
    ) -> Float[Array, "b l d"]:
        c = self.config
        x = x + SelfAttention(c, self.dtype, name="attention")(
            RMSNorm(c.layer_norm_epsilon, self.dtype, name="attention_norm")(x), bias
        )
        return x + GatedMLP(c, self.dtype, name="mlp")(
            RMSNorm(c.layer_norm_epsilon, self.dtype, name="mlp_norm")(x)
        )


class T5Encoder(nn.Module):
    """Token ids and mask (True = a token) to features in `dtype`.

    Features at masked positions are undefined.
    """

    config: T5Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> Float[Array, "b l d"]:
        c = self.config
        table = self.param(
            "token_embedding", nn.initializers.normal(1.0), (c.vocab_size, c.d_model), jnp.float32
        )
        x = jnp.take(table, tokens, axis=0).astype(jnp.float32)
        per_bucket = self.param(
            "relative_bias",
            nn.initializers.normal(c.d_model**-0.5),
            (c.relative_attention_num_buckets, c.num_heads),
            jnp.float32,
        )
        buckets = relative_buckets(
            tokens.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
        )
        position = per_bucket.astype(jnp.float32)[buckets].transpose(2, 0, 1)  # [h l l]
        bias = position[None] + jnp.where(mask, 0.0, MASKED)[:, None, None, :]
        for i in range(c.num_layers):
            x = Block(c, self.dtype, name=f"block_{i}")(x, bias)
        return RMSNorm(c.layer_norm_epsilon, self.dtype, name="final_norm")(x)
