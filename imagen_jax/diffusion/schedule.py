"""Noise schedules: log-SNR as a decreasing function of time t in [0, 1] (Appendix A, F.1-F.3)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

LOGSNR_MIN, LOGSNR_MAX = -20.0, 20.0


def cosine(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The cosine schedule of the 64x64 and 64->256 stages (F.1, F.2), clipped to [-20, 20].

        lambda = -2 log tan(a t + b), with a and b such that lambda(0) = 20 and lambda(1) = -20

    The paper prints no formula; this is the form in Salimans & Ho 2022, by the same group.
    """
    b = jnp.arctan(jnp.exp(-0.5 * LOGSNR_MAX))
    a = jnp.arctan(jnp.exp(-0.5 * LOGSNR_MIN)) - b
    logsnr = -2.0 * jnp.log(jnp.tan(a * t.astype(jnp.float32) + b))
    # In fp32, tan near pi/2 overshoots the end by a few units in the last place.
    return jnp.clip(logsnr, LOGSNR_MIN, LOGSNR_MAX)


def linear(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The linear schedule of the 256->1024 stage (F.3), in continuous time.

    It is the limit of the 1000-step schedule with beta from 1e-4 to 0.02 (Ho et al. 2020): beta(t)
    = 0.1 + 19.9 t, hence -log alpha_t^2 = 0.1 t + 9.95 t^2 and lambda = -log(expm1(0.1 t + 9.95
    t^2)).
    """
    t = t.astype(jnp.float32)
    integral = 0.1 * t + 9.95 * t**2
    return jnp.clip(-jnp.log(jnp.maximum(jnp.expm1(integral), 1e-30)), LOGSNR_MIN, LOGSNR_MAX)


def flow(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The time of the flow path, alpha = 1 - t and sigma = t: lambda = 2 log((1 - t) / t).

    Lipman et al. 2023, the conditional optimal-transport path.
    """
    t = t.astype(jnp.float32)
    tiny = jnp.exp(0.5 * LOGSNR_MIN)  # keeps both logarithms finite; the ends are clipped below
    logsnr = 2.0 * (jnp.log(jnp.maximum(1.0 - t, tiny)) - jnp.log(jnp.maximum(t, tiny)))
    return jnp.clip(logsnr, LOGSNR_MIN, LOGSNR_MAX)


Schedule = Callable[[Float[Array, "*n"]], Float[Array, "*n"]]
SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "linear": linear, "flow": flow}
