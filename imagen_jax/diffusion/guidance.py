"""Classifier-free guidance (eq. 2) and thresholding of x-hat (section 2.3).

Thresholding makes large guidance weights usable.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from imagen_jax.diffusion.conditioning import Cond, null_text
from imagen_jax.diffusion.loss import DenoiseFn
from imagen_jax.diffusion.schedule import LOGSNR_MAX, LOGSNR_MIN
from imagen_jax.text_inputs import is_text

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


def guide(
    denoise_fn: DenoiseFn,
    guidance: Guidance,
    cond: Cond,
    prepare: Callable[[Cond], Cond] = lambda cond: cond,
) -> Callable[[Float[Array, "b *d"], Float[Array, "b"]], Float[Array, "b *d"]]:
    """Returns (z, logsnr) -> the guided output of `denoise_fn` for `cond`.

    The conditional and the unconditional evaluation run as one batch of twice the size, in which
    the two rows of a sample are neighbours: a device that holds a shard of the rows then holds both
    of them, and the doubled batch needs no communication. Without text, with w = 1, or when no
    sample is in the interval, there is only the conditional evaluation.

    prepare: adds values that depend on `cond` alone, one row per sample; it runs once, here, and
        not at every evaluation.
    """
    # Without text both evaluations would be equal, and the weights sum to 1.
    if guidance.w == 1.0 or not any(map(is_text, cond)):
        prepared = prepare(cond)
        return lambda z, logsnr: denoise_fn(z, logsnr, prepared)
    twice = prepare(jax.tree.map(interleave, cond, null_text(cond)))

    def both(z: Float[Array, "b *d"], logsnr: Float[Array, "b"]) -> Float[Array, "b *d"]:
        output = denoise_fn(interleave(z, z), interleave(logsnr, logsnr), twice)
        output = output.astype(jnp.float32).reshape(z.shape[0], 2, *z.shape[1:])
        return guidance.combine(output[:, 0], output[:, 1], logsnr)

    if guidance.everywhere:
        return both
    conditional = jax.tree.map(lambda rows: rows[::2], twice)

    def one(z: Float[Array, "b *d"], logsnr: Float[Array, "b"]) -> Float[Array, "b *d"]:
        return denoise_fn(z, logsnr, conditional).astype(jnp.float32)

    inside = lambda logsnr: jnp.any(guidance.inside(logsnr))
    return lambda z, logsnr: jax.lax.cond(inside(logsnr), both, one, z, logsnr)


def interleave(a: Shaped[Array, "b *d"], b: Shaped[Array, "b *d"]) -> Shaped[Array, "b2 *d"]:
    """The rows a0 b0 a1 b1 ... [2b *d]."""
    return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


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
