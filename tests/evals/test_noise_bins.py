"""Where bins lie, the noise levels drawn in them, and numbers by bin."""

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.density import LogitNormal, UniformTime
from imagen_jax.evals import noise_bins, statistics
from imagen_jax.evals.noise_bins import LogsnrBins, TrainingBins

SAME = np.repeat(np.array([[1.0], [2.0], [6.0]]), 4, axis=1)
EDGES = [20.0, 4.0, 0.0, -4.0, -20.0]
CENTRES = [6.0, 2.0, -2.0, -6.0]


def test_overall_error_takes_an_image_as_one_value():
    """Catches all n * k values taken as independent: bins of an image share its content, here
    completely."""
    result = noise_bins.by_bin(SAME, EDGES, CENTRES, [0.0, 0.25, 0.5, 0.75, 1.0])
    mean = {"mean": 3.0, "se": pytest.approx(np.sqrt(7.0 / 3)), "n": 3}
    assert result["overall"] == mean
    assert (
        result["bins"][1] == {"t": [0.25, 0.5], "logsnr": [4.0, 0.0], "logsnr_centre": 2.0} | mean
    )


def test_bins_without_times_lie_between_their_edges():
    """Catches a "t" that is made up, and a centre at an edge."""
    result = noise_bins.by_bin(SAME, EDGES)["bins"]
    assert all("t" not in entry for entry in result)
    assert [entry["logsnr_centre"] for entry in result] == [12.0, 2.0, -2.0, -12.0]
    assert next(entry["logsnr"] for entry in result) == [20.0, 4.0]


@pytest.mark.parametrize("edges, centres", [(EDGES[:4], CENTRES), (EDGES, CENTRES[:3])])
def test_edges_of_other_bins_are_refused(edges, centres):
    """Catches values joined with the noise levels of their neighbours."""
    with pytest.raises(ValueError, match="4 bins have 5 edges and 4 centres"):
        noise_bins.by_bin(SAME, edges, centres)


@pytest.mark.parametrize(
    "density", [UniformTime("cosine"), UniformTime("linear"), LogitNormal(-0.8, 0.8)]
)
def test_training_bins_are_drawn_equally_often(density):
    """Catches bins of equal log-SNR, a noise level that is not that of the draw, and edges in the
    reverse order of the values.
    """
    bins = TrainingBins(density, 4)
    draws, logsnr = bins.noise_level({"u": jnp.array([0.0, 0.5]), "eps": jnp.ones(2)}, 1)
    assert draws["u"].tolist() == [0.25, 0.375] and draws["eps"].tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(logsnr, density(draws["u"]))
    entry = bins.by_bin(SAME)["bins"][1]
    assert entry.get("t") == ([0.25, 0.5] if isinstance(density, UniformTime) else None)
    level = lambda t: float(density(jnp.full((), t)))
    assert entry["logsnr"] == pytest.approx([level(0.25), level(0.5)])
    assert entry["logsnr_centre"] == pytest.approx(level(0.375))


def test_log_snr_is_uniform_within_its_bin():
    """Catches a bin's neighbour, one level for the whole bin, and a draw left in place that says
    another noise level than log-SNR."""
    bins = LogsnrBins((-14.0, -12.0, -6.0))
    draws, logsnr = bins.noise_level({"u": jnp.array([0.0, 0.5, 0.75]), "eps": jnp.ones(3)}, 1)
    assert logsnr.tolist() == [-12.0, -9.0, -7.5] and set(draws) == {"eps"}
    assert len(bins) == 2
    result = bins.by_bin(SAME[:, :2], statistics.difference)
    assert [entry["logsnr"] for entry in result["bins"]] == [[-14.0, -12.0], [-12.0, -6.0]]
    assert "ratio" in result["overall"]
