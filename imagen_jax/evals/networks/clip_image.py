"""The image tower of CLIP (Radford et al. 2021, section 2.4): a ViT, projected class token.

The text tower, whose blocks are the same, is `imagen_jax/text/clip.py`. Features are not normed to
unit length.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.text.clip import EPSILON, Block, layer_norm


@dataclasses.dataclass(frozen=True)
class CLIPImageConfig:
    """Sizes of an image tower.

    size, patch: pixels along an image and a patch.
    width, layers, heads: of the transformer.
    dim: features after the projection.
    """

    size: int
    patch: int
    width: int
    layers: int
    heads: int
    dim: int


class CLIPImage(nn.Module):
    """Prepared images to features in the space of the captions."""

    config: CLIPImageConfig

    @nn.compact
    def __call__(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
        c = self.config
        init = nn.initializers.normal(0.02)
        patches = nn.Conv(
            c.width,
            (c.patch, c.patch),
            strides=c.patch,
            padding="VALID",
            use_bias=False,
            name="patch_embedding",
        )(images)
        x = patches.reshape(patches.shape[0], -1, c.width)
        first = self.param("class_embedding", init, (c.width,))
        first = jnp.broadcast_to(first[None, None], (x.shape[0], 1, c.width))
        x = jnp.concatenate([first, x], axis=1)
        position = self.param("position_embedding", init, ((c.size // c.patch) ** 2 + 1, c.width))
        x = layer_norm("pre_norm", EPSILON, jnp.float32)(x + position[None])
        for i in range(c.layers):
            x = Block(c.heads, name=f"block_{i}")(x)
        x = layer_norm("post_norm", EPSILON, jnp.float32)(x[:, 0])
        return nn.Dense(c.dim, use_bias=False, name="projection")(x)
