"""The text tower of CLIP in Flax, and the transformer block that it shares with the image tower.

Radford et al. 2021, section 2.4: a causal pre-norm transformer; the pooled vector is the normed
feature of the end-of-text token, projected into the space of the image features. The activation is
a quick GELU in OpenAI's CLIP, the exact GELU in OpenCLIP's. Parameters are a plain nested dict;
`weights/clip_files.py` maps each to its Hugging Face name.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.text import choice as choices

EPSILON = 1e-5
PENULTIMATE = -2  # the layer of a text encoder's features, as in the paper's ablation (D.1)
MLP_RATIO = 4


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(1.702 x), the approximation of the GELU in OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}
# Kinds of the pooled vector: the end-of-text token's feature, normed, with or without projection.
POOLINGS = ("projected", "end")


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text tower, and which of its features are used.

    width: features per token.
    layers, heads: of the transformer.
    projection_dim: features of the projected pooled vector.
    vocab_size: tokens, including start and end.
    max_length: tokens of the longest text, including start and end.
    activation: of ACTIVATIONS.
    layer: whose output the features are; 0 is the embeddings, None the last one.
    final_norm: whether the final layer norm is applied to them; the pooled vector always has it.
    pooling: of POOLINGS.
    """

    width: int
    layers: int
    heads: int
    projection_dim: int
    vocab_size: int = 49408
    max_length: int = 77
    activation: str = "quick_gelu"
    layer: int | None = None
    final_norm: bool = True
    pooling: str = "projected"

    @property
    def dim(self) -> int:
        """Features per token."""
        return self.width

    @property
    def pooled_dim(self) -> int:
        """Features of the pooled vector."""
        return self.projection_dim if self.pooling == "projected" else self.width

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the features beside weights and tokenizer."""
        return {
            "family": "clip",
            "activation": self.activation,
            "layer": self.layers if self.layer is None else self.layer,
            "final_norm": self.final_norm,
            "pooling": self.pooling,
            "pooled_dim": self.pooled_dim,
        }

    def with_choice(self, choice: choices.Choice) -> "CLIPTextConfig":
        """The config with the chosen features, by default the penultimate layer without norm.

        By default the last layer, where it is chosen, has the final norm.

        Raises ValueError if the encoder has no such features.
        """
        layer = PENULTIMATE if choice.layer is None else choice.layer
        layer = choices.resolve_layer(layer, self.layers)
        return dataclasses.replace(
            self,
            layer=layer,
            final_norm=layer == self.layers if choice.final_norm is None else choice.final_norm,
            pooling=choices.check_pooling(choice.pooling or POOLINGS[0], POOLINGS),
        )


def layer_norm(name: str, epsilon: float, dtype: DTypeLike) -> nn.LayerNorm:
    """A layer norm with the variance of centred values: E[x^2] - E[x]^2 loses digits."""
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


class SelfAttention(nn.Module):
    """Multi-head attention with biases. `visible` [text, query, key] hides keys."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], visible: Bool[Array, "#b #l l"] | None
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
            logits = jnp.where(visible[:, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqm,bmhk->bqhk", weights, value)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out")(mixed.reshape(x.shape))


class MLP(nn.Module):
    """Two dense layers with an activation between them. hidden: features there."""

    hidden: int
    activation: Callable
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        hidden = nn.Dense(self.hidden, dtype=self.dtype, name="up")(x)
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
        self, x: Float[Array, "b l d"], visible: Bool[Array, "#b #l l"] | None = None
    ) -> Float[Array, "b l d"]:
        def scaled(name, y):
            if not self.layer_scale:
                return y
            return y * self.param(name, nn.initializers.ones, (y.shape[-1],))[None, None, :]

        y = layer_norm("attention_norm", self.epsilon, self.dtype)(x)
        y = SelfAttention(self.heads, self.dtype, name="attention")(y, visible)
        x = x + scaled("attention_scale", y)
        y = layer_norm("mlp_norm", self.epsilon, self.dtype)(x)
        mlp = MLP(MLP_RATIO * x.shape[-1], self.activation, self.dtype, name="mlp")
        return x + scaled("mlp_scale", mlp(y))


class CLIPText(nn.Module):
    """Token ids and mask (True = a token) to (features per token, pooled vector).

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
        visible = jnp.tril(jnp.ones((length, length), bool))[None]
        activation, states = ACTIVATIONS[c.activation], [x]
        for i in range(c.layers):
            block = Block(c.heads, activation, dtype=self.dtype, name=f"block_{i}")
            states.append(block(states[-1], visible))
        norm = layer_norm("final_norm", EPSILON, self.dtype)
        last = norm(states[-1])
        chosen = states[-1 if c.layer is None else c.layer]
        end = jnp.maximum(mask.sum(axis=1) - 1, 0)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        if c.pooling == "projected":
            project = nn.Dense(
                c.projection_dim, use_bias=False, dtype=self.dtype, name="projection"
            )
            pooled = project(pooled)
        return norm(chosen) if c.final_norm else chosen, pooled
