"""The random numbers of a training step, and the loss as a function of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import loss
from imagen_jax.diffusion.process import PREDICTIONS, GaussianProcess
from imagen_jax.diffusion.schedule import cosine, linear
from imagen_jax.diffusion.weighting import min_snr

draw = jax.jit(loss.draw, static_argnums=(1, 2, 3))
B = 40_000
BASE, LOWRES = (B, 2, 2, 3), (B, 1, 2, 3)


@pytest.fixture(scope="module")
def draws():
    """One large draw of a super-resolution stage, as NumPy arrays."""
    return jax.device_get(draw(jax.random.key(0), BASE, LOWRES, 0.1))


def kurtosis(values):
    centred = values - values.mean()
    return np.mean(centred**4) / np.mean(centred**2) ** 2


@pytest.mark.parametrize("name, shape", [("eps", BASE), ("lowres_eps", LOWRES)])
def test_noise_is_standard_normal(name, shape, draws):
    """Catches uniform noise (kurtosis 1.8), another scale than 1, and noise shared between samples,
    pixels or channels.
    """
    noise = draws[name]
    assert noise.shape == shape and noise.dtype == np.float32
    n = noise.size
    assert (
        abs(noise.mean()) < 5 / n**0.5
        and abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
        and abs(kurtosis(noise) - 3) < 5 * (24 / n) ** 0.5
    )
    correlation = np.corrcoef(noise.reshape(B, -1).T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 6 / B**0.5
    assert len(np.unique(noise[:, 0, 0, 0])) > 0.99 * B


@pytest.mark.parametrize("name", ["u", "lowres_level"])
def test_times_and_levels_are_uniform_per_sample(name, draws):
    """Catches one time or level for the whole batch, and a range other than [0, 1)."""
    values = np.sort(draws[name])
    assert values.shape == (B,) and values[0] >= 0.0 and values[-1] < 1.0
    assert (
        np.abs(values - (np.arange(B) + 0.5) / B).max() < 2.0 / B**0.5
    )  # Kolmogorov-Smirnov; far above 1.63, the value for 1 %


def test_text_is_dropped_at_the_rate(draws):
    """Catches text kept at the rate at which it should be dropped (section 4.1: 10 %), and another
    rate than the given one.
    """
    assert draws["drop"].shape == (B,) and draws["drop"].dtype == bool
    assert abs(draws["drop"].mean() - 0.1) < 5 * (0.1 * 0.9 / B) ** 0.5


def test_no_augmentation_means_level_0():
    """Catches an ignored maximum of the augmentation level: at 0 (ablation D.2) every low-res image
    stays clean.
    """
    levels = loss.draw(jax.random.key(0), (50, 1), (50, 1), 0.1, aug_max=0.0)["lowres_level"]
    np.testing.assert_array_equal(levels, np.zeros(50))
    full, half = (
        loss.draw(jax.random.key(0), (50, 1), (50, 1), 0.1, aug_max=most)["lowres_level"]
        for most in (1.0, 0.5)
    )
    np.testing.assert_allclose(half, 0.5 * np.asarray(full), rtol=1e-6)


def test_draws_are_independent_of_one_another(draws):
    """Catches one key used twice: equal noise for image and low-res image, or equal numbers for
    time, level and text dropping.
    """
    columns = [
        draws[name].reshape(B, -1)[:, 0]
        for name in ("u", "eps", "drop", "lowres_level", "lowres_eps")
    ]
    correlation = np.corrcoef(np.stack(columns).astype(np.float64))
    assert np.abs(correlation - np.eye(5)).max() < 5 / B**0.5


def test_draws_depend_on_the_key_alone():
    """Catches hidden state, and an ignored key."""
    first, again, other = (draw(jax.random.key(seed), *STAGE_SHAPES, 0.0) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert all(
        np.all(np.asarray(first[name]) != np.asarray(other[name]))
        for name in ("u", "eps", "lowres_level", "lowres_eps")
    )


def test_a_base_stage_draws_no_low_res_noise_and_rate_0_drops_nothing():
    """Catches a base stage that draws low-res noise, and text dropped at rate 0."""
    draws = draw(jax.random.key(0), (100, 2), None, 0.0)
    assert set(draws) == {"u", "eps", "drop"} and not np.any(draws["drop"])


STAGE_SHAPES = (6, 8, 8, 3), (6, 2, 2, 3)


def stage_inputs():
    """x [6 8 8 3], cond with text and a low-res image [6 2 2 3], and draws that drop the text of
    samples 1 and 4.
    """
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.uniform(0.1, 0.9, shape), jnp.float32)
    mask = jnp.asarray(np.arange(5)[None] < np.array([5, 3, 2, 4, 5, 1])[:, None])
    cond = {"text": array(6, 5, 4), "text_mask": mask, "lowres": array(*STAGE_SHAPES[1])}
    draws = draw(jax.random.key(0), *STAGE_SHAPES, 0.0)
    return array(*STAGE_SHAPES[0]), cond, draws | {"drop": jnp.asarray(np.arange(6) % 3 == 1)}


def loss_of(denoise_fn, x, cond, draws, logsnr, process, weight=None):
    """The loss of a network, composed as in a stage."""
    z, cond = loss.noised(x, cond, draws, logsnr, process, cosine)
    return loss.per_sample_loss(
        denoise_fn(z, logsnr, cond), x, draws["eps"], logsnr, process, weight
    )


@functools.partial(jax.jit, static_argnames="prediction")
def seen_by_network(x, cond, draws, prediction="eps"):
    """The network's inputs (z, logsnr, cond), and the loss for an output of 0.25 everywhere."""
    calls = []

    def denoise_fn(z, logsnr, cond):
        calls.append((z, logsnr, cond))
        return jnp.full(z.shape, 0.25, jnp.bfloat16)

    value = loss_of(
        denoise_fn, x, cond, draws, linear(draws["u"]), GaussianProcess("vp", prediction)
    )
    (call,) = calls
    return call, value


