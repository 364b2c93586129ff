"""Attention over pixels and text tokens, and the attention pooling of text (section 2.5, D.3.1,
F.1).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from imagen_jax.models.layers import Constrain, Dtype, Projections, dense, group_norm, identity
from imagen_jax.models.remat import keep

Keys = tuple[
    tuple[Array, Array, Array | None], ...
]  # (keys [b m c], values [b m c], which of them are valid [b m]; None: all)
Attend = Callable[
    [Array, Keys, int], Array
]  # `attend`, or what does the same faster on some device
KINDS = ("fused", "self", "cross")
POOLINGS = ("attention", "mean")


def attend(q: Float[Array, "b n c"], keys: Keys, heads: int) -> Float[Array, "b n c"]:
    """softmax(q k^T / sqrt(d)) v over all valid keys at once, in each of `heads` parts of d
    channels, softmax in fp32.
    """
    split = lambda a: a.reshape(*a.shape[:2], heads, a.shape[2] // heads)
    join = lambda parts: jnp.concatenate(parts, axis=1)
    k, v = (split(join([group[i] for group in keys])) for i in (0, 1))
    valid = join([jnp.ones(k.shape[:2], bool) if valid is None else valid for k, _, valid in keys])
    out = jax.nn.dot_product_attention(split(q), k, v, mask=valid[:, None, None, :])
    return keep(out.reshape(q.shape))


class Attention(nn.Module):
    """One attention layer on a feature map, added to it; starts as nothing (zero output kernel).

    kind "fused": pixels attend to pixels and text tokens at once, the text's keys and values beside
    the image's (the base and 64->256 models). "cross": to the text alone (256->1024). "self": to
    pixels alone (no text in the model). Text goes through its own LayerNorm in every layer, never a
    GroupNorm: its statistics would run over padding.
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
        text: Float[Array, "b l e"] | None,
        text_mask: Bool[Array, "b l"] | None,
    ) -> Float[Array, "b h w c"]:
        b, height, width, c = h.shape
        if self.kind not in KINDS:
            raise ValueError(f"attention kind is {self.kind!r}; it must be one of {KINDS}")
        if c % self.heads:
            raise ValueError(f"{c} channels do not divide into {self.heads} attention heads")
        pixels = h.reshape(b, height * width, c)
        normed = group_norm(c, self.dtype, "norm")(pixels)
        keys: list[tuple[Array, Array, Array | None]] = []
        if self.kind == "cross":
            q = self.constrain(dense(c, self.dtype, "q")(normed))
        else:
            q, k, v = map(self.constrain, Projections(3, c, self.dtype, name="qkv")(normed))
            keys.append((k, v, None))
        if self.kind != "self":
            k, v = map(
                self.constrain,
                Projections(2, c, self.dtype, name="text_kv")(
                    nn.LayerNorm(dtype=self.dtype, name="text_norm")(text)
                ),
            )
            keys.append((k, v, text_mask))
        out = dense(c, self.dtype, "out", zero_init=True)(self.attend(q, tuple(keys), self.heads))
        return (pixels + out).reshape(h.shape)


class FeedForward(nn.Module):
    """GroupNorm, Dense to `hidden`, swish, Dense back, added: the "hidden 2c" after the Efficient
    U-Net's attention.
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
    """The caption as one vector (F.1 `feature_pooling_type`): LayerNorm, pooling over the valid
    tokens, a Dense to `features`.

    "attention": single-query attention, the query the tokens' mean plus a learned vector. "mean":
    the mean alone (an ablation of D.1).
    """

    pooling: str
    heads: int
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, text: Float[Array, "b l e"], text_mask: Bool[Array, "b l"]
    ) -> Float[Array, "b t"]:
        e = text.shape[-1]
        if self.pooling not in POOLINGS:
            raise ValueError(f"model.pooling is {self.pooling!r}; it must be one of {POOLINGS}")
        if e % self.heads:
            raise ValueError(f"text width {e} does not divide into {self.heads} pooling heads")
        text = nn.LayerNorm(dtype=self.dtype, name="norm")(text)
        weight = text_mask[..., None].astype(jnp.float32)
        mean = jnp.sum(text * weight, axis=1) / jnp.sum(weight, axis=1)
        if self.pooling == "mean":
            return nn.Dense(self.features, dtype=self.dtype, name="out")(mean)
        query = mean.astype(self.dtype) + self.param(
            "query", nn.initializers.normal(e**-0.5), (e,)
        )[None].astype(self.dtype)
        q = nn.Dense(e, dtype=self.dtype, name="q")(query)
        k, v = Projections(2, e, self.dtype, name="kv")(text)
        pooled = attend(q[:, None], ((k, v, text_mask),), self.heads)[:, 0]
        return nn.Dense(self.features, dtype=self.dtype, name="out")(pooled)
