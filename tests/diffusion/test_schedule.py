"""Noise schedules against the values of the paper's formulas (Appendix A, F.1-F.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import schedule

COSINE = {
    0.1: 3.6850,
    0.2: 2.2482,
    0.25: 1.7626,
    0.3: 1.3485,
    0.5: 0.0,
    0.75: -1.7626,
    0.9: -3.6850,
    0.999: -12.8555,
}
LINEAR = {0.1: 2.1566, 0.3: -0.4208, 0.5: -2.4551, 0.9: -8.1492, 1.0: -10.0500}
FLOW = {0.1: 4.3944, 0.25: 2.1972, 0.5: 0.0, 0.75: -2.1972, 0.9: -4.3944}
LINEAR_1000_STEPS = {0.1: 2.1645, 0.3: -0.4204, 0.5: -2.4617, 0.9: -8.1977, 1.0: -10.1177}


@pytest.mark.parametrize("name, anchors", [("cosine", COSINE), ("linear", LINEAR), ("flow", FLOW)])
def test_anchors(name, anchors):
    """Catches the cosine schedule with offset s = 0.008, which differs by 0.14 at t = 0.1, and the
    linear schedule as expm1(1e-4 + 10 t^2).
    """
    logsnr = schedule.SCHEDULES[name](jnp.array(list(anchors)))
    np.testing.assert_allclose(logsnr, list(anchors.values()), atol=6e-5, rtol=3e-6)


def test_linear_follows_the_thousand_steps():
    """Catches another beta range than 1e-4 to 0.02: the reference is the product of 1 - beta_i over
    1000 steps, computed here.
    """
    log_abar = np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000)))
    logsnr = log_abar - np.log(-np.expm1(log_abar))
    for t, printed in LINEAR_1000_STEPS.items():
        assert logsnr[round(1000 * t) - 1] == pytest.approx(printed, abs=1e-4)
    t = np.arange(20, 1001) / 1000
    np.testing.assert_allclose(schedule.linear(jnp.asarray(t, jnp.float32)), logsnr[19:], atol=0.08)


@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_decreasing_and_clipped(name):
    """Catches an increasing schedule, an end beyond +-20 in fp32, and a NaN or infinity at t = 0 or
    1.
    """
    logsnr = np.asarray(jax.jit(schedule.SCHEDULES[name])(jnp.linspace(0.0, 1.0, 1001)))
    assert np.all(np.isfinite(logsnr)) and np.all(np.diff(logsnr) < 0)
    assert logsnr[0] == pytest.approx(20.0, abs=1e-3) and logsnr.max() <= 20.0
    assert (
        logsnr[-1]
        == pytest.approx({"cosine": -20.0, "linear": -10.05, "flow": -20.0}[name], abs=1e-2)
        and logsnr.min() >= -20.0
    )


def test_linear_ends_where_its_formula_does():
    """Catches an upper clip below 20: the formula exceeds 16 at t = 1e-6."""
    t = np.array([1e-8, 1e-6, 1e-4])
    expected = np.minimum(-np.log(np.expm1(0.1 * t + 9.95 * t**2)), 20.0)
    np.testing.assert_allclose(schedule.linear(jnp.asarray(t, jnp.float32)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_low_precision_times_are_computed_in_fp32(name):
    """Catches a schedule computed in the type of t: bf16 arithmetic loses two digits."""
    t = jnp.array([0.125, 0.5, 0.875])  # exact in bf16
    low = schedule.SCHEDULES[name](t.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    np.testing.assert_array_equal(low, schedule.SCHEDULES[name](t))


def test_names():
    """Catches schedules exchanged in the table of names that configs use."""
    assert {
        "cosine": schedule.cosine,
        "linear": schedule.linear,
        "flow": schedule.flow,
    } == schedule.SCHEDULES
