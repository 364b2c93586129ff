"""Batch norm with stored statistics."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

EPSILON = 1e-3  # of TensorFlow, which trained all networks here that have batch norm


class BatchNorm(nn.Module):
    """Normalises each channel by the mean and variance of the training, which are parameters."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        shape = (x.shape[-1],)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        factor = scale * jax.lax.rsqrt(var + EPSILON)
        return (x - mean[None, None, None]) * factor[None, None, None] + bias[None, None, None]
