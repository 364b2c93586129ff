"""Classifier-free guidance (eq. 2) and thresholding of x-hat (section 2.3).

Thresholding makes large guidance weights usable.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imagen_jax.diffusion.conditioning import Cond, null_text
from imagen_jax.diffusion.loss import DenoiseFn
from imagen_jax.diffusion.schedule import LOGSNR_MAX, LOGSNR_MIN

FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Combines a conditional and an unconditional network output.

        eps~ = w eps(z, cond) + (1 - w) eps(z, null)     (eq. 2)

    w = 1 means no guidance. The weights sum to one, and x, v and u are affine in eps at fixed z, so
    the same combination applies to every prediction. Where `logsnr` is outside `w_interval` (first
    <= logsnr < last), w is 1 (Kynkäänniemi et al. 2024). Fields have the names of the config
    fields.
    """

    w: float
    w_interval: tuple[float, float]

    def __post_init__(self) -> None:
        if not abs(self.w) <= FLOAT32_MAX:
            raise ValueError(f"sampling.w is {self.w}; it must be finite in fp32")
        if not self.w_interval[0] < self.w_interval[1]:
            message = f"sampling.w_interval is {self.w_interval}; it must be two ascending log-SNRs"
            raise ValueError(message)

    @property
    def everywhere(self) -> bool:
        """Whether the interval contains every log-SNR of all schedules, densities and grids."""
        first, last = self.w_interval
        return first <= LOGSNR_MIN and last >= LOGSNR_MAX

    def inside(self, logsnr: Float[Array, "b"]) -> Bool[Array, "b"]:
        """Whether each sample's log-SNR lies in the interval."""
        return (self.w_interval[0] <= logsnr) & (logsnr < self.w_interval[1])

    def combine(
        self,
        conditional: Float[Array, "b *d"],
        unconditional: Float[Array, "b *d"],
        logsnr: Float[Array, "b"],
    ) -> Float[Array, "b *d"]:
        """The guided output, in fp32."""
        w = self.w
        if not self.everywhere:
            shape = logsnr.shape + (1,) * (conditional.ndim - 1)
            w = jnp.where(self.inside(logsnr), self.w, 1.0).reshape(shape)
        return w * conditional + (1.0 - w) * unconditional


def guide(denoise_fn: DenoiseFn, guidance: Guidance) -> DenoiseFn:
    """Wraps a denoise_fn with guidance.

    The conditional and the unconditional evaluation run as one batch of twice the size. Without
    text, with w = 1, or when no sample is in the interval, there is only the conditional
    evaluation.
    """
    if guidance.w == 1.0:
        return denoise_fn

    def both(
        z: Float[Array, "b *d"], logsnr: Float[Array, "b"], cond: Cond
    ) -> Float[Array, "b *d"]:
        twice = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, null_text(cond))
        output = denoise_fn(jnp.concatenate([z, z]), jnp.concatenate([logsnr, logsnr]), twice)
        return guidance.combine(*jnp.split(output.astype(jnp.float32), 2), logsnr)

    def one(z: Float[Array, "b *d"], logsnr: Float[Array, "b"], cond: Cond) -> Float[Array, "b *d"]:
        return denoise_fn(z, logsnr, cond).astype(jnp.float32)

    def guided(
        z: Float[Array, "b *d"], logsnr: Float[Array, "b"], cond: Cond
    ) -> Float[Array, "b *d"]:
        if "text" not in cond:  # both evaluations would be equal, and the weights sum to 1
            return denoise_fn(z, logsnr, cond)
        if guidance.everywhere:
            return both(z, logsnr, cond)
        return jax.lax.cond(jnp.any(guidance.inside(logsnr)), both, one, z, logsnr, cond)

    return guided


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Keeps x-hat in range after guidance (section 2.3, Fig. A.31).

        none      x
        static    clip(x, -1, 1)
        dynamic   clip(x, -s, s) / s, with s = max(1, percentile of |x|), for each sample

    Fields have the names of the config fields that set them.
    """

    threshold: str
    percentile: float

    def __post_init__(self) -> None:
        if not 0.0 < self.percentile <= 100.0:
            message = (
                f"sampling.percentile is {self.percentile}; it must be above 0 and at most 100"
            )
            raise ValueError(message)

    def __call__(self, x: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
        """The thresholded x-hat."""
        return THRESHOLDS[self.threshold](x, self.percentile)


def _dynamic(x: Float[Array, "b *d"], percentile: float) -> Float[Array, "b *d"]:
    axes = tuple(range(1, x.ndim))
    s = jnp.percentile(jnp.abs(x), percentile, axis=axes, keepdims=True)
    s = jnp.maximum(s, 1.0)
    return jnp.clip(x, -s, s) / s


THRESHOLDS = {
    "none": lambda x, percentile: x,
    "static": lambda x, percentile: jnp.clip(x, -1.0, 1.0),
    "dynamic": _dynamic,
}
