"""The distance of down-sampled samples from the low-res images that they were sampled from."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from imagen_jax.data import transforms
from imagen_jax.evals import report, superres
from imagen_jax.evals.evaluation import Evaluation
from imagen_jax.evals.measures.measure import Column, Line, Result, base_stage
from imagen_jax.evals.rows import Settings
from imagen_jax.stage import Stage

ORDER = 60
COLUMNS = (Column("error of the shrunk sample", "samples.mae.mean", True),)


def excluded(stage: Stage, settings: Settings) -> str:
    return base_stage(stage)


def measure(e: Evaluation) -> dict[str, Any]:
    """{"split", "samples", "bicubic": `superres.consistency`}, on held-out rows."""
    split = e.data.heldout
    lowres = e.sampled(split, "right").batch["lowres"]
    bicubic = superres.bicubic(lowres, e.stage.image_size)
    groups = {"samples": e.samples(split), "bicubic": bicubic}
    shrink = lambda images: np.stack([transforms.shrink(i, e.stage.lowres_size) for i in images])
    scores = {name: superres.consistency(shrink(g), lowres) for name, g in groups.items()}
    return {"split": split} | scores


def lines(result: Result) -> Iterator[Line]:
    for name in ("samples", "bicubic"):
        score = result[name]
        psnr = "infinite" if score["psnr"] is None else f"{score['psnr']:.1f} dB"
        yield f"shrunk {name} to low-res", f"{report.mean(score['mae'])} of 255, PSNR {psnr}"
