"""Small feature networks with random weights. Weights depend on tensor name, shape and seed alone,
so goldens need not store them.
"""

import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.evals.networks.clip_image import CLIPImage, CLIPImageConfig
from imagen_jax.evals.networks.dinov2 import DINOv2, DINOv2Config
from imagen_jax.evals.networks.efficientnet_lite import EfficientNetLite
from imagen_jax.evals.networks.inception import InceptionV3
from imagen_jax.text.clip import CLIPText, CLIPTextConfig
from imagen_jax.weights import clip_files, feature_networks
from imagen_jax.weights.leaves import unflatten

GOLDENS = pathlib.Path(__file__).resolve().parents[2] / "goldens" / "feature_networks.npz"
SEED = 3
THIN = 16  # of Inception
STAGES = ((1, 3, 1, 1, 8), (2, 5, 2, 6, 12))  # of EfficientNet-Lite, see its LITE0
STEM, HEAD = 8, 20
SIZES = (13, 44)  # of resized pictures
CLIP_IMAGE = CLIPImageConfig(size=24, patch=8, width=16, layers=2, heads=2, dim=12)
CLIP_TEXT = CLIPTextConfig(24, 2, 3, projection_dim=12, vocab_size=60, max_length=11)
# Hugging Face's way to resize position embeddings; test_dinov2.py has Meta's.
DINOV2 = DINOv2Config(width=16, layers=2, heads=2, patch=4, grid=5, offset=0.0)
# name -> (network, pixels along an image, map of names)
NETWORKS = {
    "inception": (InceptionV3(THIN), 139, feature_networks.inception),
    "clip_image": (CLIPImage(CLIP_IMAGE), 24, clip_files.image_map),
    "dinov2": (DINOv2(DINOV2), 12, feature_networks.dinov2),
    "efficientnet_lite": (
        EfficientNetLite(STAGES, STEM, HEAD),
        33,
        feature_networks.efficientnet_lite,
    ),
}


def images(size: int, count: int = 2, seed: int = SEED) -> np.ndarray:
    """Prepared images [count size size 3]."""
    shape = (count, size, size, 3)
    return np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32)


def picture(height: int, width: int, seed: int = SEED) -> np.ndarray:
    """A uint8 picture [h w 3]: a gradient with noise."""
    rng = np.random.RandomState(seed)
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    base = np.stack([rows, columns, (rows + columns) / 2], axis=-1) * 255
    return np.clip(base + rng.normal(0, 40, base.shape), 0, 255).astype(np.uint8)


def tokens(config: CLIPTextConfig = CLIP_TEXT) -> tuple[np.ndarray, np.ndarray]:
    """(token ids [3 l], mask) of texts of different lengths; the highest id ends each text."""
    rng, lengths = np.random.RandomState(SEED), np.array([config.max_length, 6, 2])
    ids = rng.randint(0, config.vocab_size - 1, (3, config.max_length)).astype(np.int32)
    ids[np.arange(3), lengths - 1] = config.vocab_size - 1
    return ids, np.arange(config.max_length)[None, :] < lengths[:, None]


def random_tensor(name: str, shape: tuple[int, ...], seed: int = SEED) -> np.ndarray:
    """float32 values of the tensor `name` of a torch model.

    Variances from 0.1 to 10 and faint embeddings make a wrong epsilon visible.
    """
    rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    if name.endswith("running_var"):
        x = 10 ** rng.uniform(-1, 1, shape)
    elif name.endswith(("bias", "running_mean")):
        x = 0.2 * rng.standard_normal(shape)
    elif "embedding" in name:
        x = 0.01 * rng.standard_normal(shape)
    elif len(shape) == 1:
        x = 1 + 0.2 * rng.standard_normal(shape)
    else:
        x = rng.standard_normal(shape) * np.prod(shape[1:]) ** -0.5
    return x.astype(np.float32)


def shapes(network, *inputs) -> dict:
    return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]


def image_shapes(network, size: int) -> dict:
    return shapes(network, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))


def text_shapes(network: CLIPText) -> dict:
    row = (1, network.config.max_length)
    ids = jax.ShapeDtypeStruct(row, jnp.int32)
    return shapes(network, ids, jax.ShapeDtypeStruct(row, jnp.bool))


def random_weights(names, seed: int = SEED) -> dict[str, np.ndarray]:
    """All tensors of a map by their names in the file."""
    return {name: random_tensor(name, slot.shape, seed) for name, slot in names.slots.items()}


def as_params(names, weights: dict[str, np.ndarray]) -> dict:
    """The parameter tree, built without the loader."""
    order = {2: (1, 0), 4: (2, 3, 1, 0)}
    return unflatten(
        {
            slot.name: weights[name].transpose(order[weights[name].ndim])
            if slot.transposed
            else weights[name]
            for name, slot in names.slots.items()
        }
    )


def random_params(name: str) -> dict:
    network, size, name_map = NETWORKS[name]
    names = name_map(image_shapes(network, size))
    return as_params(names, random_weights(names))


def run(network, params, *inputs):
    return jax.tree.map(np.asarray, jax.jit(network.apply)({"params": params}, *inputs))


def assert_close(out: np.ndarray, want: np.ndarray, tolerance: float = 1e-4) -> None:
    """Relative to the spread of the features."""
    assert out.shape == want.shape
    assert want.std() > 1e-3
    np.testing.assert_allclose(out, want, rtol=0, atol=tolerance * want.std())
