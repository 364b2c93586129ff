"""How log-SNR is distributed in training, as a quantile function: uniform u in [0, 1) -> log-SNR.

Every density reads the same uniform numbers, so that two trainings that differ in it are paired.
The fields of a density are those of the config.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.schedule import LOGSNR_MAX, LOGSNR_MIN, SCHEDULES


@runtime_checkable
class Density(Protocol):
    """A distribution of log-SNR, from its least noisy (u = 0) to its noisiest value (u = 1)."""

    def __call__(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The log-SNR at these quantiles of noise."""


@dataclasses.dataclass(frozen=True)
class UniformTime:
    """t uniform in [0, 1], through a schedule (Appendix A): the paper's choice."""

    schedule: str

    def __call__(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return SCHEDULES[self.schedule](u)


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """logit(t) ~ N(mean, std^2) with t the noise time of the flow path, so log-SNR = -2 logit(t).

    Esser et al. 2024 (Stable Diffusion 3), section 3.1: mean 0, std 1.
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
