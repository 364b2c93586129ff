"""Classifier-free guidance (eq. 2) and thresholding (section 2.3)."""

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import guidance
from imagen_jax.diffusion.guidance import Guidance, Threshold

EVERYWHERE = (-20.0, 20.0)


def network(calls):
    """A denoise_fn that returns 0.1 z + logsnr + the first text feature, and records each call's
    batch.
    """

    def denoise_fn(z, logsnr, cond):
        calls.append((z, logsnr, cond))
        return 0.1 * z + (logsnr + cond["text"][:, 0, 0])[:, None]

    return denoise_fn


Z = jnp.arange(6.0).reshape(2, 3)
LOGSNR = jnp.array([0.5, -0.5])
COND = {
    "text": jnp.array([2.0, 3.0]).reshape(2, 1, 1) * jnp.ones((2, 4, 1)),
    "text_mask": jnp.ones((2, 4), bool),
}


@pytest.mark.parametrize("w", [0.0, 0.5, 1.35, 2.0, 8.0])
def test_guided_output_is_equation_2(w):
    """Catches the convention shifted by one, (1 + w) eps_c - w eps_null, and the two halves
    exchanged.
    """
    unconditional = 0.1 * np.asarray(Z) + np.asarray(LOGSNR)[:, None]
    conditional = unconditional + np.array([[2.0], [3.0]])
    guided = guidance.guide(network([]), Guidance(w, EVERYWHERE), COND)(Z, LOGSNR)
    np.testing.assert_allclose(
        guided, w * conditional + (1 - w) * unconditional, rtol=1e-5, atol=1e-5
    )


def test_both_halves_run_in_one_batch():
    """Catches two evaluations in place of one with twice the batch, rows of a sample that are not
    neighbours (on a mesh they would move between devices), and an unconditional row without its
    null text, z or noise level.
    """
    calls = []
    guidance.guide(network(calls), Guidance(3.0, EVERYWHERE), COND)(Z, LOGSNR)
    ((z, logsnr, cond),) = calls
    np.testing.assert_array_equal(z, np.repeat(Z, 2, axis=0))
    np.testing.assert_array_equal(logsnr, np.repeat(LOGSNR, 2))
    np.testing.assert_array_equal(cond["text"][::2], COND["text"])
    np.testing.assert_array_equal(cond["text"][1::2], 0.0)
    np.testing.assert_array_equal(cond["text_mask"], 2 * [4 * [True], [True, False, False, False]])


def test_w_1_is_the_network_itself():
    """Catches a second evaluation at w = 1, and an output that only approximates the network's."""
    calls = []
    output = guidance.guide(network(calls), Guidance(1.0, EVERYWHERE), COND)(Z, LOGSNR)
    assert len(calls) == 1 and calls[0][0].shape == Z.shape
    np.testing.assert_array_equal(output, network([])(Z, LOGSNR, COND))


