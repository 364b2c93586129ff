"""Single sampler steps against float64 NumPy, the whole loop, and what an image depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import sampler
from imagen_jax.diffusion.process import GaussianProcess
from imagen_jax.diffusion.schedule import linear
from tests.diffusion.settings import settings

VP = GaussianProcess("vp", "x")


def alpha_sigma(logsnr):
    logsnr = np.asarray(logsnr, np.float64)
    return tuple(((1 / (1 + np.exp(sign * logsnr))) ** 0.5)[..., None] for sign in (-1, 1))


@pytest.fixture(scope="module")
def step_inputs():
    """z, x and noise [5 3], and the log-SNRs at t and at s < t."""
    z, x, noise = np.random.default_rng(0).standard_normal((3, 5, 3)).astype(np.float32)
    return (
        z,
        x,
        noise,
        np.array([-18.0, -4.0, -0.5, 1.0, 9.0], np.float32),
        np.array([-7.0, -3.9, 0.0, 6.0, 20.0], np.float32),
    )


def test_ddim_step(step_inputs):
    """Catches s and t exchanged, and eps scaled by sigma_t: z_s = alpha_s x + (sigma_s /
    sigma_t)(z_t - alpha_t x).
    """
    z, x, _, logsnr_t, logsnr_s = step_inputs
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    out = jax.jit(sampler.ddim_step, static_argnums=0)(VP, z, x, logsnr_t, logsnr_s)
    np.testing.assert_allclose(
        out, alpha_s * x + sigma_s / sigma_t * (z - alpha_t * x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("gamma", [0.0, 0.2, 1.0])
def test_ancestral_step(gamma, step_inputs):
    """Catches gamma reversed, variances interpolated in place of log-variances, and a variance used
    as a standard deviation.

    The reference is Bayes' rule for q(z_s | z_t, x), with the one-step variance sigma_t^2 -
    (alpha_t/alpha_s)^2 sigma_s^2.
    """
    z, x, noise, logsnr_t, logsnr_s = step_inputs
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    one_step = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
    mean = (alpha_t / alpha_s) * sigma_s**2 / sigma_t**2 * z + alpha_s * one_step / sigma_t**2 * x
    small, large = one_step * sigma_s**2 / sigma_t**2, one_step
    expected = mean + np.sqrt(np.exp((1 - gamma) * np.log(small) + gamma * np.log(large))) * noise
    out = jax.jit(sampler.ancestral_step, static_argnums=(0, 6))(
        VP, z, x, logsnr_t, logsnr_s, noise, gamma
    )
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_a_step_that_goes_nowhere_stays():
    """Catches noise added between two equal times, as happens where a schedule is clipped."""
    z, x, logsnr = jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.array([3.0])
    np.testing.assert_allclose(sampler.ddim_step(VP, z, x, logsnr, logsnr), z, rtol=1e-6)
    np.testing.assert_allclose(
        sampler.ancestral_step(VP, z, x, logsnr, logsnr, z, 0.2), z, rtol=1e-6
    )


def test_noise_is_standard_normal_and_one_key_a_sample():
    """Catches uniform noise, and noise that repeats between or within samples."""
    noise = jax.device_get(
        jax.jit(sampler.sample_noise, static_argnums=1)(
            jax.random.split(jax.random.key(0), 20_000), (2, 2)
        )
    )
    flat, n = noise.reshape(20_000, 4), noise.size
    assert noise.shape == (20_000, 2, 2)
    assert abs(flat.mean()) < 5 / n**0.5 and abs(flat.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(np.mean((flat - flat.mean()) ** 4) / flat.var() ** 2 - 3) < 5 * (24 / n) ** 0.5
    assert np.abs(np.corrcoef(flat.T) - np.eye(4)).max() < 5 / 20_000**0.5
    assert len(np.unique(flat[:, 0])) > 19_900


def trace(denoise_fn, b, shape=(3,), cond=None, **options):
    """The (z, logsnr) of every evaluation of `denoise_fn` in order, and the samples."""
    seen = []

    def traced(z, logsnr, cond):
        jax.debug.callback(
            lambda *call: seen.append(tuple(map(np.asarray, call))), z, logsnr, ordered=True
        )
        return denoise_fn(z, logsnr, cond)

    keys = jax.random.split(jax.random.key(1), b)
    x = jax.jit(
        lambda keys, cond: sampler.sample(traced, keys, shape, cond, **settings(**options))
    )(keys, cond or {})
    jax.effects_barrier()
    return seen, np.asarray(x)


def toward_half(z, logsnr, cond):
    """A network with prediction x, whose x-hat depends on z and on the noise level."""
    return 0.5 + 0.1 * z + 0.01 * logsnr[:, None]


def test_network_is_evaluated_once_a_step_on_the_uniform_grid():
    """Catches a grid that is off by one, that ends before t = 1 or evaluates at t = 0, and an
    additional evaluation.
    """
    seen, _ = trace(toward_half, 2, schedule="linear", steps=5)
    expected = linear(jnp.asarray([1.0, 0.8, 0.6, 0.4, 0.2], jnp.float32))
    assert len(seen) == 5
    np.testing.assert_allclose(
        [logsnr for _, logsnr in seen], np.stack([expected, expected], axis=1), rtol=1e-3
    )


def test_ddim_path():
    """Catches a loop with a wrong pair of times or an old x-hat, and a last step that does not
    return x-hat.
    """
    seen, x = trace(toward_half, 4, steps=5)
    for (z, logsnr_t), (z_next, logsnr_s) in zip(seen, seen[1:]):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
        x_hat = toward_half(z, logsnr_t, {})
        np.testing.assert_allclose(
            z_next,
            alpha_s * x_hat + sigma_s / sigma_t * (z - alpha_t * x_hat),
            rtol=1e-4,
            atol=1e-5,
        )
    np.testing.assert_allclose(x, toward_half(*seen[-1], {}), rtol=1e-5)


def test_ancestral_path():
    """Catches noise reused between steps or equal to the initial noise, noise in the last step, and
    an ignored gamma.

    The noise of each step is recovered from the path. It is standard normal, and independent of the
    other steps and of the initial noise.
    """
    b, gamma = 8_000, 0.7
    seen, x = trace(toward_half, b, method="ancestral", gamma=gamma)
    noises = [seen[0][0]]
    for (z, logsnr_t), (z_next, logsnr_s) in zip(seen, seen[1:]):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
        one_step = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
        mean = (
            alpha_t / alpha_s
        ) * sigma_s**2 / sigma_t**2 * z + alpha_s * one_step / sigma_t**2 * toward_half(
            z, logsnr_t, {}
        )
        noises.append(
            (z_next - mean) / np.sqrt(one_step * (sigma_s**2 / sigma_t**2) ** (1 - gamma))
        )
    noises = np.concatenate(noises, axis=1)
    assert noises.shape == (b, 12)
    assert np.abs(noises.mean(axis=0)).max() < 5 / b**0.5
    assert np.abs(np.cov(noises.T) - np.eye(12)).max() < 5 * (2 / b) ** 0.5
    np.testing.assert_allclose(x, toward_half(*seen[-1], {}), rtol=1e-5)


TEXT = {"text": jnp.full((2, 3, 1), 0.9), "text_mask": jnp.ones((2, 3), bool)}


def from_text(z, logsnr, cond):
    """A network with prediction x that returns the text's value: 0.9 in TEXT, 0 for null text."""
    return jnp.broadcast_to(cond["text"][:, 0], z.shape) * jnp.array([[1.0, -1.0, 0.0]])


