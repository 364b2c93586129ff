"""The correlation of the detail that a sample adds to its low-res image with the true detail.

Also the part of it that comes from the right caption.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from imagen_jax.distributed import host_work
from imagen_jax.evals import report, statistics, superres
from imagen_jax.evals.evaluation import Evaluation
from imagen_jax.evals.measures.measure import Column, Line, Result, base_stage
from imagen_jax.evals.rows import TEXTS, Data, Settings
from imagen_jax.stage import Stage

ORDER = 50
COLUMNS = (Column("own detail", "right.own.mean", False),)


def excluded(stage: Stage, settings: Settings) -> str:
    if stage.lowres_size and settings.lowres_from:
        return "it compares with true low-res images, and --lowres_from gives others"
    return base_stage(stage)


def too_few(stage: Stage, data: Data) -> dict[str, str]:
    rows = len(data.wholes(data.heldout))
    if rows < 2:
        return {"": f"it compares samples with each other, and there is {rows} {data.heldout} row"}
    reason = data.no_shuffled_text(data.heldout) if stage.reads_text else ""
    return {", shuffled text": reason} if reason else {}


def measure(e: Evaluation) -> dict[str, Any]:
    """{"split", text: `superres.detail`, "right_minus_<text>": paired difference}, held-out."""
    split = e.data.heldout
    drawn = [e.samples(split, text) for text in e.texts(split)]

    def correlate():
        rows = e.data.wholes(split)
        batch = rows.at(np.arange(len(rows)))
        upsampled = superres.bicubic(batch["lowres"], e.stage.image_size)
        of = lambda samples: superres.residual_correlations(samples, batch["image"], upsampled)
        return np.stack([of(samples) for samples in drawn])

    correlations = dict(zip(e.texts(split), host_work.by_first(correlate)))
    own = {text: np.diagonal(correlation) for text, correlation in correlations.items()}
    gains = {
        f"right_minus_{text}": statistics.difference(own["right"] - own[text])
        for text in e.texts(split)[1:]
    }
    details = {text: superres.detail(correlation) for text, correlation in correlations.items()}
    return {"split": split} | details | gains


def lines(result: Result) -> Iterator[Line]:
    for text in [name for name in result if name in TEXTS]:
        score = result[text]
        correlation = f"correlation {report.mean(score['own'])}, with others'"
        correlation += f" {report.mean(score['other'])}"
        ranks = f"of {score['top5']['n']} {report.proportions(score)}"
        yield f"detail, {text} text", f"{correlation}; {ranks}"
    for name in [name for name in result if name.startswith("right_minus_")]:
        yield f"detail, {name.replace('_', ' ')}", report.difference(result[name])
