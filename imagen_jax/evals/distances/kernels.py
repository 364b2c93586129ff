"""The squared maximum mean discrepancy (MMD) of a kernel, with the sums of each block of samples.

Gretton et al. 2012. Sums by block give the value without any block, so the jackknife evaluates the
kernel once.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from imagen_jax.evals.distances.jackknife import Replicates
from imagen_jax.evals.distances.tiles import products, spans, squares

# (inner products, squared lengths, squared lengths) -> kernel values, broadcast over pairs
Kernel = Callable[
    [Float[np.ndarray, "..."], Float[np.ndarray, "..."], Float[np.ndarray, "..."]],
    Float[np.ndarray, "..."],
]
TILE = 2048  # rows and columns of a tile of the kernel matrix


@dataclasses.dataclass(frozen=True)
class KernelSums:
    """Sums of kernel values over pairs, by block of the samples.

    samples: all pairs of samples, by the blocks of both.
    diagonal: pairs of a sample with itself.
    cross: pairs of a sample and a reference row.
    reference: all pairs of reference rows.
    reference_diagonal: pairs of a reference row with itself.
    sizes: samples in each block.
    n_reference: reference rows.
    """

    samples: Float[np.ndarray, "k k"]
    diagonal: Float[np.ndarray, " k"]
    cross: Float[np.ndarray, " k"]
    reference: float
    reference_diagonal: float
    sizes: Int[np.ndarray, " k"]
    n_reference: int

    @classmethod
    def of(
        cls,
        samples: Float[np.ndarray, "n d"],
        reference: Float[np.ndarray, "m d"],
        kernel: Kernel,
        blocks: Int[np.ndarray, " n"],
    ) -> "KernelSums":
        """Evaluates the kernel on all pairs, in tiles."""
        one = np.zeros(len(reference), int)
        return cls(
            samples=_sums_within(samples, kernel, blocks),
            diagonal=np.bincount(blocks, diagonal(samples, kernel)),
            cross=np.bincount(blocks, row_sums(samples, reference, kernel)),
            reference=float(_sums_within(reference, kernel, one).sum()),
            reference_diagonal=float(diagonal(reference, kernel).sum()),
            sizes=np.bincount(blocks),
            n_reference=len(reference),
        )

    def mmd(self, unbiased: bool, kept: Bool[np.ndarray, " k"] | None = None) -> float:
        """The squared MMD of the samples in the kept blocks, by default of all.

        unbiased: leave out pairs of a row with itself. Otherwise the value is at least 0, and
        positive for two samples of one distribution.
        """
        kept = np.ones(len(self.sizes), bool) if kept is None else kept
        n, m = int(self.sizes[kept].sum()), self.n_reference
        within, across = self.samples[np.ix_(kept, kept)].sum(), self.cross[kept].sum() / (n * m)
        if unbiased:
            within = (within - self.diagonal[kept].sum()) / (n * (n - 1))
            reference = (self.reference - self.reference_diagonal) / (m * (m - 1))
        else:
            within, reference = within / n**2, self.reference / m**2
        return float(within + reference - 2 * across)

    def replicates(self, unbiased: bool, scale: float = 1.0) -> Replicates:
        """`mmd` times `scale` of all samples, and without each block."""
        index = np.arange(len(self.sizes))
        deleted = [scale * self.mmd(unbiased, index != block) for block in index]
        return Replicates(scale * self.mmd(unbiased), np.array(deleted), self.sizes)


def polynomial(dimensions: int) -> Kernel:
    """(x.y / d + 1)^3, the kernel of KID (Binkowski et al. 2018)."""
    return lambda inner, x_squares, y_squares: (inner / dimensions + 1) ** 3


def gaussian(sigma: float) -> Kernel:
    """exp(-|x - y|^2 / (2 sigma^2))."""
    return lambda inner, x_squares, y_squares: np.exp(
        (2 * inner - x_squares - y_squares) / (2 * sigma**2)
    )


def matrix(
    x: Float[np.ndarray, "a d"], y: Float[np.ndarray, "b d"], kernel: Kernel
) -> Float[np.ndarray, "a b"]:
    """The kernel of all pairs."""
    return kernel(products(x, y), squares(x)[:, None], squares(y)[None])


def diagonal(x: Float[np.ndarray, "n d"], kernel: Kernel) -> Float[np.ndarray, " n"]:
    """The kernel of each row with itself."""
    lengths = squares(x)
    return kernel(lengths, lengths, lengths)


def row_sums(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], kernel: Kernel
) -> Float[np.ndarray, " n"]:
    """The sum of the kernel of each row of x with all rows of y."""
    sums = np.zeros(len(x))
    for rows in _tiles(len(x)):
        for columns in _tiles(len(y)):
            sums[rows] += matrix(x[rows], y[columns], kernel).sum(axis=1)
    return sums


def _members(blocks: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n k"]:
    """1 where a row belongs to a block, 0 elsewhere."""
    return (blocks[:, None] == np.arange(blocks.max() + 1)).astype(np.float64)


def _tiles(n: int) -> list[slice]:
    return spans(n, TILE, TILE**2)


def _sums_within(
    x: Float[np.ndarray, "n d"], kernel: Kernel, blocks: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "k k"]:
    """Kernel sums over all pairs of rows, by the blocks of both. Half of the tiles suffices."""
    members = _members(blocks)
    out = np.zeros((members.shape[1],) * 2)
    for rows in _tiles(len(x)):
        for columns in _tiles(len(x)):
            if columns.start < rows.start:
                continue
            sums = members[rows].T @ (matrix(x[rows], x[columns], kernel) @ members[columns])
            out += sums if rows == columns else sums + sums.T
    return out
