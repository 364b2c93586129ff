"""Small parts shared by the networks: normalisation, convolutions, dense layers, and the embeddings
of noise levels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from imagen_jax.models.custom_gradients import add_bias, conv_adjoint, conv_phases

Dtype = Any
Constrain = Callable[[Array], Array]


def identity(tree: Any) -> Any:
    """The `constrain` of a model on one device: leaves the layout to the compiler."""
    return tree


def group_norm(features: int, dtype: Dtype, name: str) -> nn.GroupNorm:
    """GroupNorm with statistics in fp32: 32 groups, or the largest number below that divides the
    width and leaves a group 4 channels.
    """
    groups = max(g for g in range(1, 33) if features % g == 0 and (features // g >= 4 or g == 1))
    return nn.GroupNorm(num_groups=groups, epsilon=1e-5, dtype=dtype, name=name)


class Conv(nn.Module):
    """3x3 convolution, one pixel of zeros on each side; `zero_init` makes its branch start as
    nothing.
    """

    features: int
    dtype: Dtype
    stride: int = 1
    zero_init: bool = False

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (3, 3, h.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        strides, padding = (self.stride, self.stride), ((1, 1), (1, 1))
        numbers = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(
            h.astype(self.dtype),
            kernel.astype(self.dtype),
            strides,
            padding,
            dimension_numbers=numbers,
        )
        return add_bias(out, jnp.asarray(bias))


class Projections(nn.Module):
    """Dense layers of one input, their kernels and biases side by side in one parameter each.

    The parameter is cut, not the result: cutting activations costs a pass over them, and over their
    gradients.
    """

    parts: int
    features: int
    dtype: Dtype
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*d e"]) -> list[Float[Array, "*d c"]]:
        init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[-1], self.parts * self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.parts * self.features,))
        kernels, biases = (
            jnp.split(a, self.parts, axis=-1) for a in (kernel.astype(self.dtype), bias)
        )
        product = lambda w: jax.lax.dot_general(
            x.astype(self.dtype), w, (((x.ndim - 1,), (0,)), ((), ()))
        )
        return [add_bias(product(w), b) for w, b in zip(kernels, biases)]


def dense(
    features: int, dtype: Dtype, name: str, zero_init: bool = False
) -> Callable[[Array], Array]:
    """One dense layer, [*d e] -> [*d features]; `nn.Dense` but for how the bias is added."""
    layer = Projections(1, features, dtype, zero_init, name=name)
    return lambda x: layer(x)[0]


class ConvTranspose(nn.Module):
    """3x3 convolution of stride 1/2, [b h w c] -> [b 2h 2w features]: the adjoint of the strided
    `Conv`, up to its weights.

    The output phases use 1, 2, 2 and 4 of the nine weights, so the initialiser's fan-in is 9/4 of
    the channels.
    """

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        kernel = self.param(
            "kernel",
            nn.initializers.variance_scaling(4.0, "fan_in", "truncated_normal"),
            (3, 3, h.shape[-1], self.features),
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        out = jax.lax.platform_dependent(
            h.astype(self.dtype), kernel.astype(self.dtype), tpu=conv_adjoint, default=conv_phases
        )
        return add_bias(out, jnp.asarray(bias))


def sinusoid(logsnr: Float[Array, "b"], features: int) -> Float[Array, "b e"]:
    """Sinusoids of u = atan(exp(-lambda/2)) / (pi/2), which runs from 0 (clean) to 1 (noise), times
    1000; periods up to 2 pi 10^4.

    u is the time of the cosine schedule whatever schedule is used: the embedding of Salimans & Ho
    2022.
    """
    u = jnp.arctan(jnp.exp(-0.5 * logsnr.astype(jnp.float32))) / (0.5 * jnp.pi)
    frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(features // 2) / (features // 2))
    angle = 1000.0 * u[:, None] * frequency[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class NoiseLevelEmbedding(nn.Module):
    """A log-SNR as a vector: sinusoid, Dense, swish, Dense. One for the time, one for the low-res
    image's noise.
    """

    sinusoid_features: int
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, logsnr: Float[Array, "b"]) -> Float[Array, "b e"]:
        h = nn.Dense(self.features, dtype=self.dtype, name="dense_0")(
            sinusoid(logsnr, self.sinusoid_features)
        )
        return nn.Dense(self.features, dtype=self.dtype, name="dense_1")(jax.nn.swish(h))
