"""The table and the plot, from a result made by hand."""

import io

import numpy as np
from PIL import Image

from imagen_jax.evals import nearest, noise_bins, report, statistics

LOGSNR = np.array([20.0, 3.0, 0.0, -3.0, -20.0])


def test_table_says_what_was_measured():
    """Catches an interval of the other rank, percent taken for a share, and a ratio that is not the difference's."""
    values = np.array([[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]])
    found = {
        "loss": {"heldout": noise_bins.by_bin(values, LOGSNR)},
        "sensitivity": {"split": "heldout", "text": {"null": noise_bins.by_bin(values, LOGSNR, describe=statistics.difference)}},
        "retrieval": {"heldout": {"right": nearest.score(np.eye(3), np.array([0, 1, 1]))}},
    }
    assert [line.split("  ", 1)[1].strip() for line in report.table(found).splitlines()] == [
        "2.5 +- 0.5774", "2.5 +- 0.5774 (4.3 standard errors)", "of 3 images: top-1 0.0 % [0.0, 56.1], top-5 100.0 % [43.9, 100.0]"
    ]  # fmt: skip
    assert Image.open(io.BytesIO(report.loss_plot(found))).size == (1000, 360)


def test_a_diverged_loss_is_reported_too():
    """Catches a table or plot that fails on what is not finite: the checkpoint most worth a look."""
    found = {"loss": {"train": noise_bins.by_bin(np.full((2, 2), np.nan), LOGSNR)}}
    assert report.table(found).endswith("undefined +- undefined")
    assert report.loss_plot(found).startswith(b"\x89PNG")
