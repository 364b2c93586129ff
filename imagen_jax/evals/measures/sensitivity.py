"""The rise of the loss when the text, or the low-res image, is another row's or null.

Right and wrong conditions see the same rows and noise. A ratio above 3 is significant.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from imagen_jax.evals import report, statistics
from imagen_jax.evals.evaluation import Evaluation, training_loss
from imagen_jax.evals.measures.measure import Column, Curves, Line, Result, RowValues
from imagen_jax.evals.rows import CONTROLS, LOWRES_NOISE, Data, Settings
from imagen_jax.stage import Stage

ORDER = 20
# Shown in a sweep table if the ablation chooses them. Like losses, they are not comparable between
# arms that differ in `diffusion`.
COLUMNS = tuple(
    Column(
        f"loss rise, {condition} {kind}",
        f"{condition}.{kind}.overall.mean",
        less_is_better=False,
        needs_same=("diffusion.",),
        default=False,
    )
    for condition in ("text", *(f"lowres_{level}" for level in LOWRES_NOISE))
    for kind in CONTROLS
)


def excluded(stage: Stage, settings: Settings) -> str:
    if stage.reads_text or stage.lowres_size:
        return ""
    return f"{stage.name} has neither text nor low-res images"


def too_few(stage: Stage, data: Data) -> dict[str, str]:
    reason = data.crops(data.heldout).unshufflable
    return {", shuffled": reason} if reason else {}


def measure(e: Evaluation) -> dict[str, Any]:
    """{"split", condition: {control: the rise by bin of noise level}}, on held-out rows.

    Conditions: "text", "lowres_drawn", "lowres_clean". Controls: "shuffled", "null".
    """
    describe = lambda rises: e.bins.by_bin(rises, statistics.difference)
    return {"split": e.data.heldout} | {
        condition: {kind: describe(rises) for kind, rises in kinds.items()}
        for condition, kinds in _rises(e).items()
    }


def row_values(e: Evaluation) -> RowValues:
    return {
        f"{condition}.{kind}.overall.mean": rises.mean(axis=1)
        for condition, kinds in _rises(e).items()
        for kind, rises in kinds.items()
    }


def _rises(e: Evaluation) -> dict[str, dict[str, Float[np.ndarray, "n k"]]]:
    """{condition: {control: the rise of n rows in k bins}}."""
    split, out = e.data.heldout, {}
    controls = e.data.crops(split).controls
    loss = lambda **condition: e.errors(training_loss, split, **condition)
    if e.stage.reads_text:
        out["text"] = {kind: loss(text=kind) - loss() for kind in controls}
    for level in LOWRES_NOISE if e.stage.lowres_size else ():
        right = loss(level=level)
        out[f"lowres_{level}"] = {kind: loss(lowres=kind, level=level) - right for kind in controls}
    return out


def lines(result: Result) -> Iterator[Line]:
    for title, kinds in curves(result):
        for kind, curve in kinds.items():
            yield f"{title} {kind}", report.difference(curve["overall"])


def curves(result: Result) -> Iterator[Curves]:
    for condition, kinds in result.items():
        if condition != "split":
            yield f"loss rise, {condition}", kinds
