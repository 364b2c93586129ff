"""Small parts shared by the networks: normalisation, resampling, and the embeddings that condition every block."""

from typing import Any, Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

Dtype = Any
Constrain = Callable[[Array], Array]


def identity(tree: Any) -> Any:
    """The `constrain` of a model on one device: leaves the layout to the compiler."""
    return tree


def group_norm(features: int, dtype: Dtype, name: str) -> nn.GroupNorm:
    """GroupNorm with statistics in fp32: 32 groups, or the largest number below that divides the width and leaves a group 4 channels."""
    groups = max(g for g in range(1, 33) if features % g == 0 and (features // g >= 4 or g == 1))
    return nn.GroupNorm(num_groups=groups, epsilon=1e-5, dtype=dtype, name=name)


@jax.custom_vjp
def add_bias(h: Float[Array, "*d c"], bias: Float[Array, "c"]) -> Float[Array, "*d c"]:
    """h + bias. The bias's gradient, a sum over all rows, is a matrix product with ones, summed in fp32: the matrix units do it in passing."""
    return h + bias.astype(h.dtype).reshape((1,) * (h.ndim - 1) + bias.shape)


def _add_bias_backward(bias: Array, d_out: Array) -> tuple[Array, Array]:
    ones = jnp.ones((8, *d_out.shape[:-1]), d_out.dtype)  # with fewer rows the compiler makes a sum of it again
    precision = jax.lax.Precision.HIGHEST if d_out.dtype == jnp.float32 else None
    # Not flattened: that would gather a feature map whose height is split over chips.
    total = jnp.tensordot(ones, d_out, d_out.ndim - 1, precision=precision, preferred_element_type=jnp.float32)
    return d_out, total[0].astype(bias.dtype)


add_bias.defvjp(lambda h, bias: (add_bias(h, bias), bias), _add_bias_backward)


class Conv(nn.Module):
    """3x3 convolution, one pixel of zeros on each side; `zero_init` makes its branch start as nothing."""

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
        out = jax.lax.conv_general_dilated(h.astype(self.dtype), kernel.astype(self.dtype), strides, padding, dimension_numbers=numbers)
        return add_bias(out, jnp.asarray(bias))


class Projections(nn.Module):
    """Dense layers of one input, their kernels and biases side by side in one parameter each.

    The parameter is cut, not the result: cutting activations costs a pass over them, and over their gradients.
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
        kernels, biases = (jnp.split(a, self.parts, axis=-1) for a in (kernel.astype(self.dtype), bias))
        product = lambda w: jax.lax.dot_general(x.astype(self.dtype), w, (((x.ndim - 1,), (0,)), ((), ())))
        return [add_bias(product(w), b) for w, b in zip(kernels, biases)]


def dense(features: int, dtype: Dtype, name: str, zero_init: bool = False) -> Callable[[Array], Array]:
    """One dense layer, [*d e] -> [*d features]; `nn.Dense` but for how the bias is added."""
    layer = Projections(1, features, dtype, zero_init, name=name)
    return lambda x: layer(x)[0]


class ConvTranspose(nn.Module):
    """3x3 convolution of stride 1/2, [b h w c] -> [b 2h 2w features]: the adjoint of the strided `Conv`, up to its weights.

    The output phases use 1, 2, 2 and 4 of the nine weights, so the initialiser's fan-in is 9/4 of the channels.
    """

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        kernel = self.param("kernel", nn.initializers.variance_scaling(4.0, "fan_in", "truncated_normal"), (3, 3, h.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        out = jax.lax.platform_dependent(h.astype(self.dtype), kernel.astype(self.dtype), tpu=conv_adjoint, default=conv_phases)
        return add_bias(out, jnp.asarray(bias))


def _strided(image: Array, kernel: Array) -> Array:
    """[b 2h 2w f] -> [b h w c] by the kernel [3 3 c f] of its adjoint."""
    return jax.lax.conv_general_dilated(image, kernel.swapaxes(2, 3), (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def conv_adjoint(h: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"]) -> Float[Array, "b h2 w2 f"]:
    """The transposed convolution as the image gradient of the strided one: for TPUs, whose convolutions skip the zeros between inputs.

    Its own gradients are the strided convolution and that one's kernel gradient; left to itself the compiler reverses whole feature maps.
    """
    b, height, width, _ = h.shape
    image = jnp.zeros((b, 2 * height, 2 * width, kernel.shape[3]), h.dtype)
    return jax.vjp(lambda image: _strided(image, kernel), image)[1](h)[0]


def _conv_adjoint_backward(residuals: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    h, kernel = residuals
    d_h, kernel_gradient = jax.vjp(lambda kernel: _strided(d_out, kernel), kernel)
    return d_h, kernel_gradient(h)[0]


conv_adjoint.defvjp(lambda h, kernel: (conv_adjoint(h, kernel), (h, kernel)), _conv_adjoint_backward)


def conv_phases(h: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"]) -> Float[Array, "b h2 w2 f"]:
    """The transposed convolution as a 2x2 convolution at the input's size that makes all four output phases, then `depth_to_space`.

    On a CPU XLA's own transposed convolution runs four times slower; on TPUs the interleaving costs more than the convolution.
    """
    phases = jax.vmap(jax.vmap(_phases))(_phases(kernel))  # [py ay px ax c f]
    phases = phases.transpose(1, 3, 4, 0, 2, 5).reshape(2, 2, h.shape[-1], 4 * kernel.shape[-1])
    out = jax.lax.conv_general_dilated(h, phases, (1, 1), ((0, 1), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return depth_to_space(out, 2)


def _phases(kernel: Float[Array, "3 *d"]) -> Float[Array, "2 2 *d"]:
    """[phase, tap] along one axis: out[2i] = k[1] in[i] and out[2i + 1] = k[2] in[i] + k[0] in[i + 1]."""
    return jnp.stack([jnp.stack([kernel[1], jnp.zeros_like(kernel[1])]), jnp.stack([kernel[2], kernel[0]])])


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
    return h.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // patch, width // patch, patch * patch * c)


def depth_to_space(h: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 c2"]:
    """Inverse of `space_to_depth`."""
    b, height, width, c = h.shape
    h = h.reshape(b, height, width, patch, patch, c // patch**2)
    return h.transpose(0, 1, 3, 2, 4, 5).reshape(b, height * patch, width * patch, c // patch**2)


def sinusoid(logsnr: Float[Array, "b"], features: int) -> Float[Array, "b e"]:
    """Sinusoids of u = atan(exp(-lambda/2)) / (pi/2), which runs from 0 (clean) to 1 (noise), times 1000; periods up to 2 pi 10^4.

    u is the time of the cosine schedule whatever schedule is used: the embedding of Salimans & Ho 2022.
    """
    u = jnp.arctan(jnp.exp(-0.5 * logsnr.astype(jnp.float32))) / (0.5 * jnp.pi)
    frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(features // 2) / (features // 2))
    angle = 1000.0 * u[:, None] * frequency[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class NoiseLevelEmbedding(nn.Module):
    """A log-SNR as a vector: sinusoid, Dense, swish, Dense. One for the time, one for the low-res image's noise."""

    sinusoid_features: int
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, logsnr: Float[Array, "b"]) -> Float[Array, "b e"]:
        h = nn.Dense(self.features, dtype=self.dtype, name="dense_0")(sinusoid(logsnr, self.sinusoid_features))
        return nn.Dense(self.features, dtype=self.dtype, name="dense_1")(jax.nn.swish(h))
