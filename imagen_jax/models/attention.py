"""Attention over pixels and text tokens, and attention pooling of the text.

Source: section 2.5 and appendices D.3.1 and F.1 of the paper.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from imagen_jax.models.layers import (
    Constrain,
    Dtype,
    Projections,
    dense,
    from_text,
    group_norm,
    identity,
)
from imagen_jax.models.remat import mark_stored

# Groups of (keys [b m c], values [b m c], mask of the valid ones [b m] or None if all are valid).
# The groups differ in m.
Keys = tuple[tuple[Float[Array, "b _ c"], Float[Array, "b _ c"], Bool[Array, "b _"] | None], ...]
# The signature of `attend`; a faster implementation for one device can replace it.
Attend = Callable[[Float[Array, "b n c"], Keys, int], Float[Array, "b n c"]]
# {kind of attention: (pixels are keys, text tokens are keys)}
KINDS = {"fused": (True, True), "self": (True, False), "cross": (False, True)}


def attend(q: Float[Array, "b n c"], keys: Keys, heads: int) -> Float[Array, "b n c"]:
    """Multi-head attention over all groups of keys: softmax(q k^T / sqrt(d)) v.

    Args:
        q: queries [b n c].
        keys: groups of keys, values and masks; the softmax runs over all groups together.
        heads: number of heads, each of d = c / heads channels.

    Returns [b n c]. The softmax is computed in fp32.
    """
    split = lambda a: a.reshape(*a.shape[:2], heads, a.shape[2] // heads)
    join = lambda parts: jnp.concatenate(parts, axis=1)
    k, v = (split(join([group[i] for group in keys])) for i in (0, 1))
    valid = join([jnp.ones(k.shape[:2], bool) if valid is None else valid for k, _, valid in keys])
    out = jax.nn.dot_product_attention(split(q), k, v, mask=valid[:, None, None, :])
    return mark_stored(out.reshape(q.shape))


class Attention(nn.Module):
    """A residual attention layer on a feature map. The output kernel is initialised to zero.

    kind:
        fused   pixels attend to pixels and text tokens in one softmax: the keys and values of the
                text are concatenated to those of the image (base and 64->256 stages)
        cross   pixels attend to the text only (256->1024 stage)
        self    pixels attend to pixels only (models without text)

    Each layer normalises the text with its own LayerNorm. GroupNorm would include padding in its
    statistics.
    """

    heads: int
    kind: str
    dtype: Dtype
    attend: Attend = attend
    constrain: Constrain = identity

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "b h w c"],
        text: Float[Array, "b l d"] | None,
        text_mask: Bool[Array, "b l"] | None,
    ) -> Float[Array, "b h w c"]:
        b, height, width, c = h.shape
        pixel_keys, text_keys = KINDS[self.kind]
        if c % self.heads:
            raise ValueError(f"{c} channels do not divide into {self.heads} attention heads")
        pixels = h.reshape(b, height * width, c)
        normed = group_norm(c, self.dtype, "norm")(pixels)
        keys = []
        if pixel_keys:
            q, k, v = map(self.constrain, Projections(3, c, self.dtype, name="qkv")(normed))
            keys.append((k, v, None))
        else:
            q = self.constrain(dense(c, self.dtype, "q")(normed))
        if text_keys:
            k, v = from_text(self, "keys", lambda: self._text_keys(text, c))
            keys.append((k, v, text_mask))
        out = dense(c, self.dtype, "out", zero_init=True)(self.attend(q, tuple(keys), self.heads))
        return (pixels + out).reshape(h.shape)

    def _text_keys(
        self, text: Float[Array, "b l d"], c: int
    ) -> tuple[Float[Array, "b l c"], Float[Array, "b l c"]]:
        text = nn.LayerNorm(dtype=self.dtype, name="text_norm")(text)
        k, v = Projections(2, c, self.dtype, name="text_kv")(text)
        return self.constrain(k), self.constrain(v)


class FeedForward(nn.Module):
    """A residual MLP: GroupNorm, Dense to `hidden`, swish, Dense back.

    It follows the attention of the Efficient U-Net, where the paper prints "hidden 2c".
    """

    hidden: int
    dtype: Dtype
    constrain: Constrain = identity

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = h.shape[-1]
        out = dense(self.hidden, self.dtype, "dense_0")(group_norm(c, self.dtype, "norm")(h))
        out = dense(c, self.dtype, "dense_1", zero_init=True)(jax.nn.swish(self.constrain(out)))
        return h + out


class TextPool(nn.Module):
    """The caption as one vector [b features] (F.1 `feature_pooling_type`).

    LayerNorm, pooling over the valid tokens, then a Dense to `features`.

    pooling:
        attention   attention with one query: the mean of the tokens plus a learned vector
        mean        the mean of the tokens (an ablation of D.1)
    """

    pooling: str
    heads: int
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, text: Float[Array, "b l d"], text_mask: Bool[Array, "b l"]
    ) -> Float[Array, "b e"]:
        d = text.shape[-1]
        if d % self.heads:
            raise ValueError(f"text width {d} does not divide into {self.heads} pooling heads")
        text = nn.LayerNorm(dtype=self.dtype, name="norm")(text)
        weight = text_mask[..., None].astype(jnp.float32)
        mean = jnp.sum(text * weight, axis=1) / jnp.sum(weight, axis=1)
        pooled = POOLINGS[self.pooling](self, text, text_mask, mean)
        return nn.Dense(self.features, dtype=self.dtype, name="out")(pooled)


def _attention_pooling(
    layer: TextPool,
    text: Float[Array, "b l d"],
    text_mask: Bool[Array, "b l"],
    mean: Float[Array, "b d"],
) -> Float[Array, "b d"]:
    d = text.shape[-1]
    learned = layer.param("query", nn.initializers.normal(d**-0.5), (d,))
    query = mean.astype(layer.dtype) + learned[None].astype(layer.dtype)
    q = nn.Dense(d, dtype=layer.dtype, name="q")(query)
    k, v = Projections(2, d, layer.dtype, name="kv")(text)
    return attend(q[:, None], ((k, v, text_mask),), layer.heads)[:, 0]


POOLINGS = {
    "attention": _attention_pooling,
    "mean": lambda layer, text, text_mask, mean: mean,
}
