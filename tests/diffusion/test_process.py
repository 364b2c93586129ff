"""The forward processes and the conversions between eps, x, v and u, against float64 NumPy."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from imagen_jax.diffusion.process import ALPHA_SIGMA, PREDICTIONS, GaussianProcess

VP, FLOW = GaussianProcess("vp", "eps"), GaussianProcess("flow", "eps")
LOGSNR = np.array([-12.0, -5.0, -1.3, 0.0, 0.7, 4.0, 11.0])


def sigmoid(value):
    return 1.0 / (1.0 + np.exp(-np.asarray(value, np.float64)))


@pytest.fixture
def arrays():
    """x and eps [7 2 3 3] in float32, and alpha and sigma [7 1 1 1] in float64, for LOGSNR."""
    rng = np.random.default_rng(0)
    x, eps = rng.uniform(-1, 1, (7, 2, 3, 3)), rng.standard_normal((7, 2, 3, 3))
    alpha, sigma = (np.sqrt(sigmoid(sign * LOGSNR)).reshape(7, 1, 1, 1) for sign in (1, -1))
    return x.astype(np.float32), eps.astype(np.float32), alpha, sigma


def test_alpha_sigma_are_variance_preserving():
    """Catches sigma and alpha swapped, a missing square root, and alpha^2 + sigma^2 != 1."""
    logsnr = jnp.linspace(-20.0, 20.0, 101)
    alpha, sigma = VP.alpha_sigma(logsnr, 4)
    assert alpha.shape == sigma.shape == (101, 1, 1, 1)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)
    np.testing.assert_allclose(alpha.ravel(), np.sqrt(sigmoid(logsnr)), rtol=1e-5)
    np.testing.assert_allclose(sigma.ravel(), np.sqrt(sigmoid(-np.asarray(logsnr))), rtol=1e-5)


def test_alpha_sigma_in_fp32():
    """Catches alpha and sigma computed in bf16 when the log-SNR has low precision."""
    alpha, sigma = VP.alpha_sigma(jnp.array([4.0], jnp.bfloat16), 2)
    assert alpha.dtype == sigma.dtype == jnp.float32
    np.testing.assert_allclose(sigma, [[np.sqrt(sigmoid(-4.0))]], rtol=1e-5)


def test_diffuse(arrays):
    """Catches z = sigma x + alpha eps, and one noise level used for the whole batch."""
    x, eps, alpha, sigma = arrays
    z = VP.diffuse(jnp.asarray(x), jnp.asarray(eps), jnp.asarray(LOGSNR, jnp.float32))
    np.testing.assert_allclose(z, alpha * x + sigma * eps, atol=2e-6)


def test_diffuse_keeps_unit_variance():
    """Catches a variance-exploding process (z = x + sigma eps): data of unit variance keeps it at
    every level.
    """
    x, eps = np.random.default_rng(1).standard_normal((2, 4, 4000)).astype(np.float32)
    z = VP.diffuse(jnp.asarray(x), jnp.asarray(eps), jnp.array([-8.0, -1.0, 1.0, 8.0]))
    np.testing.assert_allclose(np.var(z, axis=1), 1.0, atol=5 * np.sqrt(2 / 4000))


def test_targets(arrays):
    """Catches v with the wrong sign (sigma x - alpha eps) or with alpha and sigma swapped."""
    x, eps, alpha, sigma = arrays
    target = lambda kind: GaussianProcess("vp", kind).target(
        jnp.asarray(x), jnp.asarray(eps), jnp.asarray(LOGSNR, jnp.float32)
    )
    np.testing.assert_array_equal(target("eps"), eps)
    np.testing.assert_array_equal(target("x"), x)
    np.testing.assert_allclose(target("v"), alpha * eps - sigma * x, atol=2e-6)
    np.testing.assert_allclose(target("u"), eps - x, atol=2e-6)


EVERY = [(path, prediction) for path in ALPHA_SIGMA for prediction in PREDICTIONS]


def levels(path):
    """alpha and sigma [7 1 1 1] of a path at LOGSNR, in float64."""
    scale, power = {"vp": (1.0, 0.5), "flow": (0.5, 1.0)}[path]
    return tuple((sigmoid(sign * scale * LOGSNR) ** power).reshape(7, 1, 1, 1) for sign in (1, -1))


@pytest.mark.parametrize("path, prediction", EVERY)
def test_a_perfect_output_gives_x_back(path, prediction, arrays):
    """Catches a conversion that does not invert `target`, for each path and prediction. The
    tolerance follows from 1/alpha = 400 at the noisiest level.
    """
    x, eps, *_ = arrays
    alpha, sigma = levels(path)
    process, logsnr = GaussianProcess(path, prediction), jnp.asarray(LOGSNR, jnp.float32)
    z = process.diffuse(jnp.asarray(x), jnp.asarray(eps), logsnr)
    output = process.target(jnp.asarray(x), jnp.asarray(eps), logsnr)
    x_hat = process.x_from_output(output, z, logsnr)
    np.testing.assert_array_less(np.abs(x_hat - x), 1e-6 + 1e-6 / alpha * np.ones_like(x))
    np.testing.assert_array_less(
        np.abs(process.eps_from_x(jnp.asarray(x), z, logsnr) - eps),
        1e-6 + 1e-6 / sigma * np.ones_like(x),
    )


@pytest.mark.parametrize("path, prediction", EVERY)
def test_any_output_is_read_as_the_formula_says(path, prediction, arrays):
    """Catches a conversion that is right only for consistent (x, eps, z): here the output is
    arbitrary.
    """
    z, output, *_ = arrays
    alpha, sigma = levels(path)
    v = (alpha * z - sigma * output) / (alpha**2 + sigma**2)
    u = (z - sigma * output) / (alpha + sigma)
    expected = {"eps": (z - sigma * output) / alpha, "x": output, "v": v, "u": u}[prediction]
    process, logsnr = GaussianProcess(path, prediction), jnp.asarray(LOGSNR, jnp.float32)
    x_hat = process.x_from_output(jnp.asarray(output), jnp.asarray(z), logsnr)
    np.testing.assert_allclose(x_hat, expected, rtol=1e-5, atol=1e-5)
    eps_hat = process.eps_from_x(jnp.asarray(x_hat), jnp.asarray(z), logsnr)
    wanted = (z - alpha * np.asarray(x_hat, np.float64)) / sigma
    np.testing.assert_allclose(eps_hat, wanted, rtol=1e-4, atol=1e-4)


def test_the_flow_path_is_straight():
    """Catches alpha = t, and a log-SNR that is not log(alpha^2 / sigma^2): at time t, z = (1 - t) x
    + t eps.
    """
    t = np.array([0.1, 0.25, 0.5, 0.9])
    alpha, sigma = FLOW.alpha_sigma(jnp.asarray(2 * np.log((1 - t) / t), jnp.float32), 1)
    np.testing.assert_allclose(alpha, 1 - t, rtol=1e-6)
    np.testing.assert_allclose(sigma, t, rtol=1e-6)


@pytest.mark.parametrize("path, prediction", EVERY)
def test_output_scale_is_the_ratio_of_squared_errors(path, prediction, arrays):
    """Catches alpha and sigma exchanged or not squared: the output's change for an error of 0.1 in
    eps is computed directly.
    """
    x, eps, *_ = arrays
    process, logsnr = GaussianProcess(path, prediction), jnp.asarray(LOGSNR, jnp.float32)
    alpha, sigma = levels(path)
    off = x - sigma / alpha * 0.1  # the x-hat that goes with eps + 0.1 at the same z
    wrong = {
        "eps": eps + 0.1,
        "x": off,
        "v": alpha * (eps + 0.1) - sigma * off,
        "u": eps + 0.1 - off,
    }[prediction]
    right = {"eps": eps, "x": x, "v": alpha * eps - sigma * x, "u": eps - x}[prediction]
    ratio = np.mean(((wrong - right) / 0.1) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(process.output_scale(logsnr), ratio, rtol=1e-3)


def test_prior_has_the_variance_of_noise_at_that_level():
    """Catches unit noise on the flow path, which has less, and a scaled start of the paper's
    process.
    """
    noise, logsnr = jnp.ones((1, 2)), jnp.array([-8.764])
    np.testing.assert_array_equal(VP.prior(noise, logsnr), noise)
    np.testing.assert_allclose(
        FLOW.prior(noise, logsnr), sigmoid(8.764 / 2) * np.ones((1, 2)), rtol=1e-5
    )


def test_division_by_alpha_near_t_1_is_in_fp32():
    """Catches x-hat computed in bf16: alpha is 4.5e-5 at log-SNR -20, and the error would be about
    100.
    """
    z, eps = jnp.array([[0.75]]), jnp.array([[0.75]], jnp.bfloat16)
    x_hat = GaussianProcess("vp", "eps").x_from_output(eps, z, jnp.array([-20.0]))
    assert x_hat.dtype == jnp.float32
    alpha, sigma = (np.sqrt(sigmoid(sign * 20.0)) for sign in (-1, 1))
    np.testing.assert_allclose(x_hat, [[(0.75 - sigma * 0.75) / alpha]], atol=5e-3)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_low_precision_outputs_become_fp32(prediction):
    """Catches a sampler state in bf16 because the network computes in bf16."""
    one = jnp.ones((1, 2))
    assert (
        GaussianProcess("vp", prediction)
        .x_from_output(one.astype(jnp.bfloat16), one, jnp.zeros(1))
        .dtype
        == jnp.float32
    )


def test_unknown_names_are_no_other_choice():
    """Catches a misspelled prediction or path that silently trains or samples as another."""
    one, logsnr = jnp.ones((1, 2)), jnp.zeros(1)
    for method in ("target", "x_from_output"):
        with pytest.raises(KeyError, match="score"):
            getattr(GaussianProcess("vp", "score"), method)(one, one, logsnr)
    with pytest.raises(KeyError, match="edm"):
        GaussianProcess("edm", "eps").diffuse(one, one, logsnr)


def test_wrong_shape_fails_with_a_named_dimension():
    """Catches one log-SNR for two images, which would broadcast; the type checker names the
    dimension b.
    """
    with pytest.raises(jaxtyping.TypeCheckError, match=r"b=2"):
        VP.diffuse(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.zeros(1))


def test_gradients_are_finite_at_both_ends():
    """Catches a square root or a logarithm whose derivative is infinite at log-SNR +-20."""
    loss = lambda x, logsnr: jnp.sum(
        GaussianProcess("vp", "v").target(x, x, logsnr) + VP.diffuse(x, x, logsnr)
    )
    for value in (-20.0, 20.0):
        grads = jax.grad(loss, argnums=(0, 1))(jnp.ones((1, 2)), jnp.array([value]))
        assert all(np.all(np.isfinite(g)) for g in grads)
