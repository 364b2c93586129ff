"""The squared error of x-hat, compared with bicubic up-sampling of the clean low-res image."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from imagen_jax.distributed import host_work
from imagen_jax.evals import report, statistics, superres
from imagen_jax.evals.evaluation import Evaluation, x_hat_error
from imagen_jax.evals.measures.measure import Column, Line, Result, RowValues, base_stage
from imagen_jax.evals.rows import LOWRES_NOISE, Settings
from imagen_jax.stage import Stage

ORDER = 30
# The bins depend on the training noise, so arms must agree in it.
COLUMNS = (
    Column(
        "error of x-hat from a clean low-res image",
        "clean.x_hat.overall.mean",
        less_is_better=True,
        needs_same=("diffusion.schedule", "diffusion.density"),
    ),
)


def excluded(stage: Stage, settings: Settings) -> str:
    return base_stage(stage)


def measure(e: Evaluation) -> dict[str, Any]:
    """{"split", "bicubic", level: {"x_hat", "gain" by bin of noise level}}.

    The images are whole held-out images.

    "gain" is the error of bicubic minus the error of x-hat: positive where x-hat is nearer.
    """
    split, out = e.data.heldout, {}
    rows = e.data.uncropped(split)

    def error_of_bicubic(positions):
        batch = rows.at(positions)
        upsampled = superres.bicubic(batch["lowres"], rows.side)
        return superres.mean_square(upsampled, batch["image"])

    bicubic = host_work.for_rows(len(rows), error_of_bicubic)
    for level in LOWRES_NOISE:
        x_hat = _errors(e, level)
        gain = e.bins.by_bin(bicubic[:, None] - x_hat, statistics.difference)
        out[level] = {"x_hat": e.bins.by_bin(x_hat), "gain": gain}
    return {"split": split, "bicubic": statistics.summary(bicubic)} | out


def row_values(e: Evaluation) -> RowValues:
    return {f"{level}.x_hat.overall.mean": _errors(e, level).mean(axis=1) for level in LOWRES_NOISE}


def _errors(e: Evaluation, level: str) -> Float[np.ndarray, "n k"]:
    return e.errors(x_hat_error, e.data.heldout, whole=True, level=level)


def lines(result: Result) -> Iterator[Line]:
    yield "squared error, bicubic", report.mean(result["bicubic"])
    for level in LOWRES_NOISE:
        error, gain = (result[level][name]["overall"] for name in ("x_hat", "gain"))
        text = f"{report.mean(error)}; better by {report.difference(gain)}"
        yield f"squared error, x-hat, low-res {level}", text
