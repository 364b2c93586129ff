"""Classifier-free guidance (eq. 2) and the thresholding of x-hat that makes large weights usable (section 2.3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.conditioning import null_text
from imagen_jax.diffusion.loss import DenoiseFn

THRESHOLDS = ("none", "static", "dynamic")


def guide(denoise_fn: DenoiseFn, w: float) -> DenoiseFn:
    """eps~ = w eps(z, c) + (1 - w) eps(z, null) (eq. 2): w = 1 is no guidance, and then costs one evaluation, not two.

    Both evaluations run as one batch of twice the size. The weights sum to one and x and v are affine in eps at fixed z,
    so the same combination of outputs is right for every kind of prediction.
    """
    if w == 1.0:
        return denoise_fn

    def guided(z, logsnr, cond):
        if "text" not in cond:  # nothing to drop: the two evaluations are the same, and their weights sum to one
            return denoise_fn(z, logsnr, cond)
        both = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, null_text(cond))
        output = denoise_fn(jnp.concatenate([z, z]), jnp.concatenate([logsnr, logsnr]), both)
        conditional, unconditional = jnp.split(output.astype(jnp.float32), 2)
        return w * conditional + (1.0 - w) * unconditional

    return guided


def threshold(x: Float[Array, "b *d"], kind: str, percentile: float) -> Float[Array, "b *d"]:
    """none: x as it is. static: clipped to [-1, 1]. dynamic: s = the `percentile` (0-100) of |x| of each sample, at least 1; clip to [-s, s], divide by s."""
    if kind == "none":
        return x
    if kind == "static":
        return jnp.clip(x, -1.0, 1.0)
    if kind == "dynamic":
        s = jnp.percentile(jnp.abs(x), percentile, axis=tuple(range(1, x.ndim)), keepdims=True)
        s = jnp.maximum(s, 1.0)
        return jnp.clip(x, -s, s) / s
    raise ValueError(f"sampling.threshold is {kind!r}; it must be one of {THRESHOLDS}")
