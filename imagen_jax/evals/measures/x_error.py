"""The squared error of x-hat in fixed bins of log-SNR, which compares recipes.

x-hat follows from the network's output, whatever it predicts, and is clipped to [-1, 1] as in
samplers. The bins are the same for every recipe. Log-SNR is uniform in a bin and drawn from the
row's own key, so arms that differ in prediction, schedule, loss or noise density see the same rows,
noise levels and noise. Images are crops if the stage trains on crops, no caption is dropped, and
low-res images are noised as in training.

The overall number is the mean over the bins: an unweighted mean over log-SNR in [-14, 14]. It is
not the training loss of any recipe.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from imagen_jax.evals import report
from imagen_jax.evals.evaluation import Evaluation, x_hat_error
from imagen_jax.evals.measures.measure import Column, Curves, Line, Result, RowValues
from imagen_jax.evals.noise_bins import LogsnrBins
from imagen_jax.evals.rows import Settings
from imagen_jax.stage import Stage

ORDER = 70
BINS = LogsnrBins(tuple(float(edge) for edge in range(-14, 15, 2)))
# The low-res image is noised as in training, so arms must agree in that noise.
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


def row_values(e: Evaluation) -> RowValues:
    return {f"{split}.overall.mean": _errors(e, split).mean(axis=1) for split in e.data.counts}


def _errors(e: Evaluation, split: str) -> Float[np.ndarray, "n k"]:
    return e.errors(x_hat_error, split, bins=BINS)


def lines(result: Result) -> Iterator[Line]:
    for split, curve in result.items():
        yield f"squared error, x-hat, {split}", report.mean(curve["overall"])


def curves(result: Result) -> Iterator[Curves]:
    yield "squared error of x-hat", result
