"""The residual block, the conditioning that enters every block, and nothing else: levels are made
of these in unet.py and efficient_unet.py.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from imagen_jax.models.attention import TextPool
from imagen_jax.models.layers import (
    Constrain,
    Conv,
    Dtype,
    NoiseLevelEmbedding,
    dense,
    group_norm,
    identity,
)
from imagen_jax.models.resampling import average_pool, upsample_nearest

RESAMPLE = {"down": average_pool, "up": upsample_nearest}


class ResBlock(nn.Module):
    """GroupNorm, swish, [resample], conv, GroupNorm * (1 + scale) + shift, swish, dropout, conv,
    plus the shortcut, times `residual_scale`.

    scale and shift come from the embedding (`scale_shift`, F.1 `use_scale_shift_norm`); without, it
    is added before the second norm. Resampling is inside the block ("biggan" type, F.1). The
    shortcut is a 1x1 convolution where the width changes, or always (`project_shortcut`, Fig.
    A.27).
    """

    features: int
    dtype: Dtype
    scale_shift: bool
    resample: str = "none"
    project_shortcut: bool = False
    residual_scale: float = 1.0
    dropout: float = 0.0
    constrain: Constrain = identity

    @nn.compact
    def __call__(
        self, h: Float[Array, "b h w c"], emb: Float[Array, "b t"], train: bool
    ) -> Float[Array, "b h2 w2 c2"]:
        resample = lambda h: (
            h if self.resample == "none" else self.constrain(RESAMPLE[self.resample](h))
        )
        shortcut = resample(h)
        out = jax.nn.swish(group_norm(h.shape[-1], self.dtype, "norm_0")(h))
        out = self.constrain(Conv(self.features, self.dtype, name="conv_0")(resample(out)))
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
        out = self.constrain(Conv(self.features, self.dtype, zero_init=True, name="conv_1")(out))
        if self.project_shortcut or shortcut.shape[-1] != self.features:
            shortcut = dense(self.features, self.dtype, "shortcut")(shortcut)
        return (shortcut + out) * jnp.asarray(self.residual_scale, out.dtype)


class Conditioning(nn.Module):
    """What every block is told: the embedding [b t] of noise levels and pooled text, and the
    projected text tokens [b l cond_dim].

    Without text (`cond_dim` 0) the tokens are None. The low-res noise level has its own embedding,
    added to the time's (section 2.4).
    """

    sinusoid_features: int
    features: int
    cond_dim: int
    pooling: str
    pool_heads: int
    lowres: bool
    dtype: Dtype
    constrain: Constrain = identity

    @nn.compact
    def __call__(
        self, logsnr: Float[Array, "b"], cond: dict[str, Array]
    ) -> tuple[Float[Array, "b t"], Float[Array, "b l e"] | None, Bool[Array, "b l"] | None]:
        level = lambda name: NoiseLevelEmbedding(
            self.sinusoid_features, self.features, self.dtype, name=name
        )
        emb = level("time")(logsnr)
        if self.lowres:
            emb = emb + level("lowres_noise")(cond["lowres_logsnr"])
        if not self.cond_dim:
            return self.constrain(emb), None, None
        text = nn.LayerNorm(dtype=self.dtype, name="text_norm")(cond["text"])
        text = self.constrain(nn.Dense(self.cond_dim, dtype=self.dtype, name="text_proj")(text))
        pooled = TextPool(
            self.pooling, self.pool_heads, self.features, self.dtype, name="text_pool"
        )(text, cond["text_mask"])
        return self.constrain(emb + pooled), text, cond["text_mask"]


def concat_lowres(
    z: Float[Array, "b h w 3"], lowres: Float[Array, "b h2 w2 3"]
) -> Float[Array, "b h w 6"]:
    """The noised low-res image, up-sampled bilinearly to z's size, as three more input channels
    (section 2.4; CDM).
    """
    b, height, width, _ = z.shape
    up = jax.image.resize(lowres, (b, height, width, lowres.shape[-1]), method="bilinear")
    return jnp.concatenate([z, up.astype(z.dtype)], axis=-1)