def alpha_sigma(logsnr):
    logsnr = np.asarray(logsnr, np.float64)
    return tuple(
        ((1 / (1 + np.exp(sign * logsnr))) ** 0.5).reshape(-1, 1, 1, 1) for sign in (-1, 1)
    )


def test_the_network_sees_the_low_res_image_and_not_the_target():
    """Catches the noised target used as the low-res input: the expected input is built from the
    low-res image only.
    """
    x, cond, draws = stage_inputs()
    (_, _, seen), _ = seen_by_network(x, cond, draws)
    alpha, sigma = alpha_sigma(cosine(draws["lowres_level"]))
    assert seen["lowres"].shape == (6, 2, 2, 3)
    np.testing.assert_allclose(
        seen["lowres"], alpha * cond["lowres"] + sigma * draws["lowres_eps"], atol=1e-5
    )


def test_the_noised_low_res_image_is_under_the_key_the_network_reads():
    """Catches the augmented image written under one key and read under another: the network gets
    exactly these four keys.
    """
    x, cond, draws = stage_inputs()
    (_, _, seen), _ = seen_by_network(x, cond, draws)
    assert set(seen) == {"text", "text_mask", "lowres", "lowres_logsnr"}
    assert np.all(
        np.abs(np.asarray(seen["lowres"]) - np.asarray(cond["lowres"])).max(axis=(1, 2, 3)) > 1e-3
    )
    np.testing.assert_allclose(seen["lowres_logsnr"], cosine(draws["lowres_level"]), rtol=1e-5)
    assert len(np.unique(seen["lowres_logsnr"])) == 6


def test_the_network_sees_z_at_its_own_log_snr():
    """Catches the augmentation's schedule or level used for x, and noise in z that is not the noise
    in the loss.
    """
    x, cond, draws = stage_inputs()
    (z, logsnr, _), _ = seen_by_network(x, cond, draws)
    np.testing.assert_allclose(logsnr, linear(draws["u"]), rtol=1e-5)
    alpha, sigma = alpha_sigma(logsnr)
    np.testing.assert_allclose(z, alpha * x + sigma * draws["eps"], atol=1e-5)


