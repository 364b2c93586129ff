"""Densities of training noise as quantile functions, against their published forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import density
from imagen_jax.diffusion.schedule import cosine

U = (jnp.arange(20_000) + 0.5) / 20_000


def test_uniform_time_is_the_schedule():
    """Catches another map from t to log-SNR, which would change every training of before."""
    np.testing.assert_array_equal(density.UniformTime("cosine")(U), cosine(U))


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.8, 0.8)])
def test_logit_normal(mean, std):
    """Catches the direction of time reversed: log-SNR is N(-2 mean, (2 std)^2) with the mean in
    noise time.
    """
    logsnr = np.asarray(density.LogitNormal(mean, std)(U), np.float64)
    np.testing.assert_allclose([logsnr.mean(), logsnr.std()], [-2 * mean, 2 * std], atol=2e-3)
    t = np.asarray(jax.nn.sigmoid(-0.5 * density.LogitNormal(mean, std)(jnp.array([0.5]))))
    np.testing.assert_allclose(np.log(t / (1 - t)), [mean], atol=1e-5)  # the median time


def test_every_density_falls_and_is_finite():
    """Catches a quantile function that rises, so that pairs of trainings would see opposite noise,
    and an infinite log-SNR at the ends.
    """
    for made in (density.UniformTime("linear"), density.LogitNormal(0.0, 1.0)):
        logsnr = np.asarray(made(jnp.array([0.0, 0.1, 0.5, 0.9, 1.0])))
        assert (
            np.all(np.isfinite(logsnr))
            and np.all(np.diff(logsnr) < 0)
            and np.abs(logsnr).max() <= 20.0
        )


def test_a_width_of_zero_is_refused():
    """Catches a density that has one noise level alone."""
    with pytest.raises(ValueError, match="diffusion.density_std is 0.0"):
        density.LogitNormal(0.0, 0.0)
