"""Sampling of data with a known score: Gaussians with full covariance, and a mixture of three.

The images are [2 1 2], four numbers. With the exact posterior mean E[x | z] as network, a Gaussian
stays Gaussian in every step. Mean and covariance of the samples are therefore known exactly for any
number of steps (`expected_moments`, in float64), and approach those of the data for many steps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import guidance, sampler
from imagen_jax.diffusion.process import GaussianProcess
from imagen_jax.diffusion.schedule import SCHEDULES
from tests.diffusion.settings import settings

SHAPE, D, B = (2, 1, 2), 4, 30_000
MEAN = np.array([0.3, -0.2, 0.1, 0.0])
ROOT = np.array(
    [[0.5, 0.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0], [-0.2, 0.1, 0.3, 0.0], [0.1, -0.3, 0.2, 0.1]]
)
COVARIANCE = ROOT @ ROOT.T


def as_prediction(prediction, x, z, alpha, sigma):
    """The network output with this prediction for a given x-hat `x`."""
    eps = (z - alpha * x) / sigma
    return {"x": x, "eps": eps, "v": alpha * eps - sigma * x, "u": eps - x}[prediction]


POWER = {
    "vp": (1.0, 0.5),
    "flow": (0.5, 1.0),
}  # of a path: alpha = sigmoid(first * logsnr) ** second


def levels(logsnr, path="vp"):
    scale, power = POWER[path]
    return tuple(jax.nn.sigmoid(sign * scale * logsnr)[:, None] ** power for sign in (1, -1))


def gaussian_network(prediction, path="vp"):
    """The exact network for N(MEAN + first text feature, COVARIANCE).

    E[x | z] = m + alpha S (alpha^2 S + sigma^2)^-1 (z - alpha m), computed in the eigenbasis of S.
    """
    values, vectors = np.linalg.eigh(COVARIANCE)
    values, vectors = values.astype(np.float32)[None], vectors.astype(np.float32)

    def denoise_fn(z, logsnr, cond):
        alpha, sigma = levels(logsnr, path)
        mean = jnp.asarray(MEAN, jnp.float32)[None] + (cond["text"][:, 0] if cond else 0.0)
        flat = z.reshape(z.shape[0], D)
        gain = alpha * values / (alpha**2 * values + sigma**2)
        x = mean + (((flat - alpha * mean) @ vectors) * gain) @ vectors.T
        return as_prediction(prediction, x, flat, alpha, sigma).reshape(z.shape)

    return denoise_fn


def draw_samples(denoise_fn, b=B, cond=None, seed=0, **options):
    """Samples [b 4] in float64."""
    keywords = settings(**({"prediction": "eps"} | options))
    run = jax.jit(lambda keys, cond: sampler.sample(denoise_fn, keys, SHAPE, cond, **keywords))
    samples = run(jax.random.split(jax.random.key(seed), b), cond or {})
    assert samples.shape == (b, *SHAPE) and samples.dtype == jnp.float32
    return np.asarray(samples, np.float64).reshape(b, D)


def expected_moments(schedule, method, steps, gamma, mean=MEAN, path="vp"):
    """Mean and covariance of the samples after `steps` steps, in float64 (eqs. 5 and 6)."""
    logsnr = np.asarray(SCHEDULES[schedule](jnp.linspace(1.0, 0.0, steps + 1)), np.float64)
    scale, power = POWER[path]
    alpha, sigma = ((1 / (1 + np.exp(-sign * scale * logsnr))) ** power for sign in (1, -1))
    mu, cov = np.zeros(D), np.eye(D)
    for t in range(steps):
        gain = (
            alpha[t]
            * COVARIANCE
            @ np.linalg.inv(alpha[t] ** 2 * COVARIANCE + sigma[t] ** 2 * np.eye(D))
        )
        offset = mean - alpha[t] * gain @ mean
        if t == steps - 1:
            return gain @ mu + offset, gain @ cov @ gain.T
        s = t + 1
        if method == "ddim":
            from_z, from_x, noise = (
                sigma[s] / sigma[t],
                alpha[s] - sigma[s] / sigma[t] * alpha[t],
                0.0,
            )
        else:
            one_step = sigma[t] ** 2 - (alpha[t] / alpha[s]) ** 2 * sigma[s] ** 2
            from_z, from_x = (
                alpha[t] / alpha[s] * sigma[s] ** 2 / sigma[t] ** 2,
                alpha[s] * one_step / sigma[t] ** 2,
            )
            noise = one_step * (sigma[s] / sigma[t]) ** (2 * (1 - gamma))
        transform = from_z * np.eye(D) + from_x * gain
        mu, cov = (
            transform @ mu + from_x * offset,
            transform @ cov @ transform.T + noise * np.eye(D),
        )


def assert_moments(samples, mean, cov, bias=0.0):
    """Asserts that the sample mean and covariance are within five standard errors of (mean, cov).

    `bias` is an additional tolerance, as a share of the largest variance.
    """
    n, variances = len(samples), np.diag(cov)
    scale = bias * variances.max()
    assert np.all(np.abs(samples.mean(axis=0) - mean) < 5 * np.sqrt(variances / n) + scale + 1e-3)
    error = np.sqrt((np.outer(variances, variances) + cov**2) / n)
    assert np.all(np.abs(np.cov(samples.T) - cov) < 5 * error + scale + 1e-4)


METHODS = [("ddim", 0.0), ("ancestral", 0.0), ("ancestral", 0.2), ("ancestral", 1.0)]


@pytest.mark.parametrize("method, gamma", METHODS)
def test_few_steps_make_exactly_the_gaussian_they_should(method, gamma):
    """Catches any error in a step, however small: with 5 steps, DDIM and gamma 0, 0.2 and 1 give
    different covariances, each known exactly.
    """
    samples = gaussian_samples(method, gamma, 5)
    assert_moments(samples, *expected_moments("cosine", method, 5, gamma))
    for other in METHODS:
        if other != (method, gamma):
            with pytest.raises(AssertionError):
                assert_moments(samples, *expected_moments("cosine", other[0], 5, other[1]))


@functools.cache
def gaussian_samples(method, gamma, steps, schedule="cosine", b=B):
    options = {"steps": steps, "method": method, "gamma": gamma, "schedule": schedule}
    return draw_samples(gaussian_network("eps"), b=b, **options)


@pytest.mark.parametrize(
    "method, gamma, schedule",
    [
        ("ddim", 0.0, "cosine"),
        pytest.param("ancestral", 0.0, "cosine", marks=pytest.mark.slow),
        pytest.param("ancestral", 1.0, "linear", marks=pytest.mark.slow),
    ],
)
def test_many_steps_make_the_data(method, gamma, schedule):
    """Catches a sampler that is consistent but converges to another distribution than that of the
    data.
    """
    assert_moments(gaussian_samples(method, gamma, 200, schedule), MEAN, COVARIANCE, bias=0.04)


@pytest.mark.parametrize("method, gamma", METHODS)
@pytest.mark.parametrize("prediction", ["u", "x"])
def test_the_flow_path_makes_exactly_the_gaussian_it_should(prediction, method, gamma):
    """Catches a step or conversion that is right only where alpha^2 + sigma^2 = 1."""
    network, options = (
        gaussian_network(prediction, "flow"),
        {"method": method, "gamma": gamma, "steps": 6},
    )
    samples = draw_samples(
        network, b=15_000, prediction=prediction, process="flow", schedule="flow", **options
    )
    assert_moments(samples, *expected_moments("flow", method, 6, gamma, path="flow"))


@pytest.mark.parametrize("path, grid", [("vp", "logsnr"), ("vp", "karras"), ("flow", "t")])
def test_second_order_steps_make_the_data(path, grid):
    """Catches a second-order sampler that is wrong on one path or grid: 20 steps are as accurate as
    200 of the first order.
    """
    options = {
        "process": path,
        "method": "dpmpp_2m",
        "grid": grid,
        "steps": 20,
        "schedule": "cosine" if path == "vp" else "flow",
    }
    samples = draw_samples(gaussian_network("eps", path), b=15_000, **options)
    assert_moments(samples, MEAN, COVARIANCE, bias=0.04)


def test_errors_shrink_and_samplers_agree_as_steps_grow():
    """Catches an error that does not vanish with the step size, such as noise of a wrong scale: 40
    times the steps have a tenth of the error.
    """
    covariances = np.array(
        [
            [np.cov(gaussian_samples(*method, steps, b=8_000).T) for method in METHODS[:2]]
            for steps in (5, 200)
        ]
    )
    few, many = np.abs(covariances - COVARIANCE).max(axis=(2, 3)) / COVARIANCE.max()
    assert np.all(few > 0.3) and np.all(many < 0.1 * few), (few, many)
    gap = np.abs(covariances[:, 0] - covariances[:, 1]).max(axis=(1, 2)) / COVARIANCE.max()
    assert gap[1] < 0.4 * gap[0], gap


def test_x_and_eps_make_the_same_samples():
    """Catches a prediction that gives another x-hat inside the loop. (`test_mixture`: v.)"""
    x = draw_samples(gaussian_network("x"), prediction="x", steps=5)
    np.testing.assert_allclose(
        gaussian_samples("ddim", 0.0, 5), x, atol=1e-2
    )  # eps at alpha = 4.5e-5 carries fp32 rounding of 3e-3


CENTRES = np.array([[0.6, 0.6, -0.6, 0.0], [-0.6, 0.2, 0.5, 0.6], [0.1, -0.7, 0.4, -0.6]])
WEIGHTS, SPREADS = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.15, 0.2])


def mixture_network(z, logsnr, cond):
    """The exact network for a mixture of isotropic Gaussians, with prediction v.

    E[x | z] is the mean of the components' posterior means, weighted by their posterior
    probabilities.
    """
    alpha, sigma = (a[:, None] for a in levels(logsnr))
    centres, spread = (
        jnp.asarray(CENTRES, jnp.float32)[None],
        jnp.asarray(SPREADS, jnp.float32)[None, :, None],
    )
    flat = z.reshape(z.shape[0], D)
    residual = flat[:, None] - alpha * centres
    variance = alpha**2 * spread**2 + sigma**2
    log_density = -0.5 * jnp.sum(residual**2 / variance, axis=-1) - 0.5 * D * jnp.log(
        variance[..., 0]
    )
    posterior = jax.nn.softmax(jnp.log(jnp.asarray(WEIGHTS, jnp.float32))[None] + log_density)[
        ..., None
    ]
    x = jnp.sum(posterior * (centres + alpha * spread**2 / variance * residual), axis=1)
    return as_prediction("v", x, flat, alpha[:, 0], sigma[:, 0]).reshape(z.shape)


@pytest.mark.parametrize("method, gamma", [("ddim", 0.0), ("ancestral", 0.2)])
def test_mixture(method, gamma):
    """Catches a sampler that drops, favours or blurs modes: weights, centres and deviations of the
    three modes are compared.
    """
    b = 20_000
    samples = draw_samples(
        mixture_network, b=b, prediction="v", steps=100, method=method, gamma=gamma
    )
    distance = np.linalg.norm(samples[:, None] - CENTRES, axis=-1)
    mode = distance.argmin(axis=1)
    assert np.mean(distance.min(axis=1) < 0.9) > 0.999
    for k in range(3):
        cluster = samples[mode == k]
        error = np.sqrt(WEIGHTS[k] * (1 - WEIGHTS[k]) / b)
        assert abs(len(cluster) / b - WEIGHTS[k]) < 5 * error + 0.01
        assert np.abs(cluster.mean(axis=0) - CENTRES[k]).max() < 0.015
        assert (
            abs(cluster.std(axis=0).mean() / SPREADS[k] - 1) < 0.1
        )  # the last of 100 steps costs 2 to 9 %


def text_cond(offsets):
    """cond whose captions shift the mean of `gaussian_network` by `offsets` [b 4]; null text by
    zero.
    """
    text = (
        jnp.broadcast_to(jnp.asarray(offsets, jnp.float32)[:, None], (len(offsets), 3, D))
        .at[:, 1:]
        .set(7.0)
    )
    return {"text": text, "text_mask": jnp.ones((len(offsets), 3), bool)}


OFFSET = np.array([0.4, 0.0, -0.2, 0.3])


def test_guided_samples_follow_the_guided_score_of_their_own_text():
    """Catches w shifted by one, conditional and null exchanged, and text averaged over the batch or
    taken from another row. With equal covariances, w score_c + (1 - w) score_null is the score of
    N(m + w offset, S).
    """
    b, w = 8_000, 3.0
    samples = draw_samples(
        gaussian_network("eps"),
        b=2 * b,
        cond=text_cond(np.repeat([OFFSET, -OFFSET], b, axis=0)),
        w=w,
        steps=12,
    )
    for half, mean in ((samples[:b], MEAN + w * OFFSET), (samples[b:], MEAN - w * OFFSET)):
        assert_moments(half, *expected_moments("cosine", "ddim", 12, 0.0, mean))


@pytest.mark.parametrize("prediction", ["eps", "x", "v"])
def test_guided_x_of_one_evaluation(prediction):
    """Catches other guidance weights for x and v than for eps: the guided x-hat is that of the mean
    m + w offset.
    """
    b, w = 64, 4.0
    z = jnp.asarray(np.random.default_rng(0).standard_normal((b, *SHAPE)), jnp.float32)
    logsnr = jnp.asarray(np.linspace(-8.0, 8.0, b), jnp.float32)
    network = gaussian_network(prediction)

    @jax.jit
    def x_hats(z, logsnr):
        cond = lambda scale: text_cond(np.tile(scale * OFFSET, (b, 1)))
        weights = guidance.Guidance(w, (-20.0, 20.0))
        guided = guidance.guide(network, weights, cond(1.0))(z, logsnr)
        plain = network(z, logsnr, cond(w))
        return [
            GaussianProcess("vp", prediction).x_from_output(output, z, logsnr)
            for output in (guided, plain)
        ]

    np.testing.assert_allclose(*x_hats(z, logsnr), rtol=1e-3, atol=2e-3)
