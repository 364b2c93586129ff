"""EfficientNet-Lite0 (Tan and Le 2019; the Lite variants of 2020), up to its pooled features.

Inverted residual blocks without squeeze-and-excitation, ReLU6, TensorFlow's padding. Its trained
weights are in a Python package, so it is the network of tests and demonstrations; no published
number is measured with it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.evals.networks.batch_norm import BatchNorm

# (blocks, kernel, stride of the first block, expansion, features)
LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
Input = Float[Array, "b h w c"]
Output = Float[Array, "b i j d"]


def relu6(x: Input) -> Input:
    """x in [0, 6]."""
    return jnp.clip(x, 0, 6)


def conv(x: Input, name: str, features: int, kernel: int = 1, stride: int = 1):
    """A convolution without bias. "SAME" pads more at the end, as TensorFlow does."""
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding="SAME",
        use_bias=False,
        name=name,
    )(x)


class Depthwise(nn.Module):
    """A convolution of each channel without bias, padded like `conv`.

    A sum of shifted products: XLA's grouped convolution takes seven times as long on a CPU.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: Input) -> Float[Array, "b i j c"]:
        size, stride, channels = self.kernel, self.stride, x.shape[-1]
        shape = (size, size, 1, channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        pads = jax.lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
        x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
        ends = [n - size + 1 for n in x.shape[1:3]]

        def product(i, j):
            shifted = x[:, i : i + ends[0] : stride, j : j + ends[1] : stride]
            return shifted * kernel[i, j, 0][None, None, None]

        return sum(product(i, j) for i in range(size) for j in range(size))


class Block(nn.Module):
    """Expand, convolve each channel, project; the input is added if the shape is the same."""

    kernel: int
    stride: int
    expansion: int
    features: int

    @nn.compact
    def __call__(self, x: Input) -> Output:
        hidden = x
        width = x.shape[-1] * self.expansion
        if self.expansion > 1:
            hidden = relu6(BatchNorm(name="bn0")(conv(x, "expand_conv", width)))
        hidden = Depthwise(self.kernel, self.stride, name="depthwise_conv")(hidden)
        hidden = relu6(BatchNorm(name="bn1")(hidden))
        out = BatchNorm(name="bn2")(conv(hidden, "project_conv", self.features))
        return x + out if x.shape == out.shape else out


class EfficientNetLite(nn.Module):
    """Prepared images to features. stages: see LITE0. stem, head: features of the outer layers."""

    stages: tuple[tuple[int, int, int, int, int], ...] = LITE0
    stem: int = 32
    head: int = 1280

    @nn.compact
    def __call__(self, images: Input) -> Float[Array, "b d"]:
        x = relu6(BatchNorm(name="bn0")(conv(images, "conv_stem", self.stem, 3, stride=2)))
        blocks = 0
        for repeats, kernel, stride, expansion, features in self.stages:
            for i in range(repeats):
                block = Block(
                    kernel, stride if i == 0 else 1, expansion, features, name=f"block_{blocks}"
                )
                x, blocks = block(x), blocks + 1
        x = relu6(BatchNorm(name="bn1")(conv(x, "conv_head", self.head)))
        return x.mean(axis=(1, 2))
