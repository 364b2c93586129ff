"""The rank of the captioned image among all images of the data set, by distance to its sample.

The distance is the root mean square difference of pixel values in [0, 255] at the samples' size. It
uses no learned features, so it does not depend on the version of a feature network.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from imagen_jax.evals.statistics import proportion, summary

COLUMNS = 4096  # pixel values converted to float64 at once


def distances(
    samples: UInt8[np.ndarray, "n s s 3"], gallery: UInt8[np.ndarray, "m s s 3"]
) -> Float[np.ndarray, "n m"]:
    """Root mean square difference in [0, 255] of every sample from every image.

    Sums are exact, so equal images have equal distances.
    """
    a, b = samples.reshape(len(samples), -1), gallery.reshape(len(gallery), -1)
    squares = np.zeros((len(a), len(b)))
    for start in range(0, a.shape[1], COLUMNS):
        x, y = (rows[:, start : start + COLUMNS].astype(np.float64) for rows in (a, b))
        squares += (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2.0 * (x @ y.T)
    return np.sqrt(squares / a.shape[1])


def own_distances(
    samples: UInt8[np.ndarray, "n s s 3"], images: UInt8[np.ndarray, "n s s 3"]
) -> Float[np.ndarray, " n"]:
    """The distance of each sample from the image of the same index, as of `distances`."""
    a, b = samples.reshape(len(samples), -1), images.reshape(len(images), -1)
    squares = np.array([((x.astype(np.float64) - y) ** 2).sum() for x, y in zip(a, b)])
    return np.sqrt(squares / a.shape[1])


def score(distance: Float[np.ndarray, "n m"], wanted: Int[np.ndarray, " n"]) -> dict[str, Any]:
    """{"top1", "top5", "n", "gallery", "median_rank", "distance"} of a distance matrix.

    wanted: the column of each sample's own image.

    "top1" and "top5" are proportions with intervals, "gallery" is m, and "distance" is the distance
    to the own image.
    """
    rank = ranks(distance, wanted)
    top = {f"top{k}": proportion(int((rank <= k).sum()), len(rank)) for k in (1, 5)}
    right = summary(distance[np.arange(len(wanted)), wanted])
    return top | {
        "n": len(rank),
        "gallery": distance.shape[1],
        "median_rank": float(np.median(rank)),
        "distance": right,
    }


def ranks(
    distance: Float[np.ndarray, "n m"], wanted: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """The rank of each sample's own image, 1 for the nearest.

    Ties count against the sample: images equal to its own make the rank worse, never better.
    """
    own = distance[np.arange(len(wanted)), wanted]
    return (distance <= own[:, None]).sum(axis=1)