def test_thresholding_acts_on_the_guided_x_and_eps_follows_it():
    """Catches thresholding before guidance (the result would be 3.6), and DDIM with the eps of
    x-hat before thresholding.
    """
    seen, x = trace(from_text, 2, cond=TEXT, w=4.0, steps=3, threshold="dynamic")
    for (z, logsnr_t), (z_next, logsnr_s) in zip(seen, seen[1:]):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
        x_hat = np.array([[1.0, -1.0, 0.0]])
        np.testing.assert_allclose(
            z_next,
            alpha_s * x_hat + sigma_s / sigma_t * (z - alpha_t * x_hat),
            rtol=1e-4,
            atol=1e-5,
        )
        np.testing.assert_array_equal(z[::2], z[1::2])
    np.testing.assert_allclose(x, [[1.0, -1.0, 0.0]] * 2, atol=1e-6)


def test_guidance_in_an_interval_runs_one_pass_outside_it():
    """Catches an interval that is ignored, that guides outside, or that saves no evaluation; w = 3
    for log-SNR from -1 to 2.
    """
    seen, x = trace(from_text, 2, cond=TEXT, w=3.0, w_interval=(-1.0, 2.0), steps=6)
    levels = np.asarray(settings(steps=6)["levels"])
    assert [len(z) for z, _ in seen] == [4 if -1.0 <= level < 2.0 else 2 for level in levels]
    # The last evaluation is outside the interval.
    np.testing.assert_allclose(x, [[0.9, -0.9, 0.0]] * 2, atol=1e-5)


