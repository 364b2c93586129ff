"""The noise levels at which a sampler evaluates the network, from noisy to clean.

From the last one the sampler goes to x-hat. The fields of a grid are those of the config.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.schedule import LOGSNR_MAX, LOGSNR_MIN, SCHEDULES


@runtime_checkable
class Grid(Protocol):
    """A rule that places any number of steps."""

    def __call__(self, steps: int) -> Float[Array, "n"]:
        """[steps] log-SNRs, ascending."""


@dataclasses.dataclass(frozen=True)
class TimeGrid:
    """t = 1, 1 - 1/steps, ..., 1/steps (Appendix A), through the stage's schedule."""

    schedule: str

    def __call__(self, steps: int) -> Float[Array, "n"]:
        return SCHEDULES[self.schedule](jnp.linspace(1.0, 0.0, steps + 1))[:-1]


@dataclasses.dataclass(frozen=True)
class LogSNRGrid:
    """Log-SNR uniform between the two ends of `grid_logsnr`; suits DPM-Solver++ (2211.01095)."""

    grid_logsnr: tuple[float, float]

    def __post_init__(self) -> None:
        check_ends(self.grid_logsnr)

    def __call__(self, steps: int) -> Float[Array, "n"]:
        first, last = self.grid_logsnr
        return jnp.linspace(first, last, steps)


@dataclasses.dataclass(frozen=True)
class KarrasGrid:
    """sigma^(1/rho) uniform, with sigma = exp(-logsnr / 2) (Karras et al. 2022, eq. 5)."""

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
    """Raises ValueError unless the two log-SNRs ascend and are in the range of all schedules."""
    if not LOGSNR_MIN <= ends[0] < ends[1] <= LOGSNR_MAX:
        wanted = f"two ascending numbers from {LOGSNR_MIN:g} to {LOGSNR_MAX:g}"
        raise ValueError(f"sampling.grid_logsnr is {ends}; it must be {wanted}")


GRIDS = {"t": TimeGrid, "logsnr": LogSNRGrid, "karras": KarrasGrid}
