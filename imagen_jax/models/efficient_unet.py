"""The Efficient U-Net of the super-resolution stages.

Source: appendix B.1, Figs. A.27-A.30; configurations F.2 and F.3.

Differences from the ordinary U-Net: most residual blocks work at low resolution; a level
down-samples before its blocks and up-samples after them; residual sums are scaled by 1/sqrt(2)
(`residual_scale`); skips are added, not concatenated. There are four levels, each of stride 2 (F.2
prints four).
"""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from imagen_jax.models.attention import Attend, Attention, FeedForward, attend
from imagen_jax.models.blocks import Cond, ResBlock, concat_lowres, conditioning, level_fields
from imagen_jax.models.layers import Constrain, Conv, ConvTranspose, Dtype, Gather, identity
from imagen_jax.models.remat import checkpointed_module
from imagen_jax.text_inputs import UNNAMED


class Blocks(nn.Module):
    """The body of a DBlock or UBlock: residual blocks, then attention and an MLP of width 2c.

    Levels with `attention` "none" have neither attention nor MLP. A DBlock (`down`) starts with a
    strided convolution. A UBlock ends with a transposed 3x3 convolution to `up_features` channels,
    the width of the level above. (After nearest up-sampling, a plain convolution would give
    neighbouring pixels almost the same weights.)
    """

    features: int
    blocks: int
    attention: str
    heads: int
    down: bool
    up_features: int
    residual_scale: float
    scale_shift: bool
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
        emb: Float[Array, "b e"],
        text: Float[Array, "b l d"] | None,
        mask: Bool[Array, "b l"] | None,
        train: bool,
    ) -> Float[Array, "b h2 w2 c2"]:
        if self.down:
            down = Conv(self.features, self.dtype, stride=2, gather=self.gather, name="resample")
            h = self.constrain(down(h))
        for i in range(self.blocks):
            block = checkpointed_module(self.remat, ResBlock, static_argnums=(3,))(
                self.features,
                self.dtype,
                self.scale_shift,
                project_shortcut=True,
                residual_scale=self.residual_scale,
                dropout=self.dropout,
                constrain=self.constrain,
                gather=self.gather,
                name=f"block_{i}",
            )
            h = self.constrain(block(h, emb, train))
        if self.attention != "none":
            attention, mlp = (
                checkpointed_module(self.remat, module, skip_matrix=True)
                for module in (Attention, FeedForward)
            )
            h = attention(
                self.heads, self.attention, self.dtype, self.attend, self.constrain, name="attn"
            )(h, text, mask)
            h = self.constrain(mlp(2 * self.features, self.dtype, self.constrain, name="mlp")(h))
        if self.up_features:
            up = ConvTranspose(self.up_features, self.dtype, self.gather, name="upsample")
            h = self.constrain(up(h))
        return h


class EfficientUNet(nn.Module):
    """The network output (eps, x, v or u) [b h w 3] from (z, logsnr, cond).

    With `lowres`, cond holds "lowres" [b h' w' 3] and "lowres_logsnr" [b]. The conditioning
    embedding has 4 * widths[0] features.

    Fields:
        widths: channels of each level.
        blocks: residual blocks of each level.
        attention: per level "none", "fused", "self" or "cross" (text only; the 1024 stage, which
            trains on crops and samples full images, has no self-attention).
        heads: number of attention heads.
        cond_dim: width of the projected text features; 0 for a model without text.
        pooling, pool_heads: see `TextPool`.
        residual_scale: factor applied to every sum of shortcut and residual.
        scale_shift: see `ResBlock`.
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

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    attention: tuple[str, ...]
    heads: int
    cond_dim: int
    pooling: str
    pool_heads: int
    residual_scale: float
    scale_shift: bool
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
        return 2 ** len(self.widths)

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b h w 3"],
        logsnr: Float[Array, "b"],
        cond: Cond,
        train: bool = False,
    ) -> Float[Array, "b h w 3"]:
        self._check_settings(z)
        emb, text, mask = conditioning(self, self.widths[0])(logsnr, cond)
        h = concat_lowres(z, cond["lowres"]) if self.lowres else z
        stem = Conv(self.widths[0], self.dtype, gather=self.gather, name="stem")
        h = self.constrain(stem(h.astype(self.dtype)))
        level = partial(Blocks, **level_fields(self, "heads", "residual_scale"))
        per_level = list(zip(self.widths, self.blocks, self.attention))
        skips = []
        for i, (width, blocks, attention) in enumerate(per_level):
            h = level(width, blocks, attention, down=True, up_features=0, name=f"down_{i}")(
                h, emb, text, mask, train
            )
            skips.append(h)
        # The lowest UBlock takes the lowest DBlock's output as input, so that one is no skip.
        skips.pop()
        for i, (width, blocks, attention) in reversed(list(enumerate(per_level))):
            up_features = self.widths[max(i - 1, 0)]
            h = level(
                width, blocks, attention, down=False, up_features=up_features, name=f"up_{i}"
            )(h, emb, text, mask, train)
            h = h + skips.pop() if skips else h
        return nn.Dense(3, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name="out")(
            h.astype(jnp.float32)
        )

    def _check_settings(self, z: Float[Array, "b h w 3"]) -> None:
        if not len(self.widths) == len(self.blocks) == len(self.attention):
            raise ValueError(
                f"model.widths, model.blocks and model.attention have {len(self.widths)},"
                f" {len(self.blocks)} and {len(self.attention)} entries; give one entry per level"
                " in each"
            )
        if z.shape[1] % self.factor or z.shape[2] % self.factor:
            raise ValueError(
                f"an Efficient U-Net of {len(self.widths)} levels needs image sizes divisible by"
                f" {self.factor}, not {z.shape[1:3]}"
            )
