"""Comparisons of super-resolution: with bicubic up-sampling, with its own input, and of detail."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from imagen_jax.evals.nearest import ranks
from imagen_jax.evals.statistics import difference, number, proportion, summary

PEAK = 255.0


def bicubic(lowres: UInt8[np.ndarray, "n r r 3"], size: int) -> UInt8[np.ndarray, "n s s 3"]:
    """Images up-sampled to `size` pixels with PIL's bicubic filter (a = -0.5)."""
    return np.stack(
        [
            np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
            for image in lowres
        ]
    )


def mean_square(
    a: UInt8[np.ndarray, "n s s 3"], b: UInt8[np.ndarray, "n s s 3"]
) -> Float[np.ndarray, " n"]:
    """Mean squared difference of each pair of images, on the scale [-1, 1] of losses."""
    return np.array(
        [
            np.mean(np.square((x.astype(np.float64) - y) / (PEAK / 2)))
            for x, y in zip(a, b, strict=True)
        ]
    )


def consistency_errors(
    shrunk: UInt8[np.ndarray, "n r r 3"], lowres: UInt8[np.ndarray, "n r r 3"]
) -> Float[np.ndarray, "n 2"]:
    """The distance of down-sampled samples from the low-res images that they were sampled from.

    shrunk: samples down-sampled with the filter that made the data's low-res images. Returns the
    mean absolute error in 0-255 and `mean_square` of each pair.
    """
    error = np.array(
        [np.mean(np.abs(x.astype(np.float64) - y)) for x, y in zip(shrunk, lowres, strict=True)]
    )
    return np.stack([error, mean_square(shrunk, lowres)], axis=1)


def consistency(errors: Float[np.ndarray, "n 2"]) -> dict[str, Any]:
    """A summary of `consistency_errors`.

    {"mae": in 0-255, "psnr": in dB, from the mean squared error over all images}; "psnr" is None if
    the error is 0.
    """
    square = float(np.mean(errors[:, 1])) * (PEAK / 2) ** 2
    return {
        "mae": summary(errors[:, 0]),
        "psnr": number(10 * math.log10(PEAK**2 / square)) if square else None,
    }


def residual_correlations(
    samples: UInt8[np.ndarray, "n s s 3"],
    images: UInt8[np.ndarray, "n s s 3"],
    upsampled: UInt8[np.ndarray, "n s s 3"],
) -> Float[np.ndarray, "n n"]:
    """The correlation of the detail of sample i with that of image j.

    Detail is the difference from the up-sampled low-res image.
    """
    return _residuals(samples, upsampled) @ _residuals(images, upsampled).T


def _residuals(
    images: UInt8[np.ndarray, "n s s 3"], upsampled: UInt8[np.ndarray, "n s s 3"]
) -> Float[np.ndarray, "n p"]:
    """images - upsampled, each with mean 0 and norm 1; zero for an image without detail."""
    residual = (images.astype(np.float32) - upsampled).reshape(len(images), -1)
    residual -= residual.mean(axis=1, keepdims=True)
    return residual / np.maximum(np.linalg.norm(residual, axis=1, keepdims=True), 1e-6)


def detail(correlation: Float[np.ndarray, "n n"]) -> dict[str, Any]:
    """{"own", "other", "difference", "top1", "top5"} of a result of `residual_correlations`.

    "own" and "other" are the correlations with the detail of the matching image and of the others.
    "difference" is paired. "top1" and "top5" are the rates at which the matching image is the
    nearest or among the 5 nearest. Raises ValueError for fewer than two samples.
    """
    n = len(correlation)
    if n < 2:
        raise ValueError(
            "detail is compared with that of other images: at least two samples are needed"
        )
    own = np.diagonal(correlation)
    other = (correlation.sum(axis=1) - own) / (n - 1)
    rank = ranks(-correlation, np.arange(n))
    top = {f"top{k}": proportion(int((rank <= k).sum()), n) for k in (1, 5)}
    return {
        "own": summary(own),
        "other": summary(other),
        "difference": difference(own - other),
    } | top