@pytest.mark.parametrize("w, rows", [(1.0, 2), (3.0, 4)])
def test_guidance_costs_twice_the_batch_and_none_costs_nothing(w, rows):
    """Catches an unconditional evaluation at w = 1, and two evaluations per step in place of one
    with twice the batch.
    """
    seen, x = trace(from_text, 2, cond=TEXT, w=w, steps=2)
    assert [z.shape for z, _ in seen] == 2 * [(rows, 3)]
    np.testing.assert_allclose(x, [[w * 0.9, -w * 0.9, 0.0]] * 2, atol=1e-5)


def test_percentile_reaches_the_threshold_of_a_single_step():
    """Catches a fixed or rescaled percentile, and a sampler that cannot take a single step: the
    median of |x-hat| = (3.6, 1.8, 0.9) is 1.8.
    """
    network = lambda z, logsnr, cond: (
        jnp.broadcast_to(cond["text"][:, 0], z.shape) * jnp.array([[1.0, 0.5, 0.25]])
    )
    seen, x = trace(network, 2, cond=TEXT, w=4.0, steps=1, threshold="dynamic", percentile=50.0)
    assert len(seen) == 1
    np.testing.assert_allclose(x, [[1.0, 1.0, 0.5]] * 2, atol=1e-6)


def conv_network(z, logsnr, cond):
    """A small convolution network on images [b 6 6 3], with prediction eps.

    It reads the text, the low-res image and both noise levels.
    """
    rng = np.random.default_rng(7)
    first, last, from_tokens = (
        rng.normal(0, 0.3, shape).astype(np.float32)
        for shape in [(3, 3, 6, 8), (3, 3, 8, 3), (4, 8)]
    )
    conv = lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    weights = cond["text_mask"] / jnp.sum(cond["text_mask"], axis=1, keepdims=True)
    text = jnp.einsum("bld,bl->bd", cond["text"], weights) @ from_tokens
    shift = text + 0.1 * (logsnr + cond["lowres_logsnr"])[:, None]
    h = jnp.tanh(conv(jnp.concatenate([z, cond["lowres"]], axis=-1), first) + shift[:, None, None])
    return z * jax.nn.sigmoid(-logsnr)[:, None, None, None] ** 0.5 + 0.1 * conv(h, last)


def picture_inputs(seeds):
    """Keys and cond of `len(seeds)` images; image i depends on seeds[i] only."""
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        mask = np.arange(5) < rng.integers(1, 6)
        rows.append(
            (
                rng.standard_normal((5, 4)) * mask[:, None],
                mask,
                rng.uniform(-1, 1, (6, 6, 3)),
                rng.uniform(-3, 3),
            )
        )
    text, mask, lowres, logsnr = (np.stack(column) for column in zip(*rows))
    cond = {
        "text": text.astype(np.float32),
        "text_mask": mask,
        "lowres": lowres.astype(np.float32),
        "lowres_logsnr": logsnr.astype(np.float32),
    }
    return jax.vmap(jax.random.key)(jnp.asarray(seeds)), jax.tree.map(jnp.asarray, cond)


@jax.jit
def draw_pictures(keys, cond):
    """Samples with guidance, dynamic threshold and noise in every step."""
    options = settings(
        prediction="eps",
        method="ancestral",
        steps=6,
        gamma=0.2,
        w=3.0,
        threshold="dynamic",
        percentile=90.0,
    )
    return sampler.sample(conv_network, keys, (6, 6, 3), cond, **options)


def test_a_picture_does_not_depend_on_its_batch_mates():
    """Catches one key for the batch and statistics over it. With other images in the batch the
    result is equal to the bit; at another position or in another batch size it is within 1/255.
    """
    pictures = np.asarray(draw_pictures(*picture_inputs([3, 5, 8, 13])))
    assert np.all(np.isfinite(pictures)) and np.abs(pictures[0] - pictures[1]).max() > 0.1
    others = np.asarray(draw_pictures(*picture_inputs([3, 21, 34, 55])))
    np.testing.assert_array_equal(pictures[0], others[0])
    assert np.abs(pictures[1:] - others[1:]).max() > 0.1
    moved = np.asarray(draw_pictures(*picture_inputs([13, 8, 5, 3])))
    np.testing.assert_allclose(moved[::-1], pictures, atol=1e-4)
    alone = np.asarray(draw_pictures(*picture_inputs([3, 5])))
    assert np.abs(alone - pictures[:2]).max() < 1 / 255


