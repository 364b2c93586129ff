"""The rise of the loss when the text, or the low-res image, is another row's or none.

Right and wrong conditions see the same rows and noise: a ratio beyond 3 is more than noise.
"""

from collections.abc import Iterator
from typing import Any

from imagen_jax.evals import report, statistics
from imagen_jax.evals.evaluation import Evaluation, training_loss
from imagen_jax.evals.measures.measure import Curves, Line, Result
from imagen_jax.evals.rows import CONTROLS, LEVELS, Settings
from imagen_jax.stage import Stage

ORDER = 20
COLUMNS = ()


def excluded(stage: Stage, settings: Settings) -> str:
    if stage.text_dim or stage.lowres_size:
        return ""
    return f"{stage.name} has neither text nor low-res images to be sensitive to"


def measure(e: Evaluation) -> dict[str, Any]:
    """{"split", condition: {control: the rise by bin of noise level}}, on held-out rows.

    Conditions: "text", "lowres_drawn", "lowres_clean". Controls: "shuffled", "null".
    """
    split, out = e.data.heldout, {}
    rise = lambda wrong, right: e.bins.by_bin(wrong - right, statistics.difference)
    loss = lambda **condition: e.errors(training_loss, split, **condition)
    if e.stage.text_dim:
        out["text"] = {kind: rise(loss(text=kind), loss()) for kind in CONTROLS}
    for level in LEVELS if e.stage.lowres_size else ():
        right = loss(level=level)
        rises = {kind: rise(loss(lowres=kind, level=level), right) for kind in CONTROLS}
        out[f"lowres_{level}"] = rises
    return {"split": split} | out


def lines(found: Result) -> Iterator[Line]:
    for title, kinds in curves(found):
        for kind, curve in kinds.items():
            yield f"{title} {kind}", report.difference(curve["overall"])


def curves(found: Result) -> Iterator[Curves]:
    for condition, kinds in found.items():
        if condition != "split":
            yield f"loss rise, {condition}", kinds
