"""The T5 encoder network in Flax; that of T5 v1.1 is Imagen's frozen text encoder (section 2.1).

Sizes are in Raffel et al. 2020 and the v1.1 release. Differences from an ordinary transformer: RMS
norm without mean or bias, no biases, attention without the 1/sqrt(d_kv) factor, one table of
relative position biases shared by all layers. The MLP of T5 v1.1 and Flan-T5 has a gated tanh-GELU,
that of the original T5 a ReLU. Parameters are a plain nested dict; `weights/t5_files.py` maps each
to its Hugging Face name.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.storage import read_object
from imagen_jax.text.choice import Choice
from imagen_jax.text.config_numbers import read_numbers

# Added to the logits of padding. It is finite, so that a row of padding alone gives finite values.
MASKED = -1e10
GATED, RELU = "gated-gelu", "relu"  # feed_forward_proj of T5 v1.1 and Flan-T5, of the original T5


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder, with the field names of a Hugging Face config.json."""

    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_layers: int
    vocab_size: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = GATED

    @property
    def dim(self) -> int:
        """Features per token."""
        return self.d_model

    @property
    def pooled_dim(self) -> int:
        """T5 has no pooled vector."""
        return 0

    @property
    def max_length(self) -> int | None:
        """T5's relative positions have no longest text."""
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """T5 always gives the normed features of its last layer, so nothing is chosen."""
        return {}

    def with_choice(self, choice: Choice) -> "T5Config":
        """Itself. Raises ValueError if features were chosen."""
        choice.refuse(("layer", "final_norm", "pooling"), "T5")
        return self

    @property
    def gated(self) -> bool:
        """Whether the MLP is that of T5 v1.1."""
        return self.feed_forward_proj == GATED

    @classmethod
    def from_json(cls, source: str | pathlib.Path | Mapping) -> "T5Config":
        """Reads a Hugging Face config.json, given as a path or parsed.

        Raises ValueError if it is not valid JSON or describes another architecture.
        """
        raw = source if isinstance(source, Mapping) else read_object(pathlib.Path(source), {})
        projection = raw.get("feed_forward_proj", RELU)  # the original T5's config lacks it
        if projection not in (GATED, RELU):
            raise ValueError(
                f"feed_forward_proj is {projection!r}: only {GATED!r} (T5 v1.1, Flan-T5) and"
                f" {RELU!r} (the original T5) are supported"
            )
        fields = [f for f in dataclasses.fields(cls) if f.type is not str]
        required = [f.name for f in fields if f.default is dataclasses.MISSING]
        defaults = {f.name: f.default for f in fields if f.name not in required}
        return cls(**read_numbers(raw, required, defaults, "T5"), feed_forward_proj=projection)

    def to_json(self) -> dict:
        """The content of a config.json for `from_json` and transformers."""
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "feed_forward_proj": self.feed_forward_proj,
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


class MLP(nn.Module):
    """gelu(x gate) * (x up), then down, with the tanh approximation of the GELU; or relu(x up)."""

    config: T5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        project = functools.partial(projection, dtype=self.dtype)

        if c.gated:
            gate = jax.nn.gelu(project("gate", c.d_ff, c.d_model)(x), approximate=True)
            hidden = gate * project("up", c.d_ff, c.d_model)(x)
        else:
            hidden = jax.nn.relu(project("up", c.d_ff, c.d_model)(x))
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
        return x + MLP(c, self.dtype, name="mlp")(
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
