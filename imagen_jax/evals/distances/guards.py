"""Checks of features before a distance is computed, and of the distance."""

import hashlib

import numpy as np
from jaxtyping import Bool, Float

SHOWN = 3  # rows named in a message


def check(name: str, features: Float[np.ndarray, "n d"]) -> None:
    """Raises ValueError for features that are not [n >= 2, d] or not finite."""
    if features.ndim != 2 or len(features) < 2 or features.shape[1] == 0:
        raise ValueError(
            f"{name}: the features have the shape {features.shape}; pass an array [n, d] of at"
            " least 2 images"
        )
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name}: {len(bad)} of {len(features)} images have non-finite features, first rows"
            f" {bad[:SHOWN].tolist()}; check the images and the feature network"
        )


def check_pair(samples: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m k"]) -> list[str]:
    """Warnings about two sets of features. Raises ValueError if they cannot be compared."""
    check("samples", samples)
    check("reference", reference)
    check_dimensions(samples.shape[1], reference.shape[1])
    count = int(shared(samples, reference).sum())
    if count == len(samples):
        raise ValueError(
            f"all {count} samples have the features of reference images; pass generated images as"
            " samples"
        )
    if count:
        return [
            f"{count} of {len(samples)} samples have exactly the features of a reference image;"
            " check that no reference images are among the samples"
        ]
    return []


def check_dimensions(samples: int, reference: int) -> None:
    """Raises ValueError if samples and reference have different numbers of features."""
    if samples != reference:
        raise ValueError(
            f"samples have {samples} features and the reference has {reference}; use one feature"
            " network for both"
        )


def shared(
    samples: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]
) -> Bool[np.ndarray, " n"]:
    """Whether each sample equals a reference row in every feature."""
    dtype = np.result_type(samples, reference)

    def digests(rows):
        # Adding 0 turns -0 into 0, which is equal and has other bytes.
        return [
            hashlib.blake2b((row.astype(dtype) + dtype.type(0)).tobytes(), digest_size=16).digest()
            for row in rows
        ]

    known = set(digests(reference))
    return np.array([digest in known for digest in digests(samples)], bool)


def check_count(name: str, n: int, dimensions: int) -> list[str]:
    """Warnings about a covariance of n images. Raises ValueError if it is singular."""
    if n <= dimensions:
        raise ValueError(
            f"{name}: {n} images are too few for a Fréchet distance of {dimensions} features,"
            f" whose covariance is singular; pass more than {dimensions}, or use KID"
        )
    if n < 2 * dimensions:
        return [
            f"{name}: {n} images are few for a Fréchet distance of {dimensions} features; pass at"
            f" least {2 * dimensions}, or compare by KID"
        ]
    return []


def check_not_zero(name: str, value: float, scale: float) -> None:
    """Raises ValueError for a distance that is 0 up to rounding.

    scale: the magnitude of the terms whose difference the distance is.
    """
    if abs(value) <= 1e-12 * scale:
        raise ValueError(
            f"the {name} is 0: samples and reference have the same features; pass generated"
            " images as samples, and check that their features differ"
        )
