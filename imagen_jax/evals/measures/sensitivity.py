"""The rise of the loss when the text, or the low-res image, is another row's or null.

Right and wrong conditions see the same rows and noise. A ratio above 3 is significant.
"""

from collections.abc import Iterator
from typing import Any

from imagen_jax.evals import report, statistics
from imagen_jax.evals.evaluation import Evaluation, training_loss
from imagen_jax.evals.measures.measure import Curves, Line, Result
from imagen_jax.evals.rows import LOWRES_NOISE, Data, Settings
from imagen_jax.stage import Stage

ORDER = 20
COLUMNS = ()


def excluded(stage: Stage, settings: Settings) -> str:
    if stage.text_dim or stage.lowres_size:
        return ""
    return f"{stage.name} has neither text nor low-res images"


def too_few(stage: Stage, data: Data) -> dict[str, str]:
    reason = data.crops(data.heldout).unshufflable
    return {", shuffled": reason} if reason else {}


def measure(e: Evaluation) -> dict[str, Any]:
    """{"split", condition: {control: the rise by bin of noise level}}, on held-out rows.

    Conditions: "text", "lowres_drawn", "lowres_clean". Controls: "shuffled", "null".
    """
    split, out = e.data.heldout, {}
    controls = e.data.crops(split).controls
    rise = lambda wrong, right: e.bins.by_bin(wrong - right, statistics.difference)
    loss = lambda **condition: e.errors(training_loss, split, **condition)
    if e.stage.text_dim:
        out["text"] = {kind: rise(loss(text=kind), loss()) for kind in controls}
    for level in LOWRES_NOISE if e.stage.lowres_size else ():
        right = loss(level=level)
        rises = {kind: rise(loss(lowres=kind, level=level), right) for kind in controls}
        out[f"lowres_{level}"] = rises
    return {"split": split} | out


def lines(result: Result) -> Iterator[Line]:
    for title, kinds in curves(result):
        for kind, curve in kinds.items():
            yield f"{title} {kind}", report.difference(curve["overall"])


def curves(result: Result) -> Iterator[Curves]:
    for condition, kinds in result.items():
        if condition != "split":
            yield f"loss rise, {condition}", kinds