def test_another_key_or_another_prompt_is_another_picture():
    """Catches an ignored key, and conditioning that is lost in the loop."""
    keys, cond = picture_inputs([3, 5, 8, 13])
    first = np.asarray(draw_pictures(keys, cond))
    other_key = np.asarray(draw_pictures(keys[::-1], cond))
    assert np.all(np.abs(first - other_key).max(axis=(1, 2, 3)) > 0.1)
    for name in ("text", "lowres", "lowres_logsnr"):
        changed = np.asarray(draw_pictures(keys, cond | {name: cond[name][::-1]}))
        assert np.all(np.abs(first - changed).max(axis=(1, 2, 3)) > 1e-3), name


WRONG = [
    ({"method": "ancestral", "gamma": 1.5}, "sampling.gamma"),
    ({"percentile": 0.0}, "sampling.percentile"),
    ({"w": float("nan")}, "sampling.w is nan"),
    ({"w_interval": (3.0, 1.0)}, "sampling.w_interval"),
    ({"grid": "karras", "grid_rho": 0.0}, "sampling.grid_rho"),
    ({"grid": "logsnr", "grid_logsnr": (5.0, -5.0)}, "sampling.grid_logsnr"),
    ({"grid": "karras", "grid_logsnr": (-60.0, 20.0)}, "from -20 to 20"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_options_are_one_clear_line(options, message):
    """Catches an option out of range that silently samples as another."""
    with pytest.raises(ValueError, match=message):
        settings(**options)


def gaussian_x_hat(z, logsnr):
    """E[x | z] for x ~ N(0, 0.5^2)."""
    alpha, sigma = VP.alpha_sigma(logsnr, z.ndim)
    return 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * z


# Relative error of z at log-SNR 6, starting from z = 1 at log-SNR -10. The exact value is
# 0.5018595848, the ratio of the standard deviations of z at the two levels.
ERRORS = {
    "ddim": {8: -0.2195, 16: -0.1164, 32: -0.0600, 64: -0.0305},
    "dpmpp_2m": {8: 0.0068, 16: 0.0116, 32: 0.00348, 64: 0.000904},
}


@pytest.mark.parametrize("method", ERRORS)
def test_order_of_convergence(method):
    """Catches a second-order sampler of first order, a carry that is lost or of the wrong step, and
    another first step.
    """
    run = jax.jit(sampler.integrate, static_argnums=(0, 1, 2))
    for steps, expected in ERRORS[method].items():
        levels, keys = jnp.linspace(-10.0, 6.0, steps + 1), jax.random.split(jax.random.key(0), 1)
        z = run(sampler.SAMPLERS[method](), VP, gaussian_x_hat, jnp.ones((1, 1)), keys, levels)
        np.testing.assert_allclose(float(z[0, 0]) / 0.5018595848 - 1, expected, rtol=0.02)


def test_dpm_solver_step():
    """Catches extrapolation in the wrong direction or by the wrong ratio. A step from log-SNR -2 to
    0 after one from -4 gives D = 0.4 and z = 0.932228.
    """
    at = sampler.Step(jnp.array([-2.0]), jnp.array([0.0]), lambda: None)
    carry = jnp.full((1, 1), 0.1), jnp.array([1.0])
    z, (x, h) = sampler.DPMSolver2M().step(
        VP, lambda z, logsnr: jnp.full_like(z, 0.3), jnp.ones((1, 1)), carry, at
    )
    np.testing.assert_allclose([z[0, 0], x[0, 0], h[0]], [0.932228, 0.3, 1.0], rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"method": "ancestral"}, {"method": "ddim"}, {"method": "dpmpp_2m", "grid": "logsnr"}],
)
def test_sampling_can_start_from_a_noised_image(options):
    """Catches a sampler that cannot start in the middle: from an image noised to log-SNR 3, a
    network that knows the image returns it.
    """
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 4)), jnp.float32)
    keywords, keys = settings(steps=12, **options), jax.random.split(jax.random.key(0), 3)
    start = jnp.full(3, 3.0)
    z = VP.diffuse(image, sampler.sample_noise(keys, (4,)), start)
    levels = jnp.append(start[:1], keywords["levels"][keywords["levels"] > 3.0])
    z = sampler.integrate(keywords["sampler"], VP, lambda z, logsnr: image, z, keys, levels)
    alpha, sigma = VP.alpha_sigma(levels[-1:], 2)
    assert np.abs(z - alpha * image).max() < 5 * float(sigma[0, 0]) + 1e-6
