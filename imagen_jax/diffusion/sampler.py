"""Samplers, and the one compiled loop that runs any of them along any grid of noise levels.

A sampler owns a carry besides z: `init` makes it, `step` goes from one noise level to the next,
`finish` returns x. Noise comes from one key a sample, so a picture depends on its own key and
conditioning, whatever else is in its batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from imagen_jax.diffusion.conditioning import Cond
from imagen_jax.diffusion.guidance import Guidance, Threshold, guide
from imagen_jax.diffusion.loss import DenoiseFn
from imagen_jax.diffusion.process import Process

Carry = Any
Predict = Callable[[Float[Array, "b *d"], Float[Array, "b"]], Float[Array, "b *d"]]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the loop: from log-SNR `t` to log-SNR `s`, both [b], s > t.

    `noise()` draws fresh standard normal noise, shaped like z.
    """

    t: Float[Array, "b"]
    s: Float[Array, "b"]
    noise: Callable[[], Array]


class Sampler:
    """What a sampler may define; `process` and `predict`, which gives x-hat, come from
    the caller.
    """

    def init(self, z: Float[Array, "b *d"]) -> Carry:
        """What is carried beside z, before the first step."""
        return ()

    def step(
        self, process: Process, predict: Predict, z: Float[Array, "b *d"], carry: Carry, at: Step
    ) -> tuple[Float[Array, "b *d"], Carry]:
        """(z at `at.s`, the carry for the next step)."""
        raise NotImplementedError

    def finish(
        self, predict: Predict, z: Float[Array, "b *d"], carry: Carry, logsnr: Float[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """x from the last z: x-hat, without noise."""
        return predict(z, logsnr)


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    """Deterministic (eq. 6; Song et al. 2021), first order."""

    def step(
        self, process: Process, predict: Predict, z: Array, carry: Carry, at: Step
    ) -> tuple[Array, Carry]:
        return ddim_step(process, z, predict(z, at.t), at.t, at.s), carry


@dataclasses.dataclass(frozen=True)
class Ancestral(Sampler):
    """Stochastic (eq. 5); `gamma` mixes the logarithms of the two variances."""

    gamma: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"sampling.gamma is {self.gamma}; it must be from 0 to 1")

    def step(
        self, process: Process, predict: Predict, z: Array, carry: Carry, at: Step
    ) -> tuple[Array, Carry]:
        x = predict(z, at.t)
        return ancestral_step(process, z, x, at.t, at.s, at.noise(), self.gamma), carry


@dataclasses.dataclass(frozen=True)
class DPMSolver2M(Sampler):
    """DPM-Solver++ 2M (Lu et al. 2022, 2211.01095, algorithm 2): second order, one evaluation a
    step.

    Carries x-hat of the step before and the width of that step in log(alpha / sigma). The first
    step is first-order.
    """

    def init(self, z: Array) -> Carry:
        return jnp.zeros_like(z), jnp.full(z.shape[0], jnp.inf, z.dtype)

    def step(
        self, process: Process, predict: Predict, z: Array, carry: Carry, at: Step
    ) -> tuple[Array, Carry]:
        x_before, h_before = carry
        x, h = predict(z, at.t), 0.5 * (at.s - at.t)
        slope = (0.5 * h / h_before).reshape(h.shape + (1,) * (z.ndim - 1))
        extrapolated = x + slope * (x - x_before)
        return ddim_step(process, z, extrapolated, at.t, at.s), (x, h)


SAMPLERS = {"ancestral": Ancestral, "ddim": DDIM, "dpmpp_2m": DPMSolver2M}


def ddim_step(
    process: Process,
    z: Float[Array, "b *d"],
    x: Float[Array, "b *d"],
    logsnr_t: Float[Array, "b"],
    logsnr_s: Float[Array, "b"],
) -> Float[Array, "b *d"]:
    """z_s = alpha_s x + sigma_s eps, eps recomputed from the (guided, thresholded) x-hat
    (eq. 6).
    """
    alpha_s, sigma_s = process.alpha_sigma(logsnr_s, z.ndim)
    return alpha_s * x + sigma_s * process.eps_from_x(x, z, logsnr_t)


def ancestral_step(
    process: Process,
    z: Float[Array, "b *d"],
    x: Float[Array, "b *d"],
    logsnr_t: Float[Array, "b"],
    logsnr_s: Float[Array, "b"],
    noise: Float[Array, "b *d"],
    gamma: float,
) -> Float[Array, "b *d"]:
    """One step of eq. 5: mean r (alpha_s/alpha_t) z + (1 - r) alpha_s x, r = exp(lambda_t -
    lambda_s), plus noise.

    Its variance is (1-r) sigma_s^2 raised to 1 - gamma times (1-r) sigma_t^2 raised to gamma.
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


def integrate(
    sampler: Sampler,
    process: Process,
    predict: Predict,
    z: Float[Array, "b *d"],
    keys: Key[Array, "b"],
    levels: Float[Array, "n"],
) -> tuple[Float[Array, "b *d"], Carry]:
    """(z, carry) at the last of `levels`, from z at the first: noise, or a noised image."""

    def step(i: Array, state: tuple[Array, Carry]) -> tuple[Array, Carry]:
        z, carry = state
        noise = lambda: sample_noise(jax.vmap(jax.random.fold_in, (0, None))(keys, i), z.shape[1:])
        t, s = jnp.full(keys.shape, levels[i]), jnp.full(keys.shape, levels[i + 1])
        return sampler.step(process, predict, z, carry, Step(t, s, noise))

    return jax.lax.fori_loop(0, levels.shape[0] - 1, step, (z, sampler.init(z)))


def sample(
    denoise_fn: DenoiseFn,
    keys: Key[Array, "b"],
    shape: tuple[int, ...],
    cond: Cond,
    *,
    process: Process,
    levels: Float[Array, "n"],
    sampler: Sampler,
    guidance: Guidance,
    threshold: Threshold,
) -> Float[Array, "b ..."]:
    """Draws x [b, *shape] from noise; the network is evaluated at each of `levels`."""
    guided = guide(denoise_fn, guidance)
    init_keys, step_keys = jax.vmap(jax.random.split, out_axes=1)(keys)

    def predict(z: Array, logsnr: Array) -> Array:
        return threshold(process.x_from_output(guided(z, logsnr, cond), z, logsnr))

    at = lambda i: jnp.full(keys.shape, levels[i])
    z = process.prior(sample_noise(init_keys, shape), at(0))
    z, carry = integrate(sampler, process, predict, z, step_keys, levels)
    return sampler.finish(predict, z, carry, at(-1))
