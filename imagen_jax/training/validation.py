"""Validation during training: held-out errors and sensitivities of the live training state.

Rows, noise and bins are those of `evaluate --seed 0`, the same at every validation and in every
run on the same data. So a row of validation.jsonl is a pure function of the state, and differences
between steps and between runs are paired. The functions are those of `evals`; the parameters stay
where they are on the training mesh. With data.buckets, the images are centre squares of
data.image_size, as in `evaluate`. With data.mixture, each set has rows and numbers of its own.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from imagen_jax import run_log
from imagen_jax.data import pipeline, sets
from imagen_jax.data.example_text import EvaluationText
from imagen_jax.evals import statistics
from imagen_jax.evals.evaluation import Probe, training_loss, x_hat_error
from imagen_jax.evals.measures import x_error
from imagen_jax.evals.noise_bins import TrainingBins
from imagen_jax.evals.rows import CONTROLS, ConditionedRows, ReadRows, Settings, choose
from imagen_jax.run_fields import MEASURES
from imagen_jax.stage import Params, Stage
from imagen_jax.training.state import TrainState

SEED, LOSS_BINS = 0, 10  # the defaults of evaluate
# An effect of an input within this number of standard errors of 0 is not distinguishable from none.
WITHIN_SE = 2.0
ADVICE = {
    "text": "check that the captions describe their images and that diffusion.text_drop is not 1",
    "lowres": "check that the low-res images belong to their images and that diffusion.aug_max is"
    " not too large",
}

log = logging.getLogger("imagen_jax.train")


class Validation:
    """The errors of a stage's EMA and parameters on fixed rows, with right and wrong conditions."""

    def __init__(self, config: Mapping[str, Any], stage: Stage, mesh: Mesh, text: EvaluationText):
        """config: of the run. stage, mesh: those of the train step. text: of the rows' text.

        Rows are held-out, or training rows, with a warning, if the data have no held-out ones. A
        set of data.mixture without held-out rows is left out, with a warning, if others have some.
        """
        data, optim, wanted = config["data"], config["optim"], config["train"]["validate_rows"]
        self.split, self._sets = read_sets(data, wanted, text)
        self._weights = {one.name: one.weight for one in sets.data_sets(data)}
        # As many rows at once as the train step has; without a gradient they need less memory.
        size = data["batch_size"] // optim["accumulation"]
        counts = {"rows": wanted, "samples": 1, "gallery": 1, "bins": LOSS_BINS}
        settings = Settings(**counts, batch_size=size, seed=SEED, sampling=stage.sampling)
        self._probe, self._stage = Probe(stage, settings, mesh), stage
        self._loss_bins = TrainingBins(stage.density, LOSS_BINS)
        self._warmup = optim["warmup"]

    def controls(self, rows: ReadRows) -> dict[str, ConditionedRows]:
        """{"text_shuffled", ...: the rows with this wrong condition}."""
        kinds = [kind for kind in CONTROLS if kind != "shuffled" or not rows.unshufflable]
        inputs = {"text": self._stage.reads_text, "lowres": self._stage.lowres_size}
        return {
            f"{name}_{kind}": ConditionedRows(rows, **{name: kind})
            for name, present in inputs.items()
            for kind in kinds
            if present
        }

    def run(self, state: TrainState, step: int) -> dict[str, float]:
        """The row of validation.jsonl of the state after `step` steps.

        All processes call it. Logs a warning if the stage ignores an input after the warm-up.
        """
        started, first = time.monotonic(), jax.process_index() == 0
        weights = {"ema": state.ema, "params": state.params}
        calls = len(weights) * sum(map(self._calls, self._sets.values()))
        with run_log.Progress(f"validation, step {step}", calls, quiet=not first) as progress:
            done = itertools.count(1)
            tick = lambda: progress.update(next(done))
            measured = {
                name: {
                    f"{self.split}/{which}/{number}": value
                    for which, params in weights.items()
                    for number, value in self._measure(rows, params, tick).items()
                }
                for name, rows in self._sets.items()
            }
        row = joined(measured, self._weights)
        if first:
            seconds = time.monotonic() - started
            total = sum(map(len, self._sets.values()))
            log.info("validation of step %d on %d rows: %.1f s", step, total, seconds)
            if step > self._warmup and (problem := ignored_inputs(row, f"{self.split}/params")):
                log.warning("validation of step %d: %s", step, problem)
        return row

    def measures(self, row: Mapping[str, float]) -> dict[str, float]:
        """The measures by which checkpoints can be kept, of a row by `run`."""
        names = {name: f"{self.split}/{name}" for name in MEASURES}
        return {name: row[key] for name, key in names.items() if key in row}

    def _calls(self, rows: ReadRows) -> int:
        """How often `_measure` calls `tick`."""
        calls = self._probe.calls(rows, x_error.BINS) * (1 + len(self.controls(rows)))
        return calls + self._probe.calls(rows, self._loss_bins)

    def _measure(
        self, rows: ReadRows, params: Params, tick: Callable[[], None]
    ) -> dict[str, float]:
        """The numbers of `params`, see docs/training.md; undefined ones are left out."""
        compute = lambda error, rows, bins: self._probe.quiet_errors(
            error, params, rows, bins, False, tick
        )
        right = ConditionedRows(rows)
        errors = compute(x_hat_error, right, x_error.BINS)
        losses = compute(training_loss, right, self._loss_bins)
        out = with_error("loss", losses) | with_error("x_error", errors)
        for i, (start, end) in enumerate(zip(x_error.BINS.edges, x_error.BINS.edges[1:])):
            out[f"x_error/logsnr_{start:g}_{end:g}"] = statistics.number(errors[:, i].mean())
        for name, wrong in self.controls(rows).items():
            out |= with_error(
                f"x_error_rise/{name}", compute(x_hat_error, wrong, x_error.BINS) - errors
            )
        return {name: value for name, value in out.items() if value is not None}


