"""Attention over pixels and text tokens, and the attention pooling of text (section 2.5, D.3.1, F.1)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from imagen_jax.models.layers import Dtype, group_norm

KINDS = ("fused", "self", "cross")
POOLINGS = ("attention", "mean")


def attend(
    q: Float[Array, "b n heads d"], k: Float[Array, "b m heads d"], v: Float[Array, "b m heads d"], valid: Bool[Array, "b m"]
) -> Float[Array, "b n heads d"]:
    """softmax(q k^T / sqrt(d)) v over the `valid` keys, softmax in fp32."""
    return jax.nn.dot_product_attention(q, k, v, mask=valid[:, None, None, :])


class Attention(nn.Module):
    """One attention layer on a feature map, added to it; starts as nothing (zero output kernel).

    kind "fused": pixels attend to pixels and text tokens at once, the text's keys and values appended to the image's (the base and
    64->256 models). "cross": to the text alone (256->1024). "self": to pixels alone (no text in the model).
    Text goes through its own LayerNorm in every layer, never a GroupNorm: its statistics would run over padding.
    """

    heads: int
    kind: str
    dtype: Dtype

    @nn.compact
    def __call__(
        self, h: Float[Array, "b h w c"], text: Float[Array, "b l e"] | None, text_mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b h w c"]:
        b, height, width, c = h.shape
        if self.kind not in KINDS:
            raise ValueError(f"attention kind is {self.kind!r}; it must be one of {KINDS}")
        if c % self.heads:
            raise ValueError(f"{c} channels do not divide into {self.heads} attention heads")
        split = lambda a: a.reshape(b, a.shape[1], self.heads, c // self.heads)
        pixels = group_norm(c, self.dtype, "norm")(h).reshape(b, height * width, c)
        keys, values, valid = [], [], []
        if self.kind == "cross":
            q = nn.Dense(c, dtype=self.dtype, name="q")(pixels)
        else:
            q, k, v = jnp.split(nn.Dense(3 * c, dtype=self.dtype, name="qkv")(pixels), 3, axis=-1)
            keys, values, valid = [k], [v], [jnp.ones((b, height * width), bool)]
        if self.kind != "self":
            context = nn.LayerNorm(dtype=self.dtype, name="text_norm")(text)
            text_k, text_v = jnp.split(nn.Dense(2 * c, dtype=self.dtype, name="text_kv")(context), 2, axis=-1)
            keys, values, valid = keys + [text_k], values + [text_v], valid + [text_mask]
        join = lambda parts: jnp.concatenate(parts, axis=1)
        out = attend(split(q), split(join(keys)), split(join(values)), join(valid)).reshape(b, height * width, c)
        out = nn.Dense(c, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="out")(out)
        return h + out.reshape(h.shape)


class FeedForward(nn.Module):
    """GroupNorm, Dense to `hidden`, swish, Dense back, added: the "hidden 2c" after the Efficient U-Net's attention."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = h.shape[-1]
        out = nn.Dense(self.hidden, dtype=self.dtype, name="dense_0")(group_norm(c, self.dtype, "norm")(h))
        out = nn.Dense(c, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="dense_1")(jax.nn.swish(out))
        return h + out


class TextPool(nn.Module):
    """The caption as one vector (F.1 `feature_pooling_type`): LayerNorm, pooling over the valid tokens, a Dense to `features`.

    "attention": single-query attention, the query the tokens' mean plus a learned vector. "mean": the mean alone (an ablation of D.1).
    """

    pooling: str
    heads: int
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, text: Float[Array, "b l e"], text_mask: Bool[Array, "b l"]) -> Float[Array, "b t"]:
        b, length, e = text.shape
        if self.pooling not in POOLINGS:
            raise ValueError(f"model.pooling is {self.pooling!r}; it must be one of {POOLINGS}")
        if e % self.heads:
            raise ValueError(f"text width {e} does not divide into {self.heads} pooling heads")
        text = nn.LayerNorm(dtype=self.dtype, name="norm")(text)
        weight = text_mask[..., None].astype(jnp.float32)
        mean = jnp.sum(text * weight, axis=1) / jnp.sum(weight, axis=1)
        if self.pooling == "mean":
            return nn.Dense(self.features, dtype=self.dtype, name="out")(mean)
        query = mean.astype(self.dtype) + self.param("query", nn.initializers.normal(e**-0.5), (e,))[None].astype(self.dtype)
        split = lambda a: a.reshape(b, -1, self.heads, e // self.heads)
        q = nn.Dense(e, dtype=self.dtype, name="q")(query)
        k, v = jnp.split(nn.Dense(2 * e, dtype=self.dtype, name="kv")(text), 2, axis=-1)
        pooled = attend(split(q), split(k), split(v), text_mask).reshape(b, e)
        return nn.Dense(self.features, dtype=self.dtype, name="out")(pooled)
