"""Reference files: the features of real images for one network, with their statistics.

A file holds what repeats and checks it: the features, their mean and covariance, the number and the
origin of the images, their preparation, and the identity of the network.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from imagen_jax import __version__
from imagen_jax.checksums import sha256_file
from imagen_jax.evals.distances.moments import Statistics
from imagen_jax.evals.networks.network import FeatureNetwork
from imagen_jax.evals.real_images import RealImages
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import check_local, is_away, open_arrays, write_arrays

# Fields of a network's identity that determine its features.
SAME_NETWORK = ("network", "preprocessing", "dim", "weights_sha256")
TOLERANCE = 1e-6  # of the stored statistics against the features, relative


@dataclasses.dataclass(frozen=True)
class Reference:
    """Features of real images.

    identity: JSON for results: the images, the network, the file and its checksum.
    """

    features: Float32[np.ndarray, "n d"]
    identity: Mapping[str, Any]


def write(
    images: RealImages, network: FeatureNetwork, features: Float32[np.ndarray, "n d"], path: AnyPath
) -> Reference:
    """Writes the file of the features of all images, whole or not at all, and reads it back."""
    statistics = Statistics.of(features)
    meta = {
        "images": images.identity,
        "network": dict(network.identity),
        "imagen_jax": __version__,
    }
    write_arrays(
        path,
        {
            "features": features,
            "mean": statistics.mean,
            "covariance": statistics.cov,
            "meta": np.array(json.dumps(meta)),
        },
    )
    return load(path, network, images.identity)


def load(path: AnyPath, network: FeatureNetwork, images: Mapping[str, Any] | None) -> Reference:
    """Reads a reference file and tests it.

    images: the identity of the images that it must be of; None accepts any.

    Raises ValueError if the file is damaged, its statistics are not those of its features, or it is
    of another network or other images.
    """
    try:
        with open_arrays(path) as file:
            features, mean, covariance = (file[name] for name in ("features", "mean", "covariance"))
            meta = json.loads(str(file["meta"]))
            made_by, origin = dict(meta["network"]), dict(meta["images"])
            count = origin["count"]
    except FileNotFoundError:
        raise ValueError(f"reference {path} does not exist; give a file of --reference") from None
    except Exception as error:  # zipfile and numpy raise many kinds of exceptions
        if in_bucket(path) and is_away(error):
            raise
        raise ValueError(
            f"reference {path} is damaged ({_reason(error)}); make it again"
        ) from error
    if fault := _wrong_shape(features, mean, covariance):
        raise ValueError(f"reference {path} is damaged ({fault}); make it again")
    statistics = Statistics.of(features)
    close = lambda a, b: np.abs(a - b).max() <= TOLERANCE * max(np.abs(b).max(), 1e-12)
    if (
        len(features) != count
        or features.shape[1] != made_by.get("dim", features.shape[1])
        or not np.isfinite(features).all()
        or not (close(mean, statistics.mean) and close(covariance, statistics.cov))
    ):
        raise ValueError(
            f"reference {path} contradicts itself: its statistics or its number of images are not"
            " those of its features; make it again"
        )
    differ = [name for name in SAME_NETWORK if made_by.get(name) != network.identity[name]]
    if differ:
        raise ValueError(
            f"reference {path} was made with another network ({', '.join(differ)} differ); make it"
            f" again with {network.name}"
        )
    if images is not None and {**origin, "path": ""} != {**images, "path": ""}:
        raise ValueError(f"reference {path} is of other images; make it again or give --reference")
    return Reference(features, meta | {"file": str(path), "sha256": sha256_file(path)})


def _wrong_shape(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> str:
    """The first array that is not one of numbers of the right shape; "" if there is none."""
    rows, *widths = features.shape or (0,)
    if len(widths) != 1 or rows < 2 or 0 in widths:
        return f"features have the shape {features.shape}, not that of 2 or more images"
    for name, array, shape in (
        ("features", features, features.shape),
        ("mean", mean, (*widths,)),
        ("covariance", covariance, (*widths, *widths)),
    ):
        if not np.issubdtype(array.dtype, np.floating):
            return f"{name} has the type {array.dtype}, not that of numbers with a fraction"
        if array.shape != shape:
            return f"{name} has the shape {array.shape}, not {shape}"
    return ""


def _reason(error: Exception) -> str:
    """Why a file cannot be read: numpy's own messages advise pickle."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return "it is not a complete .npz file of evaluate"


def network_of(path: Path) -> str:
    """The name of the network of a reference file. Raises ValueError if it is none."""
    return _facts(path)[0]


def images_of(path: Path) -> Mapping[str, Any]:
    """The identity of the images of a reference file. Raises ValueError if it is none."""
    return _facts(path)[1]


def _facts(path: Path) -> tuple[str, Mapping[str, Any]]:
    check_local("--reference", path)
    try:
        with open_arrays(path) as file:
            meta = json.loads(str(file["meta"]))
        return str(meta["network"]["network"]), {"count": int(meta["images"]["count"])} | meta[
            "images"
        ]
    except FileNotFoundError:
        raise ValueError(f"--reference {path} does not exist") from None
    except Exception as error:  # zipfile and numpy raise many kinds of exceptions
        raise ValueError(
            f"--reference {path} is not a reference file ({_reason(error)}); evaluate writes them"
            " to OUTPUT/reference"
        ) from error
