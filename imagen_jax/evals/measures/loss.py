"""The training loss by noise level, of held-out and of training rows; no caption is dropped."""

from collections.abc import Iterator
from typing import Any

from imagen_jax.evals import report
from imagen_jax.evals.evaluation import Evaluation, training_loss
from imagen_jax.evals.measures.measure import Column, Curves, Line, Result, RowValues
from imagen_jax.evals.rows import Settings
from imagen_jax.stage import Stage

ORDER = 10
# Losses of arms that differ in `diffusion` are not comparable.
COLUMNS = (Column("loss", "SPLIT.overall.mean", less_is_better=True, needs_same=("diffusion.",)),)


def excluded(stage: Stage, settings: Settings) -> str:
    return ""


def measure(e: Evaluation) -> dict[str, Any]:
    """{split: the loss by bin of noise level}."""
    return {split: e.bins.by_bin(e.errors(training_loss, split)) for split in e.data.counts}


def row_values(e: Evaluation) -> RowValues:
    errors = {split: e.errors(training_loss, split) for split in e.data.counts}
    return {f"{split}.overall.mean": values.mean(axis=1) for split, values in errors.items()}


def lines(result: Result) -> Iterator[Line]:
    for split, curve in result.items():
        yield f"loss, {split}", report.mean(curve["overall"])


def curves(result: Result) -> Iterator[Curves]:
    yield "loss", result
