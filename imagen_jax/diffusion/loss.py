"""The training loss: squared error of the prediction (eq. 1; Appendix A).

All randomness of a step is drawn first, for the whole batch (`draw`), and the loss is a
deterministic function of it: gradient accumulation and another mesh then see the same numbers, and
an evaluation can fix the noise level.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from imagen_jax.diffusion import conditioning
from imagen_jax.diffusion.process import Process
from imagen_jax.diffusion.schedule import Schedule
from imagen_jax.diffusion.weighting import Weight

DenoiseFn = Callable[
    [Float[Array, "b *d"], Float[Array, "b"], conditioning.Cond], Float[Array, "b *d"]
]


def draw(
    key: Key[Array, ""],
    x_shape: tuple[int, ...],
    lowres_shape: tuple[int, ...] | None,
    text_drop: float,
    aug_max: float = 1.0,
) -> dict[str, Array]:
    """The random numbers of one step, each per sample.

    u: uniform, mapped to log-SNR by the `Density`; eps; drop: whether text is dropped; in
    super-resolution the level and the noise of the low-res image. `lowres_shape` is None in a base
    stage; `aug_max` is 1, or 0 for training without augmentation (D.2).
    """
    u_key, eps_key, drop_key, level_key, lowres_key = jax.random.split(key, 5)
    b = x_shape[0]
    draws = {
        "u": jax.random.uniform(u_key, (b,)),
        "eps": jax.random.normal(eps_key, x_shape),
        "drop": jax.random.uniform(drop_key, (b,)) < text_drop,
    }
    if lowres_shape is not None:
        draws["lowres_level"] = jax.random.uniform(level_key, (b,), maxval=aug_max)
        draws["lowres_eps"] = jax.random.normal(lowres_key, lowres_shape)
    return draws


def noised(
    x: Float[Array, "b *d"],
    cond: conditioning.Cond,
    draws: dict[str, Array],
    logsnr: Float[Array, "b"],
    process: Process,
    aug_schedule: Schedule,
) -> tuple[Float[Array, "b *d"], conditioning.Cond]:
    """(z, cond) as the network sees them: z at `logsnr`, text dropped, `cond["lowres"]` noised."""
    cond = conditioning.drop_text(cond, draws["drop"])
    if "lowres" in cond:
        level, eps = draws["lowres_level"], draws["lowres_eps"]
        cond = conditioning.augment_lowres(cond, eps, level, aug_schedule)
    return process.diffuse(x, draws["eps"], logsnr), cond


def per_sample_loss(
    output: Float[Array, "b *d"],
    x: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    logsnr: Float[Array, "b"],
    process: Process,
    weight: Weight | None = None,
) -> Float[Array, "b"]:
    """Mean squared error of the network's output over pixels and channels, in fp32, times its
    weight if any.
    """
    error = output.astype(jnp.float32) - process.target(x, eps, logsnr)
    squared = jnp.mean(jnp.square(error), axis=tuple(range(1, x.ndim)))
    return squared if weight is None else squared * weight(logsnr) / process.output_scale(logsnr)


def x_error(
    output: Float[Array, "b *d"],
    z: Float[Array, "b *d"],
    x: Float[Array, "b *d"],
    logsnr: Float[Array, "b"],
    process: Process,
) -> Float[Array, "b"]:
    """Mean squared error of x-hat of each sample, x-hat clipped to [-1, 1] as samplers do.

    The same unit whatever the network outputs, so stages of other predictions, densities and
    weights can be compared by it.
    """
    x_hat = jnp.clip(process.x_from_output(output, z, logsnr), -1.0, 1.0)
    return jnp.mean(jnp.square(x_hat - x), axis=tuple(range(1, x.ndim)))
