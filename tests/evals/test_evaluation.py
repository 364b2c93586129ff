"""Errors and samples on a stage whose loss and samples are known."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import schedule
from imagen_jax.diffusion.process import GaussianProcess
from imagen_jax.evals.evaluation import Probe, training_loss, x_hat_error
from imagen_jax.evals.noise_bins import LogsnrBins
from tests.evals import toys
from tests.evals.toys import BINS, LOW, SIZE, N


def eps_of(stage, params, batch, draws, logsnr):
    """The eps that the toy's loss contains."""
    return draws["eps"]


def test_each_bin_has_its_own_times_and_noise(toy):
    """Catches t not kept to its bin, text dropped as in training, one noise for all bins, images or
    splits, and a level that stays when clean."""
    noise = {split: toy.errors(eps_of, split) for split in ("train", "heldout")}
    kept = toy.errors(training_loss, "heldout") - 100 * noise["heldout"]
    clean = toy.errors(training_loss, "heldout", level="clean") - 100 * noise["heldout"]
    bins = np.arange(BINS)
    low, high = 2 * bins / BINS, 2 * (bins + 1) / BINS
    assert ((clean >= low - 1e-3) & (clean <= high + 1e-3)).all()
    assert ((kept > clean) & (kept <= clean + 0.5 + 1e-3)).all()
    values = np.concatenate(list(noise.values()))
    assert len(np.unique(values.round(5))) == values.size
    assert 0.7 < values.std() < 1.3


def test_numbers_do_not_depend_on_the_batch_size(toy):
    """Catches noise drawn by place in the batch, rows of the last, filled up batch counted, and
    order lost."""
    right = toy.errors(training_loss, "heldout")
    other = toys.evaluation(batch_size=16)
    assert len(other.errors(training_loss, "heldout")) == N
    np.testing.assert_allclose(other.errors(training_loss, "heldout"), right, atol=1e-4)
    np.testing.assert_array_equal(other.samples("heldout"), toy.samples("heldout"))
    assert np.abs(toys.evaluation(seed=1).errors(training_loss, "heldout") - right).max() > 1


def test_controls_start_from_the_noise_of_the_right_samples(toy):
    """Catches noise that differs with the condition, which would blur every comparison, and one
    noise for all rows."""
    rows = toy.data.wholes("heldout")
    mark = rows.batch["image"].astype(int)
    noise = toy.samples("heldout") - mark
    np.testing.assert_array_equal(toy.samples("heldout", "shuffled") - mark[rows.other], noise)
    assert len(np.unique(noise.reshape(N, -1), axis=0)) == N


class Crops(toys.Toy):
    """Trains on crops of half the size; its noise says how large it is."""

    crop_size, lowres_size = LOW, LOW

    def draw(self, key, b, size):
        return super().draw(key, b, size) | {"size": jnp.full(b, size[0], jnp.float32)}


class Cropped(toys.Marked):
    """Marked rows that are trained on in crops of half the size."""

    def crops(self, split):
        rows = super().crops(split)
        crop = {"image": rows.batch["image"][:, :LOW, :LOW]}
        return dataclasses.replace(rows, batch=rows.batch | crop)


def test_whole_images_are_denoised_a_few_at_a_time():
    """Catches noise of a crop's size for whole images, crops in place of whole images, and whole
    images by as many as crops."""
    seen = []

    def size_of(stage, params, batch, draws, logsnr):
        seen.append(len(batch["index"]))
        return draws["size"]

    e = toys.evaluation(Crops(), Cropped(), batch_size=8 * (SIZE // LOW) ** 2, bins=1)
    assert (e.errors(size_of, "train", whole=True) == SIZE).all()
    assert max(seen) == 8
    assert (e.errors(size_of, "train") == LOW).all()


def test_functions_are_compiled_once_for_all_parameters(toy):
    """Catches a compilation for each checkpoint, and errors of one set of parameters given for
    another's."""
    traced = []

    def bias_of(stage, params, batch, draws, logsnr):
        traced.append(1)
        return jnp.full(len(logsnr), params["bias"])

    probe = Probe(toy.stage, toy.probe.settings)
    for bias in (1.0, 2.0):
        e = type(toy)(probe, toy.data, {"bias": np.full((), bias)})
        assert (e.errors(bias_of, "train") == bias).all()
    assert len(traced) == 1


def test_bins_do_not_share_their_errors(toy):
    """Catches errors, or a compiled function, of other bins given for these."""
    level = lambda stage, params, batch, draws, logsnr: logsnr
    low, high = (LogsnrBins((edge, edge + 1.0)) for edge in (-3.0, 5.0))
    for bins in (low, high):
        result = toy.errors(level, "train", bins=bins)
        assert ((result >= bins.edges[0]) & (result <= bins.edges[1])).all()
    assert toy.errors(level, "train").shape == (N, BINS)


@pytest.mark.parametrize("t, size", [(0.2, 0.5), (0.5, 0.1)])
def test_x_hat_error_follows_from_the_error_of_eps(t, size):
    """Catches the loss reported as error of x-hat, and x-hat without the bounds that a sampler
    gives it."""
    batch = {"image": jnp.full((2, SIZE, SIZE, 3), 128, jnp.uint8)}
    noise = np.random.default_rng(0).standard_normal((2, SIZE, SIZE, 3))
    eps = jnp.asarray(noise, jnp.float32)
    logsnr = schedule.cosine(jnp.full(2, t))
    alpha, sigma = GaussianProcess("vp", "eps").alpha_sigma(logsnr, 1)
    result = x_hat_error(
        toys.Base(eps, size), {}, batch, {"eps": eps, "drop": jnp.zeros(2, bool)}, logsnr
    )
    np.testing.assert_allclose(result, (sigma / alpha * size) ** 2, rtol=1e-4)
    bounded = x_hat_error(
        toys.Base(eps, -1000.0), {}, batch, {"eps": eps, "drop": jnp.zeros(2, bool)}, logsnr
    )
    np.testing.assert_allclose(bounded, (1 - 128 / 127.5 + 1) ** 2, rtol=1e-4)