def test_low_precision_outputs_are_combined_in_fp32():
    """Catches w eps_c + (1 - w) eps_null in bf16, where a large w multiplies the rounding of a
    difference.
    """
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(rng.standard_normal((4, 50)), jnp.bfloat16)
    guided = guidance.guide(lambda z, logsnr, cond: outputs, Guidance(8.3, EVERYWHERE), COND)(
        jnp.zeros((2, 50)), LOGSNR
    )
    exact = np.asarray(outputs, np.float64)
    np.testing.assert_allclose(guided, 8.3 * exact[::2] - 7.3 * exact[1::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "cond", [{}, {"lowres": jnp.ones((2, 1, 1, 3)), "lowres_logsnr": jnp.zeros(2)}]
)
def test_without_text_guidance_changes_nothing(cond):
    """Catches an error or a doubled batch in a stage without text, where both terms of eq. 2 are
    equal.
    """
    calls = []
    denoise_fn = lambda z, logsnr, cond: calls.append(z.shape) or 0.5 * z
    np.testing.assert_array_equal(
        guidance.guide(denoise_fn, Guidance(3.0, EVERYWHERE), cond)(Z, LOGSNR), 0.5 * Z
    )
    assert calls == [Z.shape]


def test_an_interval_guides_each_sample_by_its_own_level():
    """Catches one decision for the whole batch: of two samples, only the one with first <= log-SNR
    < last is guided.
    """
    unconditional = 0.1 * np.asarray(Z) + np.asarray(LOGSNR)[:, None]
    conditional = unconditional + np.array([[2.0], [3.0]])
    guided = guidance.guide(network([]), Guidance(4.0, (-0.5, 0.5)), COND)(Z, LOGSNR)
    np.testing.assert_allclose(guided[0], conditional[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        guided[1], 4 * conditional[1] - 3 * unconditional[1], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("interval", [EVERYWHERE, (-0.2, 0.2)])
@pytest.mark.parametrize("w", [1.0, 3.0])
def test_the_text_is_prepared_once(w, interval):
    """Catches text that is projected at every evaluation, and rows of the prepared text that go to
    another sample.
    """
    prepared = []

    def prepare(cond):
        prepared.append(cond)
        return cond | {"values": {"first": cond["text"][:, 0, 0]}}

    denoise_fn = lambda z, logsnr, cond: 0.1 * z + (logsnr + cond["values"]["first"])[:, None]
    weights = Guidance(w, interval)
    guided = guidance.guide(denoise_fn, weights, COND, prepare)
    expected = guidance.guide(network([]), weights, COND)
    for logsnr in (LOGSNR, 0.1 * LOGSNR):  # outside and inside the interval
        np.testing.assert_array_equal(guided(Z, logsnr), expected(Z, logsnr))
    assert len(prepared) == 1


def test_no_threshold_changes_nothing():
    """Catches clipping that cannot be turned off."""
    x = jnp.array([[-7.0, 0.1, 9.0]])
    np.testing.assert_array_equal(Threshold("none", 99.5)(x), x)


def test_static_threshold():
    """Catches clipping to [0, 1] or scaling by the maximum instead of clipping to [-1, 1]."""
    x = jnp.array([[-7.0, -0.5, 0.25, 9.0]])
    np.testing.assert_array_equal(Threshold("static", 99.5)(x), [[-1.0, -0.5, 0.25, 1.0]])


@pytest.mark.parametrize(
    "percentile, s",
    [(99.5, 1.99), (100.0, 2.0), (75.0, 1.5), (60.0, 1.2), (25.0, 1.0), (0.995, 1.0)],
)
def test_dynamic_threshold_of_a_known_distribution(percentile, s):
    """Catches a percentile on a 0-1 scale (0.995 would clip at |x| = 0.02, or give s = 1), a
    missing division by s, and s below 1.
    """
    magnitude = np.linspace(0.0, 2.0, 201)
    x = magnitude * np.where(np.arange(201) % 2, -1.0, 1.0)
    out = Threshold("dynamic", percentile)(jnp.asarray(x, jnp.float32)[None])
    np.testing.assert_allclose(out[0], np.clip(x, -s, s) / s, atol=2e-6)


def test_dynamic_threshold_leaves_images_in_range_alone():
    """Catches s = percentile without max(s, 1), which would increase the contrast of every dull
    image.
    """
    x = jnp.asarray(np.random.default_rng(0).uniform(-0.3, 0.3, (2, 4, 4, 3)), jnp.float32)
    np.testing.assert_array_equal(Threshold("dynamic", 99.5)(x), x)


def test_dynamic_threshold_does_not_leak_across_the_batch():
    """Catches a percentile over the batch axis, where a bright image would darken the others."""
    rng = np.random.default_rng(0)
    dull, bright = (
        jnp.asarray(scale * rng.standard_normal((1, 4, 4, 3)), jnp.float32) for scale in (0.6, 9.0)
    )
    together = Threshold("dynamic", 90.0)(jnp.concatenate([dull, bright]))
    alone = jnp.concatenate([Threshold("dynamic", 90.0)(x) for x in (dull, bright)])
    np.testing.assert_array_equal(together, alone)


def test_dynamic_threshold_is_over_pixels_and_channels_together():
    """Catches one s per channel or per row, which would shift colours."""
    x = np.zeros((1, 10, 10, 3), np.float32)
    x[..., 0], x[..., 1] = 4.0, 0.5
    out = np.asarray(Threshold("dynamic", 99.5)(jnp.asarray(x)))
    np.testing.assert_allclose(out[0, 0, 0], [1.0, 0.125, 0.0])
    assert out.shape == x.shape


def test_an_unknown_threshold_is_no_other_choice():
    """Catches a misspelled threshold that is silently treated as "none"."""
    with pytest.raises(KeyError, match="Dynamic"):
        Threshold("Dynamic", 99.5)(jnp.ones((1, 2)))
