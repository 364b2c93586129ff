"""The distance of down-sampled samples from the low-res images that they were sampled from."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from imagen_jax.data import transforms
from imagen_jax.distributed import host_work
from imagen_jax.evals import report, superres
from imagen_jax.evals.evaluation import Evaluation
from imagen_jax.evals.measures.measure import Column, Line, Result, base_stage
from imagen_jax.evals.rows import Settings
from imagen_jax.stage import Stage
from imagen_jax.stage_sizes import square

ORDER = 60
GROUPS = ("samples", "bicubic")
COLUMNS = (Column("error of the shrunk sample", "samples.mae.mean", True),)


def excluded(stage: Stage, settings: Settings) -> str:
    return base_stage(stage)


def measure(e: Evaluation) -> dict[str, Any]:
    """{"split", "samples", "bicubic": `superres.consistency`}, on held-out rows."""
    split = e.data.heldout
    rows, samples = e.sampled(split, "right"), e.samples(split)
    size = square(e.stage.lowres_size)
    shrink = lambda images: np.stack([transforms.shrink(i, size) for i in images])

    def errors(positions):
        lowres = rows.at(positions)["lowres"]
        groups = samples[positions], superres.bicubic(lowres, e.stage.image_size)
        return np.stack([superres.consistency_errors(shrink(g), lowres) for g in groups], axis=1)

    found = host_work.for_rows(len(rows), errors)
    scores = {name: superres.consistency(found[:, i]) for i, name in enumerate(GROUPS)}
    return {"split": split} | scores


def lines(result: Result) -> Iterator[Line]:
    for name in GROUPS:
        score = result[name]
        psnr = "infinite" if score["psnr"] is None else f"{score['psnr']:.1f} dB"
        yield f"shrunk {name} to low-res", f"{report.mean(score['mae'])} of 255, PSNR {psnr}"
