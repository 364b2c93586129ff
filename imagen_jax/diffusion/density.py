"""Distributions of the log-SNR in training.

Each is a quantile function that maps a uniform u in [0, 1) to a log-SNR. All densities use the same
uniform numbers, so two runs that differ only in the density are paired. Fields have the names of
the config fields that set them.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.schedule import LOGSNR_MAX, LOGSNR_MIN, SCHEDULES


@runtime_checkable
class Density(Protocol):
    """A distribution of the log-SNR; u = 0 is the least noisy value and u = 1 the noisiest."""

    def __call__(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The log-SNR at the quantiles u."""


@dataclasses.dataclass(frozen=True)
class UniformTime:
    """t uniform in [0, 1], mapped through a schedule (Appendix A). The paper's density."""

    schedule: str

    def __call__(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return SCHEDULES[self.schedule](u)


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """logit(t) ~ N(mean, std^2), where t is the time of the flow path: log-SNR = -2 logit(t).

    Esser et al. 2024 (Stable Diffusion 3), section 3.1; they use mean 0 and std 1.
    """

    density_mean: float
    density_std: float

    def __post_init__(self) -> None:
        if not self.density_std > 0.0:
            raise ValueError(f"diffusion.density_std is {self.density_std}; it must be positive")

    def __call__(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        normal = jax.scipy.special.ndtri(u.astype(jnp.float32))
        logsnr = -2.0 * (self.density_mean + self.density_std * normal)
        return jnp.clip(logsnr, LOGSNR_MIN, LOGSNR_MAX)


DENSITIES = {"uniform": UniformTime, "logit_normal": LogitNormal}
