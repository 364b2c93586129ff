"""Resampling of feature maps: average pooling, nearest up-sampling, pixels folded into channels."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def average_pool(h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """2x2 average pooling of stride 2, [b h w c] -> [b h/2 w/2 c]."""
    return nn.avg_pool(h, (2, 2), strides=(2, 2))


def upsample_nearest(h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Nearest-neighbour up-sampling, [b h w c] -> [b 2h 2w c]."""
    b, height, width, c = h.shape
    h = jnp.broadcast_to(h[:, :, None, :, None], (b, height, 2, width, 2, c))
    return h.reshape(b, 2 * height, 2 * width, c)


def space_to_depth(h: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 c2"]:
    """Folds each square of patch x patch pixels into channels, [b h w c] -> [b h/p w/p p^2 c]."""
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