def test_the_network_sees_text_dropped_where_drawn():
    """Catches text dropping that never reaches the network, or that reaches every sample."""
    x, cond, draws = stage_inputs()
    (_, _, seen), _ = seen_by_network(x, cond, draws)
    np.testing.assert_array_equal(
        np.any(np.asarray(seen["text"]), axis=(1, 2)), ~np.asarray(draws["drop"])
    )
    np.testing.assert_array_equal(np.sum(np.asarray(seen["text_mask"]), axis=1), [5, 1, 2, 4, 1, 1])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_the_mean_squared_error_of_each_sample(prediction):
    """Catches a sum in place of the mean, a mean over the batch, a root, and the wrong target;
    compared with float64 NumPy.
    """
    x, cond, draws = stage_inputs()
    _, value = seen_by_network(x, cond, draws, prediction=prediction)
    alpha, sigma = alpha_sigma(linear(draws["u"]))
    eps = draws["eps"]
    target = {"eps": eps, "x": x, "v": alpha * eps - sigma * x, "u": eps - x}[prediction]
    np.testing.assert_allclose(
        value, np.mean((0.25 - np.asarray(target, np.float64)) ** 2, axis=(1, 2, 3)), rtol=1e-5
    )
    assert value.dtype == jnp.float32


def test_a_perfect_network_has_no_loss_and_noise_prediction_is_not_weighted():
    """Catches a hidden weight by log-SNR: an error of 0.1 everywhere costs 0.01 at every time."""
    x, cond, draws = stage_inputs()
    off = lambda error: lambda z, logsnr, cond: draws["eps"] + error
    run = jax.jit(
        lambda error: loss_of(
            off(error), x, cond, draws, cosine(draws["u"]), GaussianProcess("vp", "eps")
        )
    )
    for error in (0.0, 0.1):
        np.testing.assert_allclose(run(error), error**2, rtol=1e-4, atol=1e-12)


def test_a_base_stage_needs_no_low_res_image():
    """Catches a base stage whose network gets a low-res image or its level."""
    x, cond, draws = stage_inputs()
    del cond["lowres"]
    (_, _, seen), _ = seen_by_network(x, cond, {name: draws[name] for name in ("u", "eps", "drop")})
    assert set(seen) == {"text", "text_mask"}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_weight_means_the_same_for_every_prediction(prediction):
    """Catches a weight applied to the output's own error: an error of 0.1 in eps costs 0.01 min(1,
    5/SNR) for every prediction.
    """
    x, cond, draws = stage_inputs()
    process, logsnr = GaussianProcess("vp", prediction), cosine(draws["u"])
    alpha, sigma = (jnp.asarray(a, jnp.float32) for a in alpha_sigma(logsnr))
    x_off, eps_off = x - sigma / alpha * 0.1, draws["eps"] + 0.1
    outputs = {
        "eps": eps_off,
        "x": x_off,
        "v": alpha * eps_off - sigma * x_off,
        "u": eps_off - x_off,
    }
    network = lambda z, logsnr, cond: outputs[prediction]
    value = loss_of(network, x, cond, draws, logsnr, process, min_snr)
    np.testing.assert_allclose(
        value, 0.01 * np.minimum(1, 5 * np.exp(-np.asarray(logsnr))), rtol=2e-2
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x_error_is_of_clipped_x_whatever_the_network_outputs(prediction):
    """Catches an error in the output's own unit, and x-hat outside [-1, 1], which a sampler would
    clip.
    """
    x, _, draws = stage_inputs()
    process, logsnr = GaussianProcess("vp", prediction), linear(draws["u"])
    alpha, sigma = (jnp.asarray(a, jnp.float32) for a in alpha_sigma(logsnr))
    z = process.diffuse(x, draws["eps"], logsnr)
    for x_hat, expected in (
        (x - 0.05, 0.0025),
        (jnp.full_like(x, 3.0), jnp.mean((1 - x) ** 2, axis=(1, 2, 3))),
    ):
        eps = (z - alpha * x_hat) / sigma
        output = {"eps": eps, "x": x_hat, "v": alpha * eps - sigma * x_hat, "u": eps - x_hat}[
            prediction
        ]
        np.testing.assert_allclose(
            loss.x_error(output, z, x, logsnr, process), np.broadcast_to(expected, (6,)), rtol=2e-2
        )
