"""Noise schedules: log-SNR as a function of continuous time t in [0, 1], decreasing (Appendix A,
F.1-F.3).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

LOGSNR_MIN, LOGSNR_MAX = -20.0, 20.0


def cosine(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Cosine schedule with its ends at +-20: lambda = -2 log tan(a t + b), used by the 64 and
    64->256 stages (F.1, F.2).

    The paper prints no formula; this is the form of the continuous-time code of its authors' group
    (Salimans & Ho 2022).
    """
    b = jnp.arctan(jnp.exp(-0.5 * LOGSNR_MAX))
    a = jnp.arctan(jnp.exp(-0.5 * LOGSNR_MIN)) - b
    logsnr = -2.0 * jnp.log(jnp.tan(a * t.astype(jnp.float32) + b))
    return jnp.clip(
        logsnr, LOGSNR_MIN, LOGSNR_MAX
    )  # fp32 tan near pi/2 overshoots the end by a few units in the last place


def linear(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The 1000-step linear beta schedule 1e-4 .. 0.02 in continuous time, used by the 256->1024
    stage (F.3).

    beta(t) = 0.1 + 19.9 t, so -log alpha_t^2 = 0.1 t + 9.95 t^2 and lambda = -log(expm1(0.1 t +
    9.95 t^2)).
    """
    t = t.astype(jnp.float32)
    integral = 0.1 * t + 9.95 * t**2
    return jnp.clip(-jnp.log(jnp.maximum(jnp.expm1(integral), 1e-30)), LOGSNR_MIN, LOGSNR_MAX)


def flow(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Time of the flow path, alpha = 1 - t and sigma = t: lambda = 2 log((1 - t) / t)."""
    t = t.astype(jnp.float32)
    tiny = jnp.exp(0.5 * LOGSNR_MIN)  # keeps both logarithms finite; the ends are clipped anyway
    logsnr = 2.0 * (jnp.log(jnp.maximum(1.0 - t, tiny)) - jnp.log(jnp.maximum(t, tiny)))
    return jnp.clip(logsnr, LOGSNR_MIN, LOGSNR_MAX)


Schedule = Callable[[Float[Array, "*n"]], Float[Array, "*n"]]
SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "linear": linear, "flow": flow}
