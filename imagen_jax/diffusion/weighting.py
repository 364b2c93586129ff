"""Weights of the training loss as functions of the log-SNR, for the squared error of eps.

The loss multiplies the squared error of the network's output by w(logsnr) / c(logsnr), with c =
`Process.output_scale`. A weight therefore means the same for every prediction.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Weight = Callable[[Float[Array, "b"]], Float[Array, "b"]]

MIN_SNR_GAMMA = 5.0


def min_snr(logsnr: Float[Array, "b"]) -> Float[Array, "b"]:
    """min(SNR, 5) / SNR, on the squared error of eps (Hang et al. 2023, section 3.4)."""
    return jnp.minimum(1.0, MIN_SNR_GAMMA * jnp.exp(-logsnr))


# "none" is the paper's loss, the unweighted squared error of the output (eq. 1).
WEIGHTS: dict[str, Weight | None] = {"none": None, "min_snr": min_snr}
