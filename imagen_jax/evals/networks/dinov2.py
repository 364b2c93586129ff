"""DINOv2 (Oquab et al. 2023): a ViT with scaled branches, the normed class token as features.

Position embeddings are stored for 37x37 patches and resized to the image's. Meta's code resizes by
(patches + 0.1) / 37, Hugging Face's by patches / 37, so their features differ. Published Frechet
distances (dgm-eval, EDM2, torch-fidelity) come from Meta's code, which is followed here.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.text.clip import Block, layer_norm

EPSILON = 1e-6
OFFSET = 0.1
CUBIC = -0.75  # torch's parameter of cubic convolution


@dataclasses.dataclass(frozen=True)
class DINOv2Config:
    """Sizes of a DINOv2.

    width, layers, heads: of the transformer.
    patch: pixels along a patch.
    grid: patches along an image whose position embeddings are stored.
    offset: added to the patches along an image when position embeddings are resized.
    """

    width: int
    layers: int
    heads: int
    patch: int = 14
    grid: int = 37
    offset: float = OFFSET


def cubic(distance: Float[np.ndarray, "*d"]) -> Float[np.ndarray, "*d"]:
    """The kernel of cubic convolution (Keys 1981) with parameter CUBIC."""
    x = np.abs(distance)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x**2 + 1
    far = ((x - 5) * x + 8) * CUBIC * x - 4 * CUBIC
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(source: int, target: int, offset: float) -> Float[np.ndarray, "t s"]:
    """Bicubic resizing along one axis as torch does it: no antialiasing, borders repeated."""
    if source == target:
        return np.eye(source, dtype=np.float32)
    centre = (np.arange(target) + 0.5) * (source / (target + offset)) - 0.5
    matrix = np.zeros((target, source), np.float32)
    for step in range(-1, 3):
        index = np.floor(centre) + step
        column = np.clip(index, 0, source - 1).astype(int)
        np.add.at(matrix, (np.arange(target), column), cubic(centre - index))
    return matrix


class DINOv2(nn.Module):
    """Prepared images to the features of the class token."""

    config: DINOv2Config

    @nn.compact
    def __call__(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
        c = self.config
        init = nn.initializers.normal(0.02)
        patches = nn.Conv(
            c.width,
            (c.patch, c.patch),
            strides=c.patch,
            padding="VALID",
            name="patch_embedding",
        )(images)
        first = self.param("class_embedding", init, (1, 1, c.width))
        stored = self.param("position_embedding", init, (1, c.grid**2 + 1, c.width))
        grid = stored[0, 1:].reshape(c.grid, c.grid, c.width)
        matrix = jnp.asarray(resize_matrix(c.grid, patches.shape[1], c.offset))
        position = jnp.einsum("ai,bj,ijd->abd", matrix, matrix, grid)
        x = (patches + position[None]).reshape(patches.shape[0], -1, c.width)
        first = jnp.broadcast_to(first + stored[:, :1], (x.shape[0], 1, c.width))
        x = jnp.concatenate([first, x], axis=1)
        gelu = functools.partial(jax.nn.gelu, approximate=False)
        for i in range(c.layers):
            x = Block(c.heads, gelu, EPSILON, layer_scale=True, name=f"block_{i}")(x)
        return layer_norm("final_norm", EPSILON, jnp.float32)(x[:, 0])
