"""Bins of noise levels: their edges, how a noise level is drawn in a bin, and numbers by bin.

`TrainingBins` are drawn equally often in training, so they depend on its noise density.
`LogsnrBins` are fixed intervals of log-SNR, the same for every recipe. Every row has one value in
every bin.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.diffusion.density import Density, UniformTime
from imagen_jax.diffusion.loss import Draws
from imagen_jax.evals.statistics import summary

Describe = Callable[[Float[np.ndarray, " n"]], dict[str, Any]]
UNIFORM = "u"  # the draw, uniform in [0, 1), that training turns into a noise level


@runtime_checkable
class Bins(Protocol):
    """Bins of noise levels. They are hashable keys of compiled functions and results."""

    def __len__(self) -> int:
        """The number of bins, k."""

    def noise_level(self, draws: Draws, i: Any) -> tuple[Draws, Float[Array, "b"]]:
        """`draws` with noise levels in bin i, and their log-SNR."""

    def by_bin(
        self, values: Float[np.ndarray, "n k"], describe: Describe = summary
    ) -> dict[str, Any]:
        """`by_bin` of values [n k] with the edges of these bins."""


@dataclasses.dataclass(frozen=True)
class TrainingBins:
    """Intervals that training draws equally often; "overall" of a loss estimates the training loss.

    density: the density of the training noise. If time is uniform, the bins are equal intervals of
        t, and results contain t.
    count: the number of bins.
    """

    density: Density
    count: int

    def __len__(self) -> int:
        return self.count

    def noise_level(self, draws: Draws, i: Any) -> tuple[Draws, Float[Array, "b"]]:
        u = (i + draws[UNIFORM]) / self.count
        return {**draws, UNIFORM: u}, self.density(u)

    def by_bin(
        self, values: Float[np.ndarray, "n k"], describe: Describe = summary
    ) -> dict[str, Any]:
        k = self.count
        logsnr = np.asarray(self.density(jnp.linspace(0.0, 1.0, 2 * k + 1)))
        timed = isinstance(self.density, UniformTime)
        t = [i / k for i in range(k + 1)] if timed else None
        return by_bin(values, logsnr[::2], logsnr[1::2], t, describe)


@dataclasses.dataclass(frozen=True)
class LogsnrBins:
    """Fixed intervals of log-SNR between k + 1 `edges`; log-SNR is uniform within each.

    "overall" is the unweighted mean over the bins, which is a mean over log-SNR if their widths are
    equal.
    """

    edges: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def noise_level(self, draws: Draws, i: Any) -> tuple[Draws, Float[Array, "b"]]:
        edges = jnp.asarray(self.edges, jnp.float32)
        logsnr = edges[i] + (edges[i + 1] - edges[i]) * draws[UNIFORM]
        # The draw of training is removed: this log-SNR does not follow from it.
        return {name: value for name, value in draws.items() if name != UNIFORM}, logsnr

    def by_bin(
        self, values: Float[np.ndarray, "n k"], describe: Describe = summary
    ) -> dict[str, Any]:
        return by_bin(values, self.edges, describe=describe)


def by_bin(
    values: Float[np.ndarray, "n k"],
    edges: Sequence[float] | Float[np.ndarray, " k1"],
    centres: Sequence[float] | Float[np.ndarray, " k"] | None = None,
    t: Sequence[float] | None = None,
    describe: Describe = summary,
) -> dict[str, Any]:
    """{"overall": ..., "bins": [{"t", "logsnr": [from, to], "logsnr_centre", ...}, ...]}.

    values: one per row and bin.
    edges: log-SNR at the k + 1 ends of the bins.
    centres: log-SNR in the middle of the bins, by default halfway between the edges.
    t: the time at the edges; without it, bins have no "t".

    "overall" describes each row's mean over the bins. The bins of a row are not independent, so
    its error comes from the rows alone. Raises ValueError if the numbers of bins differ.
    """
    k = values.shape[1]
    edges = [float(edge) for edge in edges]
    if centres is None:
        centres = [(start + end) / 2 for start, end in zip(edges, edges[1:])]
    if len(edges) != k + 1 or len(centres) != k:
        raise ValueError(
            f"{k} bins have {k + 1} edges and {k} centres, not {len(edges)} and {len(centres)}"
        )
    bins = []
    for i in range(k):
        interval = {"t": list(t[i : i + 2])} if t is not None else {}
        interval |= {"logsnr": edges[i : i + 2], "logsnr_centre": float(centres[i])}
        bins.append(interval | describe(values[:, i]))
    return {"overall": describe(values.mean(axis=1)), "bins": bins}
