"""The variance-preserving forward process and the three ways a network can state what it predicts (Appendix A).

z = alpha x + sigma eps,   alpha^2 = sigmoid(lambda),   sigma^2 = sigmoid(-lambda).

The paper predicts eps in every stage. x and v = alpha eps - sigma x (Salimans & Ho 2022, eq. 10) are there for
ablations and small models. At fixed z, each of the three is an affine function of any other.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PREDICTIONS = ("eps", "x", "v")


def alpha_sigma(logsnr: Float[Array, "b"], ndim: int) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """(alpha, sigma) in fp32, shaped [b, 1, ..., 1] to broadcast against arrays of `ndim` dimensions."""
    logsnr = logsnr.astype(jnp.float32).reshape(logsnr.shape + (1,) * (ndim - 1))
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def diffuse(x: Float[Array, "b *d"], eps: Float[Array, "b *d"], logsnr: Float[Array, "b"]) -> Float[Array, "b *d"]:
    """q(z | x) with its noise given: z = alpha x + sigma eps (eq. 3 of Appendix A)."""
    alpha, sigma = alpha_sigma(logsnr, x.ndim)
    return alpha * x + sigma * eps


def target(
    prediction: str, x: Float[Array, "b *d"], eps: Float[Array, "b *d"], logsnr: Float[Array, "b"]
) -> Float[Array, "b *d"]:
    """What a network with this `prediction` is trained to output."""
    if prediction == "eps":
        return eps
    if prediction == "x":
        return x
    if prediction == "v":
        alpha, sigma = alpha_sigma(logsnr, x.ndim)
        return alpha * eps - sigma * x
    raise ValueError(f"diffusion.prediction is {prediction!r}; it must be one of {PREDICTIONS}")


def x_from_output(
    prediction: str, output: Float[Array, "b *d"], z: Float[Array, "b *d"], logsnr: Float[Array, "b"]
) -> Float[Array, "b *d"]:
    """x-hat from the network's output; for eps, x-hat = (z - sigma eps) / alpha, the division in fp32."""
    alpha, sigma = alpha_sigma(logsnr, z.ndim)
    output = output.astype(jnp.float32)
    if prediction == "eps":
        return (z - sigma * output) / alpha
    if prediction == "x":
        return output
    if prediction == "v":
        return alpha * z - sigma * output
    raise ValueError(f"diffusion.prediction is {prediction!r}; it must be one of {PREDICTIONS}")


def eps_from_x(x: Float[Array, "b *d"], z: Float[Array, "b *d"], logsnr: Float[Array, "b"]) -> Float[Array, "b *d"]:
    """eps = (z - alpha x) / sigma: the noise that is consistent with this x-hat."""
    alpha, sigma = alpha_sigma(logsnr, z.ndim)
    return (z - alpha * x) / sigma
