"""Conditioning of the network: text, which is sometimes dropped, and a noised low-res image.

`cond` is a dict with

    text            [b l d]       token features
    text_mask       [b l]         True for valid tokens
    text.NAME, text_mask.NAME, pooled.NAME [b e]   instead, with several text encoders
    lowres          [b h' w' 3]   in [-1, 1], super-resolution only
    lowres_logsnr   [b]           noise level of `lowres`, super-resolution only

A model without text has neither text nor text_mask.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from imagen_jax.diffusion.process import GaussianProcess
from imagen_jax.diffusion.schedule import Schedule
from imagen_jax.text_inputs import KINDS, MASK, encoder_names, field_name, is_text

Cond = PyTree[Shaped[Array, "b ..."]]  # a dict; PyTree checks the rows of every entry
# The process that noises the low-res image, whatever process the stage itself uses.
VARIANCE_PRESERVING = GaussianProcess("vp", "eps")


def drop_text(cond: Cond, drop: Bool[Array, "b"]) -> Cond:
    """Replaces the text by the null text where `drop` is True, for all text encoders.

    The null text has zero features (section 4.1) and a mask that is True at the first position
    only. No mask is empty, so attention stays finite, and the result does not depend on the length
    of the dropped caption.
    """
    for name in encoder_names(cond):
        cond = drop_input(cond, name, drop)
    return cond


def drop_input(cond: Cond, name: str, drop: Bool[Array, "b"]) -> Cond:
    """`drop_text` for the features of one text encoder alone."""
    dropped = {}
    for field in [field_name(kind, name) for kind in KINDS if field_name(kind, name) in cond]:
        value = cond[field]
        null = jnp.zeros((), value.dtype)
        if field == field_name(MASK, name):
            null = (jnp.arange(value.shape[1]) == 0)[None]
        dropped[field] = jnp.where(drop.reshape(-1, *[1] * (value.ndim - 1)), null, value)
    return cond | dropped


def null_text(cond: Cond) -> Cond:
    """The unconditional `cond` of classifier-free guidance: drops the text of every sample."""
    rows = next(value.shape[0] for field, value in cond.items() if is_text(field))
    return drop_text(cond, jnp.ones(rows, bool))


def augment_lowres(
    cond: Cond, eps: Float[Array, "b h w c"], level: Float[Array, "b"], schedule: Schedule
) -> Cond:
    """Noise-conditioning augmentation (section 2.4): diffuses the low-res image to time `level`.

    The noise is added at the low-res image's own resolution. The network receives its log-SNR as
    `lowres_logsnr`. Level 0 leaves the image unchanged (log-SNR 20, sigma 5e-5).

    Args:
        cond: holds "lowres" [b h w c], before noise.
        eps: standard normal noise.
        level: augmentation level of each sample, in [0, 1].
        schedule: maps the level to a log-SNR.
    """
    logsnr = schedule(level)
    return cond | {
        "lowres": VARIANCE_PRESERVING.diffuse(cond["lowres"], eps, logsnr),
        "lowres_logsnr": logsnr,
    }
