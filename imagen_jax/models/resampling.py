"""Resampling of feature maps: pooling, nearest up-sampling, and pixels folded into channels."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def average_pool(h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """2x2 average pooling, stride 2."""
    return nn.avg_pool(h, (2, 2), strides=(2, 2))


def upsample_nearest(h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Each pixel twice in both directions."""
    b, height, width, c = h.shape
    h = jnp.broadcast_to(h[:, :, None, :, None], (b, height, 2, width, 2, c))
    return h.reshape(b, 2 * height, 2 * width, c)


def space_to_depth(h: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 c2"]:
    """Each patch x patch square of pixels becomes one position with patch^2 times the channels."""
    b, height, width, c = h.shape
    h = h.reshape(b, height // patch, patch, width // patch, patch, c)
    return h.transpose(0, 1, 3, 2, 4, 5).reshape(
        b, height // patch, width // patch, patch * patch * c
    )


def depth_to_space(h: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 c2"]:
    """Inverse of `space_to_depth`."""
    b, height, width, c = h.shape
    h = h.reshape(b, height, width, patch, patch, c // patch**2)
    return h.transpose(0, 1, 3, 2, 4, 5).reshape(b, height * patch, width * patch, c // patch**2)
