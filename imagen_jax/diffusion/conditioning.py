"""What the network is told besides z: text that is sometimes dropped, and a noised low-resolution
image.

`cond` is a dict: text [b l d], text_mask [b l] and, in super-resolution, lowres [b h' w' 3] in [-1,
1] before noise, lowres_logsnr [b]. Text is absent in a model that takes none.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imagen_jax.diffusion.process import GaussianProcess
from imagen_jax.diffusion.schedule import Schedule

Cond = dict[str, Array]
VARIANCE_PRESERVING = GaussianProcess(
    "vp", "eps"
)  # noise on the low-res image, whatever the stage's own process


def drop_text(cond: Cond, drop: Bool[Array, "b"]) -> Cond:
    """Text replaced by the null text where `drop`: features zeroed (section 4.1), the mask reduced
    to the first position.

    With one position left nothing is empty, and nothing depends on the length of the dropped
    caption.
    """
    if "text" not in cond:
        return cond
    first = jnp.arange(cond["text_mask"].shape[1]) == 0
    text = jnp.where(drop[:, None, None], jnp.zeros((), cond["text"].dtype), cond["text"])
    return cond | {
        "text": text,
        "text_mask": jnp.where(drop[:, None], first[None], cond["text_mask"]),
    }


def null_text(cond: Cond) -> Cond:
    """The unconditional `cond` of classifier-free guidance: text dropped for every sample, the rest
    kept.
    """
    return drop_text(cond, jnp.ones(cond["text"].shape[0], bool))


def augment_lowres(
    cond: Cond, eps: Float[Array, "b h w c"], level: Float[Array, "b"], schedule: Schedule
) -> Cond:
    """Noise-conditioning augmentation (section 2.4): the low-res image diffused to t = `level`, at
    its own resolution.

    The network is told the level as `lowres_logsnr`. Level 0 leaves the image as it is (log-SNR 20,
    sigma 5e-5).
    """
    logsnr = schedule(level)
    return cond | {
        "lowres": VARIANCE_PRESERVING.diffuse(cond["lowres"], eps, logsnr),
        "lowres_logsnr": logsnr,
    }
