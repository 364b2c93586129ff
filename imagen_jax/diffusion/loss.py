"""The training loss: squared error of the network's prediction (eq. 1; Appendix A).

`draw` draws all random numbers of a step for the whole batch, and the loss is a deterministic
function of them. Gradient accumulation and other meshes therefore use the same numbers, and an
evaluation can fix the noise level.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, Shaped

from imagen_jax.diffusion import conditioning
from imagen_jax.diffusion.process import Process
from imagen_jax.diffusion.schedule import Schedule
from imagen_jax.diffusion.weighting import Weight
from imagen_jax.text_inputs import DROP, encoder_names, field_name

Draws = PyTree[Shaped[Array, "b ..."]]  # the dict that `draw` returns
DenoiseFn = Callable[
    [Float[Array, "b *d"], Float[Array, "b"], conditioning.Cond], Float[Array, "b *d"]
]


def draw(
    key: Key[Array, ""],
    x_shape: tuple[int, ...],
    lowres_shape: tuple[int, ...] | None,
    text_drop: float,
    aug_max: float = 1.0,
    input_drops: Mapping[str, float] | None = None,
) -> Draws:
    """The random numbers of one step, independent for each sample.

    Args:
        key: PRNG key of the step.
        x_shape: [b h w c].
        lowres_shape: [b h' w' 3], or None in a base stage.
        text_drop: probability of dropping the text.
        aug_max: largest augmentation level: 1, or 0 for training without augmentation (D.2).
        input_drops: {text encoder: probability of dropping its features alone}.

    Returns a dict with

        u              [b]            uniform in [0, 1); a `Density` maps it to a log-SNR
        eps            x_shape        noise of x
        drop           [b]            whether the text is dropped
        drop.NAME      [b]            whether the features of this text encoder are dropped
        lowres_level   [b]            augmentation level (super-resolution only)
        lowres_eps     lowres_shape   noise of the low-res image (super-resolution only)
    """
    u_key, eps_key, drop_key, level_key, lowres_key = jax.random.split(key, 5)
    b = x_shape[0]
    draws = {
        "u": jax.random.uniform(u_key, (b,)),
        "eps": jax.random.normal(eps_key, x_shape),
        DROP: jax.random.uniform(drop_key, (b,)) < text_drop,
    }
    for i, (name, probability) in enumerate(sorted((input_drops or {}).items())):
        input_key = jax.random.fold_in(drop_key, i)
        draws[field_name(DROP, name)] = jax.random.uniform(input_key, (b,)) < probability
    if lowres_shape is not None:
        draws["lowres_level"] = jax.random.uniform(level_key, (b,), maxval=aug_max)
        draws["lowres_eps"] = jax.random.normal(lowres_key, lowres_shape)
    return draws


def noised(
    x: Float[Array, "b *d"],
    cond: conditioning.Cond,
    draws: Draws,
    logsnr: Float[Array, "b"],
    process: Process,
    aug_schedule: Schedule,
) -> tuple[Float[Array, "b *d"], conditioning.Cond]:
    """The inputs (z, cond) of the network.

    z is x noised to `logsnr`, text is dropped where drawn, and cond["lowres"] is noised
    (`augment_lowres`).
    """
    cond = conditioning.drop_text(cond, draws[DROP])
    for name in encoder_names(cond):
        if name and field_name(DROP, name) in draws:
            cond = conditioning.drop_input(cond, name, draws[field_name(DROP, name)])
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
    """Mean squared error of the output over pixels and channels [b], in fp32 (eq. 1).

    With a weight w the result is multiplied by w(logsnr) / output_scale(logsnr), see `weighting`.
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
    """mean((clip(x-hat, -1, 1) - x)^2) of each sample [b]; x-hat is clipped as in sampling.

    The unit does not depend on what the network predicts, so stages with different predictions,
    densities or weights can be compared.
    """
    x_hat = jnp.clip(process.x_from_output(output, z, logsnr), -1.0, 1.0)
    return jnp.mean(jnp.square(x_hat - x), axis=tuple(range(1, x.ndim)))
