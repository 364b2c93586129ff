"""The error of x-hat for the exact denoiser of a Gaussian, known at each noise level."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.density import LogitNormal, UniformTime
from imagen_jax.diffusion.process import GaussianProcess
from imagen_jax.evals.measures import x_error
from imagen_jax.stage import Stage
from tests.evals import toys

ROWS, SIZE, S = 96, 8, 0.25  # S: standard deviation of the images' pixels


class Gaussian(toys.Base):
    """The exact denoiser of x ~ N(0, S^2), with its x-hat stated as one of the predictions.

    x-hat = alpha S^2 / (S^2 alpha^2 + sigma^2) z, plus `bias`.
    """

    text_drop, aug_max, texts = 0.1, 1.0, ()
    draw = Stage.draw

    def __init__(self, prediction="eps", density=UniformTime("cosine"), bias=0.0):
        process = GaussianProcess("vp", prediction)
        for name, value in {"process": process, "density": density, "bias": bias}.items():
            object.__setattr__(self, name, value)

    def batch_shapes(self, b, size):
        return {"image": None}

    def denoiser(self, params, dropout_key=None):
        def output(z, logsnr, cond):
            alpha, sigma = (levels(sign * logsnr)[:, None, None, None] for sign in (1, -1))
            x = alpha * S**2 / (S**2 * alpha**2 + sigma**2) * z + self.bias
            eps = (z - alpha * x) / sigma
            return {"x": x, "eps": eps, "v": alpha * eps - sigma * x}[self.process.prediction]

        return output


def levels(logsnr):
    return jnp.sqrt(jax.nn.sigmoid(logsnr))


class Pixels(toys.Marked):
    """Images of independent Gaussian pixels."""

    def crops(self, split):
        rng = np.random.default_rng(["train", "heldout"].index(split))
        x = rng.normal(0.0, S, (ROWS, SIZE, SIZE, 3))
        image = np.round((np.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
        return toys.Rows(split, {"image": image, "index": np.arange(ROWS)}, 5)


@functools.cache
def evaluation(*stage):
    return toys.evaluation(Gaussian(*stage), Pixels())


def logsnr_of(stage, params, batch, draws, logsnr):
    """The log-SNR a row's error was taken at."""
    return logsnr


def test_error_in_each_bin_is_that_of_the_exact_denoiser():
    """Catches an error of eps or v, bins of t, a mean that is weighted by a schedule, and bins in
    another order than their edges."""
    e = evaluation()
    result = x_error.measure(e)
    for split in ("train", "heldout"):
        level = e.errors(logsnr_of, split, bins=x_error.BINS)
        alpha2, sigma2 = (1 / (1 + np.exp(-sign * level)) for sign in (1, -1))
        known = (S**2 * sigma2 / (S**2 * alpha2 + sigma2)).mean(axis=0)
        bins = result[split]["bins"]
        assert [entry["logsnr"] for entry in bins] == [[i, i + 2] for i in range(-14, 14, 2)]
        np.testing.assert_allclose([entry["mean"] for entry in bins], known, rtol=0.04)
        overall = result[split]["overall"]
        assert overall["mean"] == pytest.approx(known.mean(), rel=0.02) and overall["n"] == ROWS
    assert result["train"] != result["heldout"]


def test_log_snr_is_uniform_in_fixed_bins():
    """Catches one noise level for all rows or for both splits, levels outside their bin, and levels
    heaped where a schedule has them."""
    levels = lambda split: evaluation().errors(logsnr_of, split, bins=x_error.BINS)
    result = np.concatenate([levels("train"), levels("heldout")])
    positions = (result - np.arange(-14, 14, 2)) / 2
    assert positions.min() >= 0 and positions.max() <= 1
    assert len(np.unique(positions.round(5))) > 0.95 * positions.size
    ranks = (np.arange(2 * ROWS) + 0.5) / (2 * ROWS)
    assert np.abs(np.sort(positions, axis=0) - ranks[:, None]).max() < 2 / (2 * ROWS) ** 0.5


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("density", [UniformTime("linear"), LogitNormal(0.0, 1.0)])
def test_recipes_with_the_same_x_hat_have_the_same_error(prediction, density):
    """Catches an error in the unit of the prediction, and noise or noise levels that differ between
    arms: row by row, not only in the mean."""
    result, other = (evaluation(*stage) for stage in (("eps",), (prediction, density)))
    for split in ("train", "heldout"):
        errors = [e.errors(x_error.x_hat_error, split, bins=x_error.BINS) for e in (result, other)]
        np.testing.assert_allclose(*errors, rtol=2e-3)
        values = [x_error.row_values(e)[f"{split}.overall.mean"] for e in (result, other)]
        np.testing.assert_allclose(*values, rtol=1e-3)


def test_x_hat_is_clipped():
    """Catches an error that no sampler would make: x-hat far outside of [-1, 1]."""
    result = x_error.measure(evaluation("x", UniformTime("cosine"), 100.0))["heldout"]
    for entry in result["bins"]:
        assert entry["mean"] == pytest.approx(1 + S**2, rel=0.02)


def test_report_has_a_line_and_a_curve_for_each_split():
    """Catches a bin without a place on the axis of log-SNR."""
    result = x_error.measure(evaluation())
    mean = result["heldout"]["overall"]["mean"]
    assert dict(x_error.lines(result))["squared error, x-hat, heldout"].startswith(
        f"{mean:.4g} +- "
    )
    ((_, curves),) = x_error.curves(result)
    assert [entry["logsnr_centre"] for entry in curves["train"]["bins"]] == list(range(-13, 14, 2))
