"""Densities of the training noise as quantile functions, against their published forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import density
from imagen_jax.diffusion.schedule import cosine

U = (jnp.arange(20_000) + 0.5) / 20_000


def test_uniform_time_is_the_schedule():
    """Catches another map from t to log-SNR, which would change every training."""
    np.testing.assert_array_equal(density.UniformTime("cosine")(U), cosine(U))


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.8, 0.8)])
def test_logit_normal(mean, std):
    """Catches time reversed: log-SNR ~ N(-2 mean, (2 std)^2), with the mean in time of the flow
    path.
    """
    logsnr = np.asarray(density.LogitNormal(mean, std)(U), np.float64)
    np.testing.assert_allclose([logsnr.mean(), logsnr.std()], [-2 * mean, 2 * std], atol=2e-3)
    t = np.asarray(jax.nn.sigmoid(-0.5 * density.LogitNormal(mean, std)(jnp.array([0.5]))))
    np.testing.assert_allclose(np.log(t / (1 - t)), [mean], atol=1e-5)  # the median time


def test_every_density_falls_and_is_finite():
    """Catches an increasing quantile function, which would give paired runs opposite noise levels,
    and an infinite log-SNR at the ends.
    """
    for quantile in (density.UniformTime("linear"), density.LogitNormal(0.0, 1.0)):
        logsnr = np.asarray(quantile(jnp.array([0.0, 0.1, 0.5, 0.9, 1.0])))
        assert (
            np.all(np.isfinite(logsnr))
            and np.all(np.diff(logsnr) < 0)
            and np.abs(logsnr).max() <= 20.0
        )


def test_a_width_of_zero_is_refused():
    """Catches a density with a single noise level."""
    with pytest.raises(ValueError, match="diffusion.density_std is 0.0"):
        density.LogitNormal(0.0, 0.0)
