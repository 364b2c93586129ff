"""The forward process z = alpha x + sigma eps, and x-hat from the network's output (Appendix A).

The process defines alpha and sigma as functions of the log-SNR lambda = log(alpha^2 / sigma^2):

    vp     alpha^2 = sigmoid(lambda), sigma^2 = sigmoid(-lambda): variance preserving (the paper)
    flow   alpha = sigmoid(lambda/2) = 1 - t, sigma = sigmoid(-lambda/2) = t: the straight path
           from data to noise (Lipman et al. 2023; Liu et al. 2023)

The prediction is what the network outputs:

    eps   the noise (the paper, in every stage)
    x     the clean image
    v     alpha eps - sigma x (Salimans & Ho 2022, section 4)
    u     eps - x, the velocity of the flow path (Lipman et al. 2023)

For fixed z and log-SNR, each of the four is an affine function of each other one.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PREDICTIONS = ("eps", "x", "v", "u")

LogSNR = Float[Array, "b"]
Images = Float[Array, "b *d"]


@runtime_checkable
class Process(Protocol):
    """Interface of a forward process and its parameterization (the network's prediction).

    Losses, samplers and evaluations access both through this interface only.
    """

    def alpha_sigma(
        self, logsnr: LogSNR, ndim: int
    ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """(alpha, sigma) in fp32, shaped [b, 1, ..., 1] with `ndim` dimensions."""

    def diffuse(self, x: Images, eps: Images, logsnr: LogSNR) -> Images:
        """Returns z = alpha x + sigma eps, a sample of q(z | x)."""

    def prior(self, noise: Images, logsnr: LogSNR) -> Images:
        """z at the start of sampling, from standard normal noise."""

    def target(self, x: Images, eps: Images, logsnr: LogSNR) -> Images:
        """The network's training target."""

    def x_from_output(self, output: Images, z: Images, logsnr: LogSNR) -> Images:
        """x-hat in fp32 from the network's output."""

    def eps_from_x(self, x: Images, z: Images, logsnr: LogSNR) -> Images:
        """The noise that is consistent with x-hat at this z."""

    def output_scale(self, logsnr: LogSNR) -> LogSNR:
        """The factor c [b] with |output error|^2 = c |eps error|^2 at fixed z."""


@dataclasses.dataclass(frozen=True)
class GaussianProcess:
    """A `Process` with closed-form alpha and sigma.

    `process` and `prediction` are the config fields of the same names.
    """

    process: str
    prediction: str

    def alpha_sigma(
        self, logsnr: LogSNR, ndim: int
    ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """(alpha, sigma) in fp32, shaped [b, 1, ..., 1] with `ndim` dimensions."""
        logsnr = logsnr.astype(jnp.float32).reshape(logsnr.shape + (1,) * (ndim - 1))
        return ALPHA_SIGMA[self.process](logsnr)

    def diffuse(self, x: Images, eps: Images, logsnr: LogSNR) -> Images:
        """Returns z = alpha x + sigma eps, a sample of q(z | x) (Appendix A, eq. 3)."""
        alpha, sigma = self.alpha_sigma(logsnr, x.ndim)
        return alpha * x + sigma * eps

    def prior(self, noise: Images, logsnr: LogSNR) -> Images:
        """Initial z of sampling, at the lowest log-SNR, where alpha x is negligible.

        This is the noise (vp) or sigma * noise (flow).
        """
        return noise if self.process == "vp" else self.alpha_sigma(logsnr, noise.ndim)[1] * noise

    def target(self, x: Images, eps: Images, logsnr: LogSNR) -> Images:
        """The network's training target: eps, x, v or u."""

        def v() -> Images:
            alpha, sigma = self.alpha_sigma(logsnr, x.ndim)
            return alpha * eps - sigma * x

        targets = {"eps": lambda: eps, "x": lambda: x, "v": v, "u": lambda: eps - x}
        return targets[self.prediction]()

    def x_from_output(self, output: Images, z: Images, logsnr: LogSNR) -> Images:
        """x-hat from the network's output, in fp32.

        With eps: (z - sigma eps) / alpha. With u: (z - sigma u) / (alpha + sigma). With v: (alpha z
        - sigma v) / (alpha^2 + sigma^2). Each follows from z = alpha x + sigma eps.
        """
        alpha, sigma = self.alpha_sigma(logsnr, z.ndim)
        output = output.astype(jnp.float32)

        def from_v() -> Images:
            x = alpha * z - sigma * output
            return x if self.process == "vp" else x / (alpha**2 + sigma**2)

        x_hats = {
            "eps": lambda: (z - sigma * output) / alpha,
            "x": lambda: output,
            "v": from_v,
            "u": lambda: (z - sigma * output) / (alpha + sigma),
        }
        return x_hats[self.prediction]()

    def eps_from_x(self, x: Images, z: Images, logsnr: LogSNR) -> Images:
        """eps = (z - alpha x) / sigma, the noise that is consistent with x-hat."""
        alpha, sigma = self.alpha_sigma(logsnr, z.ndim)
        return (z - alpha * x) / sigma

    def output_scale(self, logsnr: LogSNR) -> LogSNR:
        """The factor c [b] with |output error|^2 = c |eps error|^2 at fixed z.

        At fixed z an error e in eps corresponds to the error -(sigma / alpha) e in x.
        """
        alpha, sigma = self.alpha_sigma(logsnr, 1)
        per_eps = {"eps": 1.0, "x": sigma / alpha, "u": 1.0 + sigma / alpha}
        per_eps["v"] = alpha + sigma**2 / alpha
        return jnp.broadcast_to(jnp.square(per_eps[self.prediction]), logsnr.shape)


def _vp(logsnr: Float[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def _flow(logsnr: Float[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    return jax.nn.sigmoid(0.5 * logsnr), jax.nn.sigmoid(-0.5 * logsnr)


ALPHA_SIGMA = {"vp": _vp, "flow": _flow}
