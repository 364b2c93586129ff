"""The mean and covariance of features, accumulated in chunks and merged."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float

CHUNK = 4096  # rows converted to float64 at once


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The number, mean and scatter matrix of n feature vectors, in float64.

    The scatter matrix is the sum of the outer products of the centred vectors, so no large means
    cancel in it.
    """

    n: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> "Statistics":
        """The statistics of at least one feature vector."""
        chunks = (features[i : i + CHUNK] for i in range(0, len(features), CHUNK))
        return functools.reduce(cls.merge, map(cls._of_chunk, chunks))

    @classmethod
    def _of_chunk(cls, features: Float[np.ndarray, "n d"]) -> "Statistics":
        rows = features.astype(np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        return cls(len(rows), mean, rows.T @ rows)

    @classmethod
    def from_covariance(
        cls, n: int, mean: Float[np.ndarray, " d"], cov: Float[np.ndarray, "d d"]
    ) -> "Statistics":
        """The statistics of n vectors with a known mean and covariance (n - 1)."""
        return cls(n, mean.astype(np.float64), cov.astype(np.float64) * (n - 1))

    @property
    def cov(self) -> Float[np.ndarray, "d d"]:
        """The covariance, with n - 1. Raises ValueError for a single vector."""
        if self.n < 2:
            raise ValueError(f"{self.n} images have no covariance; pass at least 2")
        return self.scatter / (self.n - 1)

    def merge(self, other: "Statistics") -> "Statistics":
        """The statistics of both sets (Chan, Golub and LeVeque 1983)."""
        n = self.n + other.n
        shift = other.mean - self.mean
        between = np.outer(shift, shift) * (self.n * other.n / n)
        mean = self.mean + shift * (other.n / n)
        return Statistics(n, mean, self.scatter + other.scatter + between)

    def without(self, part: "Statistics") -> "Statistics":
        """The statistics of the vectors that remain when `part` is removed: undoes `merge`."""
        n = self.n - part.n
        if n < 1:
            raise ValueError(f"{part.n} of {self.n} images cannot be removed; some must remain")
        mean = self.mean + (self.mean - part.mean) * (part.n / n)
        shift = part.mean - mean
        between = np.outer(shift, shift) * (n * part.n / self.n)
        return Statistics(n, mean, self.scatter - part.scatter - between)
