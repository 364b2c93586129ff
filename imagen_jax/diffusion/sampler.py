"""Samplers, and the compiled loop that runs any of them on any grid of noise levels.

A sampler may carry state in addition to z. `init` creates the carry, and `step` goes from one noise
level to the next. The sample is x-hat at the last level. Each image has its own PRNG key, so it
depends on that key and on its conditioning, but not on the rest of the batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from imagen_jax.diffusion.conditioning import Cond
from imagen_jax.diffusion.guidance import Guidance, Threshold, guide
from imagen_jax.diffusion.loss import DenoiseFn
from imagen_jax.diffusion.process import Process

Carry = Any
Predict = Callable[[Float[Array, "b *d"], Float[Array, "b"]], Float[Array, "b *d"]]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the loop, from log-SNR `logsnr_t` to `logsnr_s`, both [b], logsnr_s > logsnr_t.

    `noise()` returns the standard normal noise [b *d] of this step.
    """

    logsnr_t: Float[Array, "b"]
    logsnr_s: Float[Array, "b"]
    noise: Callable[[], Float[Array, "b *d"]]


class Sampler:
    """The interface of a sampler. `predict(z, logsnr)` returns x-hat, guided and thresholded."""

    def init(self, z: Float[Array, "b *d"]) -> Carry:
        """The carry before the first step."""
        return ()

    def step(
        self, process: Process, predict: Predict, z: Float[Array, "b *d"], carry: Carry, at: Step
    ) -> tuple[Float[Array, "b *d"], Carry]:
        """Returns z at `at.logsnr_s` and the carry of the next step."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM (Song et al. 2021; eq. 6): deterministic, first order."""

    def step(
        self, process: Process, predict: Predict, z: Float[Array, "b *d"], carry: Carry, at: Step
    ) -> tuple[Float[Array, "b *d"], Carry]:
        return ddim_step(process, z, predict(z, at.logsnr_t), at.logsnr_t, at.logsnr_s), carry


@dataclasses.dataclass(frozen=True)
class Ancestral(Sampler):
    """The ancestral sampler (eq. 5): stochastic.

    `gamma` in [0, 1] interpolates the log variance from its lower (0) to its upper bound (1).
    """

    gamma: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"sampling.gamma is {self.gamma}; it must be from 0 to 1")

    def step(
        self, process: Process, predict: Predict, z: Float[Array, "b *d"], carry: Carry, at: Step
    ) -> tuple[Float[Array, "b *d"], Carry]:
        x = predict(z, at.logsnr_t)
        z = ancestral_step(process, z, x, at.logsnr_t, at.logsnr_s, at.noise(), self.gamma)
        return z, carry


@dataclasses.dataclass(frozen=True)
class DPMSolver2M(Sampler):
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order.

    With r = h_before / h it replaces x-hat of a DDIM step by x + (x - x_before) / (2 r). It
    evaluates the network once per step. The carry holds x-hat [b *d] and the step size h [b] of
    the previous step, h in log(alpha / sigma). The first step is a DDIM step: its previous h is
    infinite, which makes the slope 0.
    """

    def init(self, z: Float[Array, "b *d"]) -> Carry:
        return jnp.zeros_like(z), jnp.full(z.shape[0], jnp.inf, z.dtype)

    def step(
        self, process: Process, predict: Predict, z: Float[Array, "b *d"], carry: Carry, at: Step
    ) -> tuple[Float[Array, "b *d"], Carry]:
        x_before, h_before = carry
        x, h = predict(z, at.logsnr_t), 0.5 * (at.logsnr_s - at.logsnr_t)
        slope = (0.5 * h / h_before).reshape(h.shape + (1,) * (z.ndim - 1))
        extrapolated = x + slope * (x - x_before)
        return ddim_step(process, z, extrapolated, at.logsnr_t, at.logsnr_s), (x, h)


SAMPLERS = {"ancestral": Ancestral, "ddim": DDIM, "dpmpp_2m": DPMSolver2M}


def ddim_step(
    process: Process,
    z: Float[Array, "b *d"],
    x: Float[Array, "b *d"],
    logsnr_t: Float[Array, "b"],
    logsnr_s: Float[Array, "b"],
) -> Float[Array, "b *d"]:
    """z_s = alpha_s x + sigma_s eps (eq. 6), where eps is the noise consistent with x and z.

    x: guided and thresholded x-hat at z.
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
    """One step of the ancestral sampler (eq. 5). With r = exp(lambda_t - lambda_s):

    mean       r (alpha_s / alpha_t) z + (1 - r) alpha_s x
    variance   ((1 - r) sigma_s^2)^(1 - gamma) ((1 - r) sigma_t^2)^gamma
    """
    alpha_t, sigma_t = process.alpha_sigma(logsnr_t, z.ndim)
    alpha_s, sigma_s = process.alpha_sigma(logsnr_s, z.ndim)
    log_r = (logsnr_t - logsnr_s).reshape(alpha_t.shape)
    r, one_minus_r = jnp.exp(log_r), -jnp.expm1(log_r)
    mean = r * (alpha_s / alpha_t) * z + one_minus_r * alpha_s * x
    return mean + jnp.sqrt(one_minus_r) * sigma_s ** (1.0 - gamma) * sigma_t**gamma * noise


def sample_noise(keys: Key[Array, "b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Standard normal noise [b, *shape], with one key per sample."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def integrate(
    sampler: Sampler,
    process: Process,
    predict: Predict,
    z: Float[Array, "b *d"],
    keys: Key[Array, "b"],
    levels: Float[Array, "n"],
) -> Float[Array, "b *d"]:
    """Runs the sampler from z at the first of `levels` and returns z at the last one.

    z: noise, or an image with the noise of levels[0].
    """

    def step(
        i: Int[Array, ""], state: tuple[Float[Array, "b *d"], Carry]
    ) -> tuple[Float[Array, "b *d"], Carry]:
        z, carry = state
        noise = lambda: sample_noise(jax.vmap(jax.random.fold_in, (0, None))(keys, i), z.shape[1:])
        t, s = jnp.full(keys.shape, levels[i]), jnp.full(keys.shape, levels[i + 1])
        return sampler.step(process, predict, z, carry, Step(t, s, noise))

    return jax.lax.fori_loop(0, levels.shape[0] - 1, step, (z, sampler.init(z)))[0]


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
    prepare: Callable[[Cond], Cond] = lambda cond: cond,
) -> Float[Array, "b ..."]:
    """Draws images x [b, *shape] from noise, with one (guided) network evaluation per level.

    Args:
        denoise_fn: the network.
        keys: one PRNG key per image.
        shape: [h w c] of an image.
        cond: conditioning of the batch.
        process: forward process and prediction.
        levels: log-SNRs [n], ascending.
        sampler: the sampling algorithm.
        guidance, threshold: applied at every evaluation.
        prepare: computes the network's values of `cond` once, before the loop (see `guide`).
    """
    guided = guide(denoise_fn, guidance, cond, prepare)
    init_keys, step_keys = jax.vmap(jax.random.split, out_axes=1)(keys)

    def predict(z: Float[Array, "b *d"], logsnr: Float[Array, "b"]) -> Float[Array, "b *d"]:
        return threshold(process.x_from_output(guided(z, logsnr), z, logsnr))

    logsnr_at = lambda i: jnp.full(keys.shape, levels[i])
    z = process.prior(sample_noise(init_keys, shape), logsnr_at(0))
    z = integrate(sampler, process, predict, z, step_keys, levels)
    return predict(z, logsnr_at(-1))
