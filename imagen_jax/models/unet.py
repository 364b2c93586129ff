"""The base U-Net: the U-Net of Dhariwal & Nichol 2021 with text attention (F.1).

With `lowres` it is a super-resolution U-Net.

Down path: each level has `blocks` residual blocks, each followed by attention if the level has it,
then a residual block that halves the size. Middle: block, attention, block. Up path: each level has
one block more than on the down path; the input of each block is concatenated with a skip.

Module names in profiles and checkpoints: `down_2/block_0`, `down_2/attn_0`, `down_2/resample`,
`mid/block_0`, `up_2/block_3`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from imagen_jax.models.attention import Attend, Attention, attend
from imagen_jax.models.blocks import Cond, ResBlock, concat_lowres, conditioning, level_fields
from imagen_jax.models.layers import Constrain, Conv, Dtype, Gather, group_norm, identity
from imagen_jax.models.remat import checkpointed_module
from imagen_jax.models.resampling import depth_to_space, space_to_depth, upsample_nearest
from imagen_jax.text_inputs import UNNAMED

# {(self-attention, text attention): attention kind of a level}. F.1 gives the resolutions with each
# as `attn_resolutions` and `text_cross_attn_res`.
ATTENTION = {
    (True, True): "fused",
    (True, False): "self",
    (False, True): "cross",
    (False, False): "none",
}
# {res_block: whether resampling is inside a residual block}
RES_BLOCKS = {"biggan": True, "plain": False}

Text = Float[Array, "b l d"] | None
Mask = Bool[Array, "b l"] | None


class Level(nn.Module):
    """All blocks at one resolution: on the down path, in the middle or on the up path.

    There is one residual block per entry of `attention`, then resampling. On the up path each block
    takes the last unused entry of `skips`. Returns (feature map, outputs of all blocks and of the
    resampling). The outputs of the down path are the skips.
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
    gather: Gather
    attend: Attend

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "b h w c"],
        skips: tuple[Float[Array, "b h w _"], ...],
        emb: Float[Array, "b e"],
        text: Text,
        mask: Mask,
        train: bool,
    ) -> tuple[Float[Array, "b _ _ _"], tuple[Float[Array, "b _ _ _"], ...]]:
        block = partial(
            checkpointed_module(self.remat, ResBlock, static_argnums=(3,)),
            self.features,
            self.dtype,
            self.scale_shift,
            dropout=self.dropout,
            constrain=self.constrain,
            gather=self.gather,
        )
        conv = partial(Conv, self.features, self.dtype, gather=self.gather, name="resample")
        attention = checkpointed_module(self.remat, Attention, skip_matrix=True)
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
            if RES_BLOCKS[self.res_block]:
                h = block(resample=self.resample, name="resample")(h, emb, train)
            elif self.resample == "down":
                h = conv(stride=2)(h)
            else:
                h = conv()(upsample_nearest(h))
            h = self.constrain(h)
            outputs.append(h)
        return h, tuple(outputs)


class UNet(nn.Module):
    """The network output (eps, x, v or u) [b h w 3] from (z, logsnr, cond).

    Level i has channels * multipliers[i] channels at resolution image size / (patch * 2^i).

    Fields:
        channels: width of the first convolution; the conditioning embedding has 4 * channels.
        multipliers: width of each level as a multiple of `channels`.
        blocks: residual blocks per level on the down path.
        attention: whether each level has self-attention.
        text_attention: whether each level has cross-attention to the text tokens.
        head_channels: channels of each attention head.
        cond_dim: width of the projected text features; 0 for a model without text.
        pooling, pool_heads: see `TextPool`.
        res_block: "biggan" resamples inside a residual block, "plain" by a convolution.
        scale_shift: see `ResBlock`.
        patch: side of the patches that are folded into channels at the input; 1 in the paper.
        lowres: whether z is concatenated with a low-res image.
        dropout: dropout rate inside residual blocks.
        dtype: type of the computation; parameters are fp32.
        remat: rematerialization mode, see models/remat.py.
        constrain: sharding constraint on the activations at block boundaries.
        gather: applied to the kernel of every 3x3 convolution before its use.
        attend: the implementation of attention.
        encoders: names of the text encoders whose token features it reads.
        pooled: names of those whose pooled vectors it reads too.
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
    gather: Gather = identity
    attend: Attend = attend
    encoders: tuple[str, ...] = (UNNAMED,)
    pooled: tuple[str, ...] = ()

    @property
    def factor(self) -> int:
        """The sides of images must be multiples of it."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b h w 3"],
        logsnr: Float[Array, "b"],
        cond: Cond,
        train: bool = False,
    ) -> Float[Array, "b h w 3"]:
        self._check_settings(z)
        emb, text, mask = conditioning(self, self.channels)(logsnr, cond)
        h = concat_lowres(z, cond["lowres"]) if self.lowres else z
        stem = Conv(self.channels, self.dtype, gather=self.gather, name="stem")
        h = self.constrain(stem(space_to_depth(h.astype(self.dtype), self.patch)))
        widths = [self.channels * m for m in self.multipliers]
        last = len(widths) - 1
        level = partial(Level, **level_fields(self, "res_block", "head_channels"))
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
            block_count = self.blocks + 1
            up = level(
                width,
                (kinds[i],) * block_count,
                resample="up" if i else "none",
                name=f"up_{i}",
            )
            h, _ = up(h, tuple(skips[-block_count:]), emb, text, mask, train)
            skips = skips[:-block_count]
        h = jax.nn.swish(group_norm(h.shape[-1], self.dtype, "out_norm")(h))
        out = Conv(3 * self.patch**2, jnp.float32, zero_init=True, gather=self.gather, name="out")
        h = out(h.astype(jnp.float32))
        return depth_to_space(h, self.patch)

    def _check_settings(self, z: Float[Array, "b h w 3"]) -> None:
        levels = {
            "multipliers": self.multipliers,
            "attention": self.attention,
            "text_attention": self.text_attention,
        }
        if len({len(entries) for entries in levels.values()}) > 1:
            raise ValueError(
                "model.multipliers, model.attention and model.text_attention must have one entry"
                f" per level; their lengths are { ({name: len(e) for name, e in levels.items()}) }"
            )
        if any(self.text_attention) and not self.cond_dim:
            raise ValueError("model.text_attention needs text; set model.cond_dim and text.dim")
        if z.shape[1] % self.factor or z.shape[2] % self.factor:
            raise ValueError(
                f"a U-Net of {len(self.multipliers)} levels and patch {self.patch} needs image"
                f" sizes divisible by {self.factor}, not {z.shape[1:3]}"
            )
