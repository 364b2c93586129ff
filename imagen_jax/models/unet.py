"""The base U-Net (F.1): the U-Net of Dhariwal & Nichol 2021 with text attention; also an ordinary
super-resolution U-Net.

Down: per level `blocks` residual blocks, each followed by attention where the level has it, then a
residual block that halves the size. Middle: block, attention, block. Up: per level one block more
than down, each on the concatenation with a skip. Names as in profiles and checkpoints:
`down_2/block_0`, `down_2/attn_0`, `down_2/resample`, `mid/block_0`, `up_2/block_3`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from imagen_jax.models.attention import Attend, Attention, attend
from imagen_jax.models.blocks import Conditioning, ResBlock, concat_lowres
from imagen_jax.models.layers import Constrain, Conv, Dtype, group_norm, identity
from imagen_jax.models.remat import check_kind, checkpointed_module
from imagen_jax.models.resampling import depth_to_space, space_to_depth, upsample_nearest

# Which attention a level has, by (pixels, text): F.1 `attn_resolutions` and `text_cross_attn_res`.
ATTENTION = {
    (True, True): "fused",
    (True, False): "self",
    (False, True): "cross",
    (False, False): "none",
}
RES_BLOCKS = ("biggan", "plain")

Text = Float[Array, "b l e"] | None
Mask = Bool[Array, "b l"] | None


class Level(nn.Module):
    """The blocks of one resolution on the way down, in the middle or up, one for each entry of
    `attention`, then resampling.

    With `skips` (up) each block eats one from the end. Returns the feature map and all intermediate
    ones, which are the skips of the way down.
    """

    features: int
    attention: tuple[str, ...]
    resample: str
    res_block: str
    scale_shift: bool
    head_channels: int
    dropout: float
    dtype: Dtype
    remat: str
    constrain: Constrain
    attend: Attend

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "b h w c"],
        skips: tuple[Array, ...],
        emb: Float[Array, "b t"],
        text: Text,
        mask: Mask,
        train: bool,
    ) -> tuple[Array, tuple[Array, ...]]:
        block = partial(
            checkpointed_module(self.remat, ResBlock, static_argnums=(3,)),
            self.features,
            self.dtype,
            self.scale_shift,
            dropout=self.dropout,
            constrain=self.constrain,
        )
        attention = checkpointed_module(self.remat, Attention, keeps_itself=True)
        outputs = []
        for i, kind in enumerate(self.attention):
            if skips:
                h, skips = jnp.concatenate([h, skips[-1]], axis=-1), skips[:-1]
            h = block(name=f"block_{i}")(h, emb, train)
            if kind != "none":
                h = attention(
                    self.features // self.head_channels,
                    kind,
                    self.dtype,
                    self.attend,
                    self.constrain,
                    name=f"attn_{i}",
                )(h, text, mask)
            h = self.constrain(h)
            outputs.append(h)
        if self.resample != "none":
            if self.res_block == "biggan":
                h = block(resample=self.resample, name="resample")(h, emb, train)
            elif self.resample == "down":
                h = Conv(self.features, self.dtype, stride=2, name="resample")(h)
            else:
                h = Conv(self.features, self.dtype, name="resample")(upsample_nearest(h))
            h = self.constrain(h)
            outputs.append(h)
        return h, tuple(outputs)


class UNet(nn.Module):
    """eps (or x, v) from (z, logsnr, cond). `widths[i]` = channels * multiplier at resolution size
    / (patch 2^i).

    `attention[i]`, `text_attention[i]`: whether the pixels of level i attend to one another, to the
    text. `res_block` "biggan" resamples inside a residual block, "plain" by a convolution. `patch`
    > 1 folds patches into channels first (small demo models only, the paper has 1).
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    text_attention: tuple[bool, ...]
    head_channels: int
    cond_dim: int
    pooling: str
    pool_heads: int
    res_block: str
    scale_shift: bool
    patch: int
    lowres: bool
    dropout: float
    dtype: Dtype = jnp.float32
    remat: str = "none"
    constrain: Constrain = identity
    attend: Attend = attend

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b h w 3"],
        logsnr: Float[Array, "b"],
        cond: dict[str, Array],
        train: bool = False,
    ) -> Float[Array, "b h w 3"]:
        self._check(z)
        emb, text, mask = Conditioning(
            self.channels,
            4 * self.channels,
            self.cond_dim,
            self.pooling,
            self.pool_heads,
            self.lowres,
            self.dtype,
            self.constrain,
            name="conditioning",
        )(logsnr, cond)
        h = concat_lowres(z, cond["lowres"]) if self.lowres else z
        h = Conv(self.channels, self.dtype, name="stem")(
            space_to_depth(h.astype(self.dtype), self.patch)
        )
        h = self.constrain(h)
        widths = [self.channels * m for m in self.multipliers]
        last = len(widths) - 1
        level = partial(
            Level,
            res_block=self.res_block,
            scale_shift=self.scale_shift,
            head_channels=self.head_channels,
            dropout=self.dropout,
            dtype=self.dtype,
            remat=self.remat,
            constrain=self.constrain,
            attend=self.attend,
        )
        kinds = [ATTENTION[pair] for pair in zip(self.attention, self.text_attention)]
        skips = [h]
        for i, width in enumerate(widths):
            down = level(
                width,
                (kinds[i],) * self.blocks,
                resample="down" if i < last else "none",
                name=f"down_{i}",
            )
            h, outputs = down(h, (), emb, text, mask, train)
            skips += outputs
        h, _ = level(widths[-1], (kinds[-1], "none"), resample="none", name="mid")(
            h, (), emb, text, mask, train
        )
        for i, width in reversed(list(enumerate(widths))):
            n = self.blocks + 1
            up = level(width, (kinds[i],) * n, resample="up" if i else "none", name=f"up_{i}")
            h, _ = up(h, tuple(skips[-n:]), emb, text, mask, train)
            skips = skips[:-n]
        h = jax.nn.swish(group_norm(h.shape[-1], self.dtype, "out_norm")(h))
        h = Conv(3 * self.patch**2, jnp.float32, zero_init=True, name="out")(h.astype(jnp.float32))
        return depth_to_space(h, self.patch)

    def _check(self, z: Array) -> None:
        levels = {
            "multipliers": self.multipliers,
            "attention": self.attention,
            "text_attention": self.text_attention,
        }
        if len({len(entries) for entries in levels.values()}) > 1:
            raise ValueError(
                "model fields need one entry a level each, not"
                f" { ({name: len(e) for name, e in levels.items()}) }"
            )
        if any(self.text_attention) and not self.cond_dim:
            raise ValueError("model.text_attention needs text: set model.cond_dim and text.dim")
        check_kind(self.remat)
        if self.res_block not in RES_BLOCKS:
            raise ValueError(
                f"model.res_block is {self.res_block!r}; it must be one of {RES_BLOCKS}"
            )
        factor = self.patch * 2 ** (len(self.multipliers) - 1)
        if z.shape[1] % factor or z.shape[2] % factor:
            raise ValueError(
                f"a U-Net of {len(self.multipliers)} levels and patch {self.patch} takes sizes"
                f" divisible by {factor}, not {z.shape[1:3]}"
            )
