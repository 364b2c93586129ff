"""The squared error of x-hat in fixed bins of log-SNR: the unit that compares recipes.

x-hat is read from the network's output, whatever that is, and clipped to [-1, 1] as samplers do.
The bins are the same for every recipe, and log-SNR is uniform within each, drawn from the row's own
key. So arms that differ in prediction, schedule, loss or noise density are compared on the same
rows, noise levels and noise. Rows are those the stage trains on (crops, if it trains on crops),
with text kept and low-res images noised as in training.

The overall number is the mean over the bins: an unweighted mean over log-SNR in [-14, 14]. It is
not the training loss of any recipe.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from imagen_jax.evals import report
from imagen_jax.evals.evaluation import Evaluation, x_hat_error
from imagen_jax.evals.measures.measure import Column, Curves, Line, Result
from imagen_jax.evals.noise_bins import LogsnrBins
from imagen_jax.evals.rows import Settings
from imagen_jax.stage import Stage

ORDER = 70
BINS = LogsnrBins(tuple(float(edge) for edge in range(-14, 15, 2)))
# Noise of the low-res image is drawn as the arm trains, so arms must agree in it.
COLUMNS = (
    Column(
        "error of x-hat", "SPLIT.overall.mean", less_is_better=True, needs_same=("diffusion.aug",)
    ),
)


def excluded(stage: Stage, settings: Settings) -> str:
    return ""


def measure(e: Evaluation) -> dict[str, Any]:
    """{split: the error by bin of log-SNR}, on the scale of pixels in [-1, 1]."""
    return {split: BINS.by_bin(_errors(e, split)) for split in e.data.counts}


def row_values(e: Evaluation) -> dict[str, np.ndarray]:
    return {f"{split}.overall.mean": _errors(e, split).mean(axis=1) for split in e.data.counts}


def _errors(e: Evaluation, split: str) -> np.ndarray:
    return e.errors(x_hat_error, split, bins=BINS)


def lines(found: Result) -> Iterator[Line]:
    for split, curve in found.items():
        yield f"squared error, x-hat, {split}", report.mean(curve["overall"])


def curves(found: Result) -> Iterator[Curves]:
    yield "squared error of x-hat", found
