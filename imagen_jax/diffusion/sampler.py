"""Samplers on a uniform grid of times from 1 to 0: ancestral (eq. 5) and DDIM (eq. 6), one compiled loop.

Noise comes from one key a sample, so a picture depends on its own key and conditioning, whatever else is in its batch.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from imagen_jax.diffusion import guidance, process
from imagen_jax.diffusion.conditioning import Cond
from imagen_jax.diffusion.loss import DenoiseFn
from imagen_jax.diffusion.schedule import Schedule

SAMPLERS = ("ancestral", "ddim")


def check_settings(method: str, steps: int, gamma: float, w: float, threshold: str, percentile: float) -> None:
    """Raises ValueError, naming the config field, for settings that `sample` cannot draw with."""
    for field, value, known in (("method", method, SAMPLERS), ("threshold", threshold, guidance.THRESHOLDS)):
        if value not in known:
            raise ValueError(f"sampling.{field} is {value!r}; it must be one of {known}")
    if steps < 1:
        raise ValueError(f"sampling.steps is {steps}; at least one step is needed")
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"sampling.gamma is {gamma}; it must be from 0 to 1")
    if not 0.0 < percentile <= 100.0:
        raise ValueError(f"sampling.percentile is {percentile}; it must be above 0 and at most 100")
    if not math.isfinite(w):
        raise ValueError(f"sampling.w is {w}; it must be a finite number")


def ddim_step(
    z: Float[Array, "b *d"], x: Float[Array, "b *d"], logsnr_t: Float[Array, "b"], logsnr_s: Float[Array, "b"]
) -> Float[Array, "b *d"]:
    """z_s = alpha_s x + sigma_s eps, with eps recomputed from the (guided, thresholded) x-hat (eq. 6)."""
    alpha_s, sigma_s = process.alpha_sigma(logsnr_s, z.ndim)
    return alpha_s * x + sigma_s * process.eps_from_x(x, z, logsnr_t)


def ancestral_step(
    z: Float[Array, "b *d"],
    x: Float[Array, "b *d"],
    logsnr_t: Float[Array, "b"],
    logsnr_s: Float[Array, "b"],
    noise: Float[Array, "b *d"],
    gamma: float,
) -> Float[Array, "b *d"]:
    """One step of eq. 5: mean r (alpha_s/alpha_t) z + (1 - r) alpha_s x with r = exp(lambda_t - lambda_s), plus noise.

    Its variance is (1-r) sigma_s^2 raised to 1 - gamma times (1-r) sigma_t^2 raised to gamma: gamma mixes log-variances.
    """
    alpha_t, sigma_t = process.alpha_sigma(logsnr_t, z.ndim)
    alpha_s, sigma_s = process.alpha_sigma(logsnr_s, z.ndim)
    log_r = (logsnr_t - logsnr_s).reshape(alpha_t.shape)
    r, one_minus_r = jnp.exp(log_r), -jnp.expm1(log_r)
    mean = r * (alpha_s / alpha_t) * z + one_minus_r * alpha_s * x
    return mean + jnp.sqrt(one_minus_r) * sigma_s ** (1.0 - gamma) * sigma_t**gamma * noise


def sample_noise(keys: Key[Array, "b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Standard normal noise [b, *shape], each sample from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def sample(
    denoise_fn: DenoiseFn,
    keys: Key[Array, "b"],
    shape: tuple[int, ...],
    cond: Cond,
    *,
    schedule: Schedule,
    prediction: str,
    method: str,
    steps: int,
    gamma: float,
    w: float,
    threshold: str,
    percentile: float,
) -> Float[Array, "b ..."]:
    """Draws x [b, *shape] from `denoise_fn` with guidance weight `w`; at the last step x-hat is returned without noise.

    gamma is used by the ancestral sampler alone. Raises ValueError as `check_settings` does.
    """
    check_settings(method, steps, gamma, w, threshold, percentile)
    guided = guidance.guide(denoise_fn, w)
    init_keys, step_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    grid = schedule(jnp.linspace(1.0, 0.0, steps + 1))

    def predict_x(z, logsnr):
        x = process.x_from_output(prediction, guided(z, logsnr, cond), z, logsnr)
        return guidance.threshold(x, threshold, percentile)

    def step(i, z):
        logsnr_t, logsnr_s = jnp.full(keys.shape, grid[i]), jnp.full(keys.shape, grid[i + 1])
        x = predict_x(z, logsnr_t)
        if method == "ddim":
            return ddim_step(z, x, logsnr_t, logsnr_s)
        noise = sample_noise(jax.vmap(jax.random.fold_in, (0, None))(step_keys, i), shape)
        return ancestral_step(z, x, logsnr_t, logsnr_s, noise, gamma)

    z = jax.lax.fori_loop(0, steps - 1, step, sample_noise(init_keys, shape))
    return predict_x(z, jnp.full(keys.shape, grid[steps - 1]))