def read_sets(
    data_cfg: Mapping[str, Any], wanted: int, text: EvaluationText
) -> tuple[str, dict[str, ReadRows]]:
    """(split, {name of a set: up to `wanted` rows of it}); the name is "" for data.path."""
    opened = [
        (one, one.config(data_cfg), pipeline.open_prepared(one.config(data_cfg)))
        for one in sets.data_sets(data_cfg)
    ]
    splits = [prepared.evaluation_split for _, _, prepared in opened]
    split = "heldout" if "heldout" in splits else "train"
    rows = {}
    for one, own_cfg, prepared in opened:
        if prepared.evaluation_split == "train":
            without = (
                "validating without it" if split == "heldout" else "validating on training images"
            )
            log.warning("%s has no held-out images; %s", one.path, without)
        if prepared.evaluation_split != split:
            continue
        index = choose(prepared.num_images(split), split, wanted, SEED)
        rows[one.name] = ReadRows(own_cfg, split, index, SEED, text)
        if reason := rows[one.name].unshufflable:
            on = f" on {one.name}" if one.name else ""
            log.warning("validation%s without shuffled conditions: %s", on, reason)
    return split, rows


def joined(
    measured: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]
) -> dict[str, float]:
    """The row of all sets: NAME/... of each, and the mean of each number by the sets' weights.

    Standard errors are those of the mean. A number that a set lacks has no mean. A single set
    without a name, of data.path, has its numbers alone.

    measured: {name of a set: {name of a number: value}}. weights: of these sets, and maybe others.
    """
    if list(measured) == [""]:
        return dict(measured[""])
    first, *others = measured.values()
    total = sum(weights[name] for name in measured)
    share = {name: weights[name] / total for name in measured}
    row = {}
    for number in (key for key in first if all(key in other for other in others)):
        parts = [share[name] * values[number] for name, values in measured.items()]
        row[number] = math.hypot(*parts) if number.endswith("_se") else math.fsum(parts)
    return row | {
        f"{name}/{number}": value
        for name, values in measured.items()
        for number, value in values.items()
    }


def with_error(name: str, values: Float[np.ndarray, "n k"]) -> dict[str, float | None]:
    """{name: the mean over rows and bins, name_se: its standard error over rows}."""
    summary = statistics.summary(values.mean(axis=1))
    return {name: summary["mean"], f"{name}_se": summary["se"]}


def ignored_inputs(row: Mapping[str, float], weights: str) -> str:
    """A line about the inputs whose wrong values do not raise the error; "" if there are none.

    The control is another row's input or, where rows have none, the null input.

    row: of validation.jsonl. weights: prefix of its names, such as "heldout/params".
    """
    problems = []
    for name, advice in ADVICE.items():
        keys = [f"{weights}/x_error_rise/{name}_{kind}" for kind in CONTROLS]
        key = next((key for key in keys if f"{key}_se" in row), None)
        if key is not None and abs(row[key]) <= WITHIN_SE * row[f"{key}_se"]:
            rise = f"{key} is {row[key]:.2g} +- {row[f'{key}_se']:.2g}"
            problems.append(f"the stage ignores its {name} ({rise}): {advice}")
    return "; ".join(problems)
