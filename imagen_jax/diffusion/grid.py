"""The noise levels that a sampler visits, from noisy to clean: steps + 1 log-SNRs.

The network is evaluated at the first `steps` of them; the last one is the clean end, at which the
sampler returns x-hat. The fields of a grid are those of the config.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.schedule import LOGSNR_MAX, SCHEDULES


@runtime_checkable
class Grid(Protocol):
    """A rule that places any number of steps."""

    def __call__(self, steps: int) -> Float[Array, "n"]:
        """[steps + 1] log-SNRs, ascending."""


@dataclasses.dataclass(frozen=True)
class TimeGrid:
    """t uniform from 1 to 0 (Appendix A), through the schedule that training uses."""

    schedule: str

    def __call__(self, steps: int) -> Float[Array, "n"]:
        return SCHEDULES[self.schedule](jnp.linspace(1.0, 0.0, steps + 1))


@dataclasses.dataclass(frozen=True)
class LogSNRGrid:
    """Log-SNR uniform between the two ends of `grid_logsnr`; suits DPM-Solver++ (2211.01095)."""

    grid_logsnr: tuple[float, float]

    def __post_init__(self) -> None:
        check_ends(self.grid_logsnr)

    def __call__(self, steps: int) -> Float[Array, "n"]:
        first, last = self.grid_logsnr
        return jnp.append(jnp.linspace(first, last, steps), LOGSNR_MAX)


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
        return jnp.append(-2.0 * self.grid_rho * jnp.log(roots), LOGSNR_MAX)


def check_ends(ends: tuple[float, float]) -> None:
    """Raises ValueError unless the two log-SNRs ascend."""
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise ValueError(f"sampling.grid_logsnr is {ends}; it must be two ascending numbers")


GRIDS = {"t": TimeGrid, "logsnr": LogSNRGrid, "karras": KarrasGrid}
