"""Sampling grids: the noise levels at which the sampler evaluates the network, from noise to clean.

The last evaluation gives the sample: x-hat, without noise. Fields have the names of the config
fields that set them.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.diffusion.schedule import LOGSNR_MAX, LOGSNR_MIN, SCHEDULES


@runtime_checkable
class Grid(Protocol):
    """A rule that places a given number of noise levels."""

    def __call__(self, steps: int) -> Float[Array, "n"]:
        """The log-SNRs [steps], ascending."""


@dataclasses.dataclass(frozen=True)
class TimeGrid:
    """Uniform in t: 1, 1 - 1/steps, ..., 1/steps, through the stage's schedule (Appendix A)."""

    schedule: str

    def __call__(self, steps: int) -> Float[Array, "n"]:
        return SCHEDULES[self.schedule](jnp.linspace(1.0, 0.0, steps + 1))[:-1]


@dataclasses.dataclass(frozen=True)
class LogSNRGrid:
    """Uniform in log-SNR between the two values of `grid_logsnr`, both included.

    Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095) recommend it for their solver.
    """

    grid_logsnr: tuple[float, float]

    def __post_init__(self) -> None:
        check_ends(self.grid_logsnr)

    def __call__(self, steps: int) -> Float[Array, "n"]:
        first, last = self.grid_logsnr
        return jnp.linspace(first, last, steps)


@dataclasses.dataclass(frozen=True)
class KarrasGrid:
    """Uniform in sigma^(1 / rho) with sigma = exp(-logsnr / 2) (Karras et al. 2022, eq. 5).

    sigma_i = (a + i / (n - 1) (b - a))^rho with a and b the first and last sigma^(1 / rho).
    """

    grid_logsnr: tuple[float, float]
    grid_rho: float

    def __post_init__(self) -> None:
        check_ends(self.grid_logsnr)
        if not self.grid_rho > 0.0:
            raise ValueError(f"sampling.grid_rho is {self.grid_rho}; it must be positive")

    def __call__(self, steps: int) -> Float[Array, "n"]:
        root = lambda logsnr: jnp.exp(-0.5 * logsnr / self.grid_rho)
        roots = jnp.linspace(root(self.grid_logsnr[0]), root(self.grid_logsnr[1]), steps)
        return -2.0 * self.grid_rho * jnp.log(roots)


def check_ends(ends: tuple[float, float]) -> None:
    """Raises ValueError unless the two log-SNRs ascend within the range of all schedules."""
    if not LOGSNR_MIN <= ends[0] < ends[1] <= LOGSNR_MAX:
        raise ValueError(
            f"sampling.grid_logsnr is {ends}; it must be two ascending numbers from"
            f" {LOGSNR_MIN:g} to {LOGSNR_MAX:g}"
        )


def check_levels(grid: Grid, steps: int) -> None:
    """Raises ValueError unless the levels are finite and ascend strictly in fp32."""
    levels = np.asarray(grid(steps))
    if not np.isfinite(levels).all() or (np.diff(levels) <= 0.0).any():
        raise ValueError(
            f"the {steps} levels of {grid} are not finite and ascending in fp32; use fewer"
            " sampling.steps, a wider sampling.grid_logsnr or a sampling.grid_rho near 7"
        )


GRIDS = {"t": TimeGrid, "logsnr": LogSNRGrid, "karras": KarrasGrid}
