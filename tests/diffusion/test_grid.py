"""Sampling grids: the noise levels at which the network is evaluated."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import grid
from imagen_jax.diffusion.schedule import linear


def test_uniform_time():
    """Catches a grid that is off by one, does not start at t = 1 or evaluates at t = 0."""
    np.testing.assert_allclose(
        grid.TimeGrid("linear")(5), linear(jnp.array([1.0, 0.8, 0.6, 0.4, 0.2])), rtol=1e-5
    )


def test_uniform_logsnr():
    """Catches a last evaluation that is not at the given end."""
    np.testing.assert_allclose(grid.LogSNRGrid((-9.0, 6.0))(4), [-9.0, -4.0, 1.0, 6.0], rtol=1e-6)
    np.testing.assert_allclose(grid.LogSNRGrid((-9.0, 6.0))(1), [-9.0])


def test_karras():
    """Catches rho inverted, and log-SNR used as log sigma: compared with the published 18 sigmas
    from 80 to 0.002 with rho 7.
    """
    ends = (-2 * math.log(80), -2 * math.log(0.002))
    levels = np.asarray(grid.KarrasGrid(ends, 7.0)(18))
    sigmas = np.exp(-levels[[0, 1, 2, 9, 16, 17]] / 2)
    np.testing.assert_allclose(sigmas, [80, 57.586, 40.786, 1.9233, 0.0075, 0.002], rtol=5e-3)
    assert len(levels) == 18 and np.all(np.diff(levels) > 0)


@pytest.mark.parametrize("rho", [1.0, 3.0])
def test_karras_by_its_formula(rho):
    """Catches a rho that is ignored: sigma_i = (a + i/(n-1) (b - a))^rho with a = first^(1/rho) and
    b = last^(1/rho). With rho 1 the sigmas are evenly spaced.
    """
    first, last = np.exp(-0.5 * np.array([-8.0, 6.0]))
    a, b = first ** (1 / rho), last ** (1 / rho)
    sigmas = (a + np.linspace(0, 1, 6) * (b - a)) ** rho
    levels = np.asarray(grid.KarrasGrid((-8.0, 6.0), rho)(6), np.float64)
    np.testing.assert_allclose(np.exp(-levels / 2), sigmas, rtol=1e-3)


@pytest.mark.parametrize(
    "levels, steps",
    [
        (grid.KarrasGrid((-10.0, 10.0), 0.05), 8),  # exp overflows
        (grid.KarrasGrid((-10.0, 10.0), 1e8), 8),  # the roots coincide
        (
            grid.LogSNRGrid(
                (12.0, 12.000001),
            ),
            8,
        ),  # closer than fp32 resolves
    ],
)
def test_levels_that_fp32_cannot_tell_apart_are_refused(levels, steps):
    """Catches a grid whose NaN or equal levels become black pictures."""
    with pytest.raises(ValueError, match="not finite and ascending in fp32"):
        grid.check_levels(levels, steps)


def test_usual_grids_are_accepted():
    """Catches a check that refuses the grids that configs use, or a single step."""
    for steps in (1, 8, 1000):
        grid.check_levels(grid.KarrasGrid((-10.0, 10.0), 7.0), steps)
        grid.check_levels(grid.LogSNRGrid((-20.0, 20.0)), steps)
