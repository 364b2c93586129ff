"""Layers shared by the networks: normalisation, convolutions, dense layers, noise embeddings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from imagen_jax.models.custom_gradients import add_bias, conv_adjoint, conv_phases

Dtype = Any
TEXT = "text"  # the Flax collection of `from_text`
Constrain = Callable[[Float[Array, "b ..."]], Float[Array, "b ..."]]
Gather = Callable[[Float[Array, "3 3 _ _"]], Float[Array, "3 3 _ _"]]


def identity(tree: Any) -> Any:
    """The `constrain` and `gather` of a model on one device: leave the layout to the compiler."""
    return tree


def group_norm(features: int, dtype: Dtype, name: str) -> nn.GroupNorm:
    """GroupNorm with fp32 statistics.

    The number of groups is the largest one up to 32 that divides `features` and leaves at least 4
    channels per group.
    """
    groups = max(g for g in range(1, 33) if features % g == 0 and (features // g >= 4 or g == 1))
    return nn.GroupNorm(num_groups=groups, epsilon=1e-5, dtype=dtype, name=name)


def from_text(module: nn.Module, name: str, compute: Callable[[], Any]) -> Any:
    """What `module` computes from the text alone, or the value given in the collection TEXT.

    A sampler evaluates a network many times with one text. It asks for these values once, by a call
    in which TEXT is mutable, and gives them to all other calls.
    """
    if module.has_variable(TEXT, name):
        return module.get_variable(TEXT, name)
    value = compute()
    if module.is_mutable_collection(TEXT) and not module.is_initializing():
        module.put_variable(TEXT, name, value)
    return value


class Conv(nn.Module):
    """3x3 convolution, zero-padded by one pixel.

    zero_init: initialises the kernel to zero. gather: applied to the kernel in `dtype` before its
    use.
    """

    features: int
    dtype: Dtype
    stride: int = 1
    zero_init: bool = False
    gather: Gather = identity

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (3, 3, h.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        strides, padding = (self.stride, self.stride), ((1, 1), (1, 1))
        numbers = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(
            h.astype(self.dtype),
            self.gather(kernel.astype(self.dtype)),
            strides,
            padding,
            dimension_numbers=numbers,
        )
        return add_bias(out, jnp.asarray(bias))


class Projections(nn.Module):
    """Several dense layers of one input, [*d e] -> `parts` arrays [*d features].

    Kernels and biases are stored side by side, as one parameter each. The parameters are split, not
    the result: splitting activations costs a pass over them and another over their gradients.
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
) -> Callable[[Float[Array, "*d e"]], Float[Array, "*d c"]]:
    """One dense layer, [*d e] -> [*d features]: `nn.Dense` with the bias added by `add_bias`."""
    layer = Projections(1, features, dtype, zero_init, name=name)
    return lambda x: layer(x)[0]


class ConvTranspose(nn.Module):
    """Transposed 3x3 convolution of stride 1/2, [b h w c] -> [b 2h 2w features].

    It is the adjoint of `Conv` with stride 2. Output pixels use 1, 2, 2 or 4 of the nine weights,
    so the initialiser's fan-in is 9/4 of the channels. gather: see `Conv`.
    """

    features: int
    dtype: Dtype
    gather: Gather = identity

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        kernel = self.param(
            "kernel",
            nn.initializers.variance_scaling(4.0, "fan_in", "truncated_normal"),
            (3, 3, h.shape[-1], self.features),
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = self.gather(kernel.astype(self.dtype))
        out = jax.lax.platform_dependent(
            h.astype(self.dtype), kernel, tpu=conv_adjoint, default=conv_phases
        )
        return add_bias(out, jnp.asarray(bias))


def sinusoid(logsnr: Float[Array, "b"], features: int) -> Float[Array, "b e"]:
    """Sinusoidal embedding of a log-SNR, [b] -> [b features].

        u = atan(exp(-logsnr / 2)) / (pi / 2)

    u is 0 for a clean image and 1 for noise; it is the time of the cosine schedule, whatever
    schedule the stage uses (Salimans & Ho 2022). The sinusoids are of 1000 u and have periods up to
    2 pi 10^4.
    """
    u = jnp.arctan(jnp.exp(-0.5 * logsnr.astype(jnp.float32))) / (0.5 * jnp.pi)
    frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(features // 2) / (features // 2))
    angle = 1000.0 * u[:, None] * frequency[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class NoiseLevelEmbedding(nn.Module):
    """A log-SNR [b] as a vector [b features]: sinusoid, Dense, swish, Dense.

    Separate instances embed the noise of z and that of the low-res image.
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
