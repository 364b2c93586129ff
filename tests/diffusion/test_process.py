"""The forward process and the conversions between eps, x and v, against float64 NumPy."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from imagen_jax.diffusion import process

LOGSNR = np.array([-12.0, -5.0, -1.3, 0.0, 0.7, 4.0, 11.0])


def sigmoid(value):
    return 1.0 / (1.0 + np.exp(-np.asarray(value, np.float64)))


@pytest.fixture
def arrays():
    """x, eps [7 2 3 3] in float32 and alpha, sigma [7 1 1 1] in float64 for LOGSNR."""
    rng = np.random.default_rng(0)
    x, eps = rng.uniform(-1, 1, (7, 2, 3, 3)), rng.standard_normal((7, 2, 3, 3))
    alpha, sigma = (np.sqrt(sigmoid(sign * LOGSNR)).reshape(7, 1, 1, 1) for sign in (1, -1))
    return x.astype(np.float32), eps.astype(np.float32), alpha, sigma


def test_alpha_sigma_are_variance_preserving():
    """Catches sigma and alpha swapped, a missing square root, and alpha^2 + sigma^2 != 1."""
    logsnr = jnp.linspace(-20.0, 20.0, 101)
    alpha, sigma = process.alpha_sigma(logsnr, 4)
    assert alpha.shape == sigma.shape == (101, 1, 1, 1)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)
    np.testing.assert_allclose(alpha.ravel(), np.sqrt(sigmoid(logsnr)), rtol=1e-5)
    np.testing.assert_allclose(sigma.ravel(), np.sqrt(sigmoid(-np.asarray(logsnr))), rtol=1e-5)


def test_alpha_sigma_in_fp32():
    """Catches the noise levels computed in bf16 when a network hands its log-SNR back in low precision."""
    alpha, sigma = process.alpha_sigma(jnp.array([4.0], jnp.bfloat16), 2)
    assert alpha.dtype == sigma.dtype == jnp.float32
    np.testing.assert_allclose(sigma, [[np.sqrt(sigmoid(-4.0))]], rtol=1e-5)


def test_diffuse(arrays):
    """Catches z = sigma x + alpha eps, and one noise level used for the whole batch."""
    x, eps, alpha, sigma = arrays
    z = process.diffuse(jnp.asarray(x), jnp.asarray(eps), jnp.asarray(LOGSNR, jnp.float32))
    np.testing.assert_allclose(z, alpha * x + sigma * eps, atol=2e-6)


def test_diffuse_keeps_unit_variance():
    """Catches a variance-exploding process (z = x + sigma eps): unit-variance data stays at variance 1 at every level."""
    x, eps = np.random.default_rng(1).standard_normal((2, 4, 4000)).astype(np.float32)
    z = process.diffuse(jnp.asarray(x), jnp.asarray(eps), jnp.array([-8.0, -1.0, 1.0, 8.0]))
    np.testing.assert_allclose(np.var(z, axis=1), 1.0, atol=5 * np.sqrt(2 / 4000))


def test_targets(arrays):
    """Catches v with the wrong sign (sigma x - alpha eps) or with alpha and sigma swapped."""
    x, eps, alpha, sigma = arrays
    target = lambda kind: process.target(kind, jnp.asarray(x), jnp.asarray(eps), jnp.asarray(LOGSNR, jnp.float32))
    np.testing.assert_array_equal(target("eps"), eps)
    np.testing.assert_array_equal(target("x"), x)
    np.testing.assert_allclose(target("v"), alpha * eps - sigma * x, atol=2e-6)


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_a_perfect_output_gives_x_back(prediction, arrays):
    """Catches an inverse that is not the inverse of `target`, for each prediction; 1/alpha = 400 at the noisiest level sets the tolerance."""
    x, eps, alpha, sigma = arrays
    logsnr = jnp.asarray(LOGSNR, jnp.float32)
    z = process.diffuse(jnp.asarray(x), jnp.asarray(eps), logsnr)
    output = process.target(prediction, jnp.asarray(x), jnp.asarray(eps), logsnr)
    x_hat = process.x_from_output(prediction, output, z, logsnr)
    np.testing.assert_array_less(np.abs(x_hat - x), 1e-6 + 1e-6 / alpha * np.ones_like(x))
    np.testing.assert_array_less(np.abs(process.eps_from_x(jnp.asarray(x), z, logsnr) - eps), 1e-6 + 1e-6 / sigma * np.ones_like(x))


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_any_output_is_read_as_the_formula_says(prediction, arrays):
    """Catches a conversion that is right only for consistent (x, eps, z): here the output is arbitrary."""
    z, output, alpha, sigma = arrays
    expected = {"eps": (z - sigma * output) / alpha, "x": output, "v": alpha * z - sigma * output}[prediction]
    x_hat = process.x_from_output(prediction, jnp.asarray(output), jnp.asarray(z), jnp.asarray(LOGSNR, jnp.float32))
    np.testing.assert_allclose(x_hat, expected, rtol=1e-5, atol=1e-5)
    eps_hat = process.eps_from_x(jnp.asarray(x_hat), jnp.asarray(z), jnp.asarray(LOGSNR, jnp.float32))
    np.testing.assert_allclose(eps_hat, (z - alpha * np.asarray(x_hat, np.float64)) / sigma, rtol=1e-4, atol=1e-4)


def test_division_by_alpha_near_t_1_is_in_fp32():
    """Catches x-hat computed in the network's bf16: alpha is 4.5e-5 at log-SNR -20 and the error would be of the order of 100."""
    z, eps = jnp.array([[0.75]]), jnp.array([[0.75]], jnp.bfloat16)
    x_hat = process.x_from_output("eps", eps, z, jnp.array([-20.0]))
    assert x_hat.dtype == jnp.float32
    alpha, sigma = (np.sqrt(sigmoid(sign * 20.0)) for sign in (-1, 1))
    np.testing.assert_allclose(x_hat, [[(0.75 - sigma * 0.75) / alpha]], atol=5e-3)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_low_precision_outputs_become_fp32(prediction):
    """Catches a sampler state that falls to bf16 because the network computes in bf16."""
    one = jnp.ones((1, 2))
    assert process.x_from_output(prediction, one.astype(jnp.bfloat16), one, jnp.zeros(1)).dtype == jnp.float32


def test_unknown_prediction_is_one_clear_line():
    """Catches a misspelled prediction that silently trains or samples as another one."""
    one = jnp.ones((1, 2))
    for call in (lambda: process.target("epsilon", one, one, jnp.zeros(1)), lambda: process.x_from_output("score", one, one, jnp.zeros(1))):
        with pytest.raises(ValueError, match="diffusion.prediction"):
            call()


def test_wrong_shape_fails_with_a_named_dimension():
    """Catches one log-SNR for two images, which would broadcast; the checker of the test session names the dimension b."""
    with pytest.raises(jaxtyping.TypeCheckError, match=r"b=2"):
        process.diffuse(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.zeros(1))


def test_gradients_are_finite_at_both_ends():
    """Catches a square root or a logarithm whose derivative is infinite at log-SNR +-20."""
    loss = lambda x, logsnr: jnp.sum(process.target("v", x, x, logsnr) + process.diffuse(x, x, logsnr))
    for value in (-20.0, 20.0):
        grads = jax.grad(loss, argnums=(0, 1))(jnp.ones((1, 2)), jnp.array([value]))
        assert all(np.all(np.isfinite(g)) for g in grads)
