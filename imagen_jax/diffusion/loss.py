"""The training loss: squared error of the prediction, t uniform (eq. 1; Appendix A).

All randomness of a step is drawn first, for the whole batch (`draw`), and the loss is a deterministic function of it:
gradient accumulation and another mesh then see the same numbers, and an evaluation can fix t.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from imagen_jax.diffusion import conditioning, process
from imagen_jax.diffusion.schedule import Schedule

DenoiseFn = Callable[[Float[Array, "b *d"], Float[Array, "b"], conditioning.Cond], Float[Array, "b *d"]]


def draw(key: Key[Array, ""], x_shape: tuple[int, ...], lowres_shape: tuple[int, ...] | None, text_drop: float, aug_max: float = 1.0) -> dict[str, Array]:
    """The random numbers of one step: t, eps, whether text is dropped and, in super-resolution, level and noise of the low-res image.

    Each is per sample. `lowres_shape` is None in a base stage; `aug_max` is 1, or 0 for training without augmentation (D.2).
    """
    t_key, eps_key, drop_key, level_key, lowres_key = jax.random.split(key, 5)
    b = x_shape[0]
    draws = {
        "t": jax.random.uniform(t_key, (b,)),
        "eps": jax.random.normal(eps_key, x_shape),
        "drop": jax.random.uniform(drop_key, (b,)) < text_drop,
    }
    if lowres_shape is not None:
        draws["lowres_level"] = jax.random.uniform(level_key, (b,), maxval=aug_max)
        draws["lowres_eps"] = jax.random.normal(lowres_key, lowres_shape)
    return draws


def per_sample_loss(
    denoise_fn: DenoiseFn,
    x: Float[Array, "b *d"],
    cond: conditioning.Cond,
    draws: dict[str, Array],
    schedule: Schedule,
    aug_schedule: Schedule,
    prediction: str,
) -> Float[Array, "b"]:
    """Mean squared error over pixels and channels of each sample, in fp32. `cond["lowres"]` comes clean and is noised here."""
    cond = conditioning.drop_text(cond, draws["drop"])
    if "lowres" in cond:
        cond = conditioning.augment_lowres(cond, draws["lowres_eps"], draws["lowres_level"], aug_schedule)
    logsnr = schedule(draws["t"])
    z = process.diffuse(x, draws["eps"], logsnr)
    error = denoise_fn(z, logsnr, cond).astype(jnp.float32) - process.target(prediction, x, draws["eps"], logsnr)
    return jnp.mean(jnp.square(error), axis=tuple(range(1, x.ndim)))
