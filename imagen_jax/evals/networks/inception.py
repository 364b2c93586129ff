"""The Inception v3 of FID: TensorFlow's graph of 2015-12-05, up to its 2048 pooled features.

It differs from other Inception v3s: average pools do not count padding, and the pool branch of the
last block is a max pool. Modules have the names of pytorch-fid and torch-fidelity, whose weights
file is read. `thin` divides all channel counts, for tests.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.evals.networks.batch_norm import BatchNorm

Input = Float[Array, "b h w c"]
Output = Float[Array, "b i j d"]


class Conv(nn.Module):
    """Convolution without bias, batch norm and ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int
    padding: str

    @nn.compact
    def __call__(self, x: Input) -> Output:
        x = nn.Conv(
            self.features,
            self.kernel,
            strides=self.stride,
            padding=self.padding,
            use_bias=False,
            name="conv",
        )(x)
        return nn.relu(BatchNorm(name="bn")(x))


class Block(nn.Module):
    """The base of the blocks. thin: divides the channel counts."""

    thin: int

    def conv(self, x: Input, name: str, features: int, *kernel: int, stride: int = 1) -> Output:
        """One convolution, with padding if the stride is 1. kernel: height, width; else 1x1."""
        padding = "SAME" if stride == 1 else "VALID"
        return Conv(features // self.thin, kernel or (1, 1), stride, padding, name=name)(x)

    def chain(self, x: Input, name: str, *layers: tuple[int, ...], stride: int = 1) -> Output:
        """Convolutions NAME_1, NAME_2 ... The stride is that of the last one."""
        for i, layer in enumerate(layers):
            last = i + 1 == len(layers)
            x = self.conv(x, f"{name}_{i + 1}", *layer, stride=stride if last else 1)
        return x

    def pair(self, x: Input, name: str, features: int) -> list[Output]:
        """A 1x3 and a 3x1 convolution, NAMEa and NAMEb."""
        return [
            self.conv(x, f"{name}a", features, 1, 3),
            self.conv(x, f"{name}b", features, 3, 1),
        ]


def average(x: Input) -> Output:
    """The 3x3 mean of pixels; padding does not count."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def maximum(x: Input, stride: int) -> Output:
    """The 3x3 maximum; with stride 2 without padding."""
    return nn.max_pool(x, (3, 3), (stride, stride), "SAME" if stride == 1 else "VALID")


def join(*branches: Float[Array, "b h w _"]) -> Output:
    """Concatenates channels."""
    return jnp.concatenate(branches, axis=-1)


class BlockA(Block):
    """Mixed_5b to 5d, 35x35 pixels at full size."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Input) -> Output:
        return join(
            self.conv(x, "branch1x1", 64),
            self.chain(x, "branch5x5", (48,), (64, 5, 5)),
            self.chain(x, "branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3)),
            self.conv(average(x), "branch_pool", self.pool_features),
        )


class BlockB(Block):
    """Mixed_6a, from 35x35 to 17x17 pixels."""

    @nn.compact
    def __call__(self, x: Input) -> Output:
        return join(
            self.conv(x, "branch3x3", 384, 3, 3, stride=2),
            self.chain(x, "branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3), stride=2),
            maximum(x, 2),
        )


class BlockC(Block):
    """Mixed_6b to 6e, 17x17 pixels, kernels of 1x7 and 7x1."""

    inner: int

    @nn.compact
    def __call__(self, x: Input) -> Output:
        c = self.inner
        double = ((c,), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7))
        return join(
            self.conv(x, "branch1x1", 192),
            self.chain(x, "branch7x7", (c,), (c, 1, 7), (192, 7, 1)),
            self.chain(x, "branch7x7dbl", *double),
            self.conv(average(x), "branch_pool", 192),
        )


class BlockD(Block):
    """Mixed_7a, from 17x17 to 8x8 pixels."""

    @nn.compact
    def __call__(self, x: Input) -> Output:
        second = ((192,), (192, 1, 7), (192, 7, 1), (192, 3, 3))
        return join(
            self.chain(x, "branch3x3", (192,), (320, 3, 3), stride=2),
            self.chain(x, "branch7x7x3", *second, stride=2),
            maximum(x, 2),
        )


class BlockE(Block):
    """Mixed_7b and 7c, 8x8 pixels. last: the pool is a maximum."""

    last: bool

    @nn.compact
    def __call__(self, x: Input) -> Output:
        pool = maximum(x, 1) if self.last else average(x)
        return join(
            self.conv(x, "branch1x1", 320),
            *self.pair(self.conv(x, "branch3x3_1", 384), "branch3x3_2", 384),
            *self.pair(
                self.chain(x, "branch3x3dbl", (448,), (384, 3, 3)),
                "branch3x3dbl_3",
                384,
            ),
            self.conv(pool, "branch_pool", 192),
        )


class InceptionV3(nn.Module):
    """Images in [-1, 1) to 2048 / thin features; FID has 299x299 pixels."""

    thin: int = 1

    @nn.compact
    def __call__(self, images: Input) -> Float[Array, "b d"]:
        def conv(x, name, features, kernel, stride=1, padding="VALID"):
            size = (kernel, kernel)
            return Conv(features // self.thin, size, stride, padding, name=name)(x)

        x = conv(images, "Conv2d_1a_3x3", 32, 3, stride=2)
        x = conv(x, "Conv2d_2a_3x3", 32, 3)
        x = maximum(conv(x, "Conv2d_2b_3x3", 64, 3, padding="SAME"), 2)
        x = conv(x, "Conv2d_3b_1x1", 80, 1)
        x = maximum(conv(x, "Conv2d_4a_3x3", 192, 3), 2)
        for name, pool_features in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = BlockA(self.thin, pool_features, name=f"Mixed_{name}")(x)
        x = BlockB(self.thin, name="Mixed_6a")(x)
        for name, inner in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = BlockC(self.thin, inner, name=f"Mixed_{name}")(x)
        x = BlockD(self.thin, name="Mixed_7a")(x)
        for name, last in (("7b", False), ("7c", True)):
            x = BlockE(self.thin, last, name=f"Mixed_{name}")(x)
        return x.mean(axis=(1, 2))
