"""The residual block, and the conditioning that every block receives.

`unet.py` and `efficient_unet.py` assemble them into levels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from imagen_jax.models.attention import TextPool
from imagen_jax.models.layers import (
    Constrain,
    Conv,
    Dtype,
    Gather,
    NoiseLevelEmbedding,
    dense,
    from_text,
    group_norm,
    identity,
)
from imagen_jax.models.resampling import average_pool, upsample_nearest
from imagen_jax.text_inputs import MASK, POOLED, TEXT, field_name

# The dict `cond` of a network: text, text_mask, lowres, lowres_logsnr. Each entry has b rows. With
# several text encoders there are text.NAME, text_mask.NAME and pooled.NAME instead.
Cond = PyTree[Shaped[Array, "b ..."]]
RESAMPLE = {"down": average_pool, "up": upsample_nearest}
# Fields of both networks that each of their levels has too.
LEVEL_FIELDS = ("scale_shift", "dropout", "dtype", "remat", "constrain", "gather", "attend")


class ResBlock(nn.Module):
    """A residual block with noise-level and text conditioning.

        out = conv_0(resample(swish(norm_0(h))))
        out = conv_1(dropout(swish(norm_1(out) * (1 + scale) + shift)))
        result = (shortcut(resample(h)) + out) * residual_scale

    scale and shift are a Dense layer of the embedding (F.1 `use_scale_shift_norm`). With
    `scale_shift` off, the Dense output is added before norm_1 instead. Resampling happens inside
    the block (F.1 `resblock_type` "biggan"). The shortcut is a 1x1 convolution where the width
    changes, or in every block with `project_shortcut` (Fig. A.27).
    """

    features: int
    dtype: Dtype
    scale_shift: bool
    resample: str = "none"
    project_shortcut: bool = False
    residual_scale: float = 1.0
    dropout: float = 0.0
    constrain: Constrain = identity
    gather: Gather = identity

    @nn.compact
    def __call__(
        self, h: Float[Array, "b h w c"], emb: Float[Array, "b e"], train: bool
    ) -> Float[Array, "b h2 w2 c2"]:
        resample = lambda h: (
            h if self.resample == "none" else self.constrain(RESAMPLE[self.resample](h))
        )
        shortcut = resample(h)
        out = jax.nn.swish(group_norm(h.shape[-1], self.dtype, "norm_0")(h))
        conv = partial(Conv, self.features, self.dtype, gather=self.gather)
        out = self.constrain(conv(name="conv_0")(resample(out)))
        film = nn.Dense((1 + self.scale_shift) * self.features, dtype=self.dtype, name="film")(
            jax.nn.swish(emb)
        )
        film = self.constrain(film)[:, None, None, :]
        norm = group_norm(self.features, self.dtype, "norm_1")
        if self.scale_shift:
            scale, shift = jnp.split(film, 2, axis=-1)
            out = norm(out) * (1 + scale) + shift
        else:
            out = norm(out + film)
        out = nn.Dropout(self.dropout, deterministic=not train)(jax.nn.swish(out))
        out = self.constrain(conv(zero_init=True, name="conv_1")(out))
        if self.project_shortcut or shortcut.shape[-1] != self.features:
            shortcut = dense(self.features, self.dtype, "shortcut")(shortcut)
        return (shortcut + out) * jnp.asarray(self.residual_scale, out.dtype)


class Conditioning(nn.Module):
    """The embeddings that condition every block.

    Returns (emb [b features], text [b l cond_dim], text_mask [b l]). emb is the sum of the
    embeddings of the noise level, of the pooled text and, with `lowres`, of the low-res image's
    noise level (section 2.4). text is the token features projected to `cond_dim`. In a model
    without text (`cond_dim` 0) text and text_mask are None.

    With several text encoders (eDiff-I: Balaji et al. 2022), each has a projection of its own.
    Their projected tokens are concatenated, and the projected pooled vectors are added to emb.
    """

    sinusoid_features: int
    features: int
    cond_dim: int
    pooling: str
    pool_heads: int
    lowres: bool
    encoders: tuple[str, ...]
    pooled: tuple[str, ...]
    dtype: Dtype
    constrain: Constrain = identity

    @nn.compact
    def __call__(
        self, logsnr: Float[Array, "b"], cond: Cond
    ) -> tuple[Float[Array, "b e"], Float[Array, "b l d"] | None, Bool[Array, "b l"] | None]:
        embedding = lambda name: NoiseLevelEmbedding(
            self.sinusoid_features, self.features, self.dtype, name=name
        )
        emb = embedding("time")(logsnr)
        if self.lowres:
            emb = emb + embedding("lowres_noise")(cond["lowres_logsnr"])
        if not self.cond_dim:
            return self.constrain(emb), None, None
        mask = _joined([cond[field_name(MASK, name)] for name in self.encoders])
        text, pooled = from_text(self, "text", lambda: self._text(cond, mask))
        return self.constrain(emb + pooled), text, mask

    def _text(
        self, cond: Cond, mask: Bool[Array, "b l"]
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b e"]]:
        """The projected tokens of all encoders, and the pooled text."""
        text = _joined([self._projected(cond, TEXT, name, self.cond_dim) for name in self.encoders])
        pool = TextPool(self.pooling, self.pool_heads, self.features, self.dtype, name="text_pool")
        pooled = pool(text, mask)
        for name in self.pooled:
            pooled = pooled + self._projected(cond, POOLED, name, self.features)
        return text, pooled

    def _projected(
        self, cond: Cond, kind: str, name: str, width: int
    ) -> Float[Array, "b _ d"] | Float[Array, "b d"]:
        """LayerNorm and projection of one field of the text."""
        suffix = f"_{name}" if name else ""
        norm = nn.LayerNorm(dtype=self.dtype, name=f"{kind}_norm{suffix}")
        project = nn.Dense(width, dtype=self.dtype, name=f"{kind}_proj{suffix}")
        return self.constrain(project(norm(cond[field_name(kind, name)])))


def _joined(parts: Sequence[Shaped[Array, "b ..."]]) -> Shaped[Array, "b l ..."]:
    """The tokens of several encoders, one after the other."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def fields_of(network: nn.Module, *names: str) -> dict[str, Any]:
    """The named fields of a network, to build a module that has fields of the same names."""
    return {name: getattr(network, name) for name in names}


def level_fields(network: nn.Module, *own: str) -> dict[str, Any]:
    """The fields that a network's levels take from it: `LEVEL_FIELDS` and `own`."""
    return fields_of(network, *LEVEL_FIELDS, *own)


def conditioning(network: nn.Module, width: int) -> Conditioning:
    """The `Conditioning` of a network whose first level has `width` channels; emb has 4 * width.

    Call it inside the network's `__call__`.
    """
    text = ("cond_dim", "pooling", "pool_heads", "encoders", "pooled")
    shared = fields_of(network, *text, "lowres", "dtype", "constrain")
    return Conditioning(width, 4 * width, **shared, name="conditioning")


def concat_lowres(
    z: Float[Array, "b h w 3"], lowres: Float[Array, "b h2 w2 3"]
) -> Float[Array, "b h w 6"]:
    """Concatenates the noised low-res image to z as three more channels.

    It is up-sampled bilinearly to the size of z (section 2.4; Ho et al. 2022, CDM).
    """
    b, height, width, _ = z.shape
    up = jax.image.resize(lowres, (b, height, width, lowres.shape[-1]), method="bilinear")
    return jnp.concatenate([z, up.astype(z.dtype)], axis=-1)
