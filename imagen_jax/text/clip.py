"""The text tower of CLIP in Flax, and the transformer block that it shares with the image tower.

Radford et al. 2021, section 2.4: a causal pre-norm transformer; the pooled vector is the normed
feature of the end-of-text token, projected into the space of the image features. Parameters are a
plain nested dict; `weights/clip_files.py` maps each to its Hugging Face name.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

EPSILON = 1e-5
MLP_RATIO = 4


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text tower.

    width: features per token.
    layers, heads: of the transformer.
    dim: features of the pooled vector.
    vocab_size: tokens, including start and end.
    max_length: tokens of the longest text, including start and end.
    """

    width: int
    layers: int
    heads: int
    dim: int
    vocab_size: int = 49408
    max_length: int = 77


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(1.702 x), the approximation of the GELU in OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def layer_norm(name: str, epsilon: float, dtype: DTypeLike) -> nn.LayerNorm:
    """A layer norm with the variance of centred values: E[x^2] - E[x]^2 loses digits."""
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


class SelfAttention(nn.Module):
    """Multi-head attention with biases. `visible` [query, key] hides keys."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], visible: Bool[Array, "l l"] | None
    ) -> Float[Array, "b l d"]:
        def project(name):
            y = nn.Dense(x.shape[-1], dtype=self.dtype, name=name)(x)
            return y.reshape(*x.shape[:2], self.heads, -1)

        query, key, value = project("query"), project("key"), project("value")
        scale = query.shape[-1] ** -0.5
        logits = jnp.einsum(
            "bqhk,bmhk->bhqm", query * scale, key, preferred_element_type=jnp.float32
        )
        if visible is not None:
            logits = jnp.where(visible[None, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqm,bmhk->bqhk", weights, value)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out")(mixed.reshape(x.shape))


class MLP(nn.Module):
    """Two dense layers with an activation between them."""

    activation: Callable
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        hidden = nn.Dense(MLP_RATIO * x.shape[-1], dtype=self.dtype, name="up")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(self.activation(hidden))


class Block(nn.Module):
    """Pre-norm attention and MLP of a ViT or of a text tower; the residuals are fp32.

    heads: attention heads.
    activation: of the MLP.
    epsilon: of the layer norms.
    layer_scale: scales the output of attention and MLP by a learned vector, as DINOv2 does.
    dtype: of the products; parameters are fp32.
    """

    heads: int
    activation: Callable = quick_gelu
    epsilon: float = EPSILON
    layer_scale: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], visible: Bool[Array, "l l"] | None = None
    ) -> Float[Array, "b l d"]:
        def scaled(name, y):
            if not self.layer_scale:
                return y
            return y * self.param(name, nn.initializers.ones, (y.shape[-1],))[None, None, :]

        y = layer_norm("attention_norm", self.epsilon, self.dtype)(x)
        y = SelfAttention(self.heads, self.dtype, name="attention")(y, visible)
        x = x + scaled("attention_scale", y)
        y = layer_norm("mlp_norm", self.epsilon, self.dtype)(x)
        return x + scaled("mlp_scale", MLP(self.activation, self.dtype, name="mlp")(y))


class CLIPText(nn.Module):
    """Token ids and mask (True = a token) to (features per token, pooled and projected vector).

    The last token of each text must be its end-of-text token. Features at masked positions are
    undefined; attention is causal, so padding after a text does not change its features.
    """

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b e"]]:
        c, length = self.config, tokens.shape[1]
        init = nn.initializers.normal(0.02)
        table = self.param("token_embedding", init, (c.vocab_size, c.width))
        position = self.param("position_embedding", init, (c.max_length, c.width))
        x = jnp.take(table, tokens, axis=0).astype(jnp.float32)
        x = x + position[None, :length].astype(jnp.float32)
        visible = jnp.tril(jnp.ones((length, length), bool))
        for i in range(c.layers):
            x = Block(c.heads, dtype=self.dtype, name=f"block_{i}")(x, visible)
        x = layer_norm("final_norm", EPSILON, self.dtype)(x)
        end = jnp.maximum(mask.sum(axis=1) - 1, 0)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        project = nn.Dense(c.dim, use_bias=False, dtype=self.dtype, name="projection")
        return x, project(pooled)
