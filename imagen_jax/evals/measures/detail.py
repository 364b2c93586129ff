"""Whether the detail a sample adds to its low-res image is that image's own.

Also how much of that detail comes from the right caption.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from imagen_jax.evals import report, statistics, superres
from imagen_jax.evals.evaluation import Evaluation
from imagen_jax.evals.measures.measure import Column, Line, Result, base_stage
from imagen_jax.evals.rows import TEXTS, Settings
from imagen_jax.stage import Stage

ORDER = 50
COLUMNS = (Column("own detail", "right.own.mean", False),)


def excluded(stage: Stage, settings: Settings) -> str:
    if stage.lowres_size and settings.lowres_from:
        return "it compares with true low-res images, and --lowres_from gives others"
    return base_stage(stage)


def measure(e: Evaluation) -> dict[str, Any]:
    """{"split", text: `superres.detail`, "right_minus_<text>": paired difference}, held-out."""
    split = e.data.heldout
    batch = e.data.wholes(split).batch
    upsampled = superres.bicubic(batch["lowres"], e.stage.image_size)
    found = {
        text: superres.residual_correlations(e.samples(split, text), batch["image"], upsampled)
        for text in e.texts
    }
    own = {text: np.diagonal(correlation) for text, correlation in found.items()}
    gains = {
        f"right_minus_{text}": statistics.difference(own["right"] - own[text])
        for text in e.texts[1:]
    }
    details = {text: superres.detail(correlation) for text, correlation in found.items()}
    return {"split": split} | details | gains


def lines(found: Result) -> Iterator[Line]:
    for text in [name for name in found if name in TEXTS]:
        score = found[text]
        correlation = f"correlation {report.mean(score['own'])}, with others'"
        correlation += f" {report.mean(score['other'])}"
        ranks = f"of {score['top5']['n']} {report.proportions(score)}"
        yield f"detail, {text} text", f"{correlation}; {ranks}"
    for name in [name for name in found if name.startswith("right_minus_")]:
        yield f"detail, {name.replace('_', ' ')}", report.difference(found[name])
