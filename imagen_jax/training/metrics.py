"""Training metrics: fetched with a delay, checked for non-finite values, averaged and written."""

import collections
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from imagen_jax import run_log
from imagen_jax.object_storage import AnyPath
from imagen_jax.stage_sizes import Size
from imagen_jax.training.bad_step_log import BadSteps, ids_of
from imagen_jax.training.bad_steps import Rules
from imagen_jax.training.memory import memory_metrics
from imagen_jax.training.run import Run
from imagen_jax.training.start import examples_seen

# The host runs this number of steps ahead of the device. So the device always has work queued, and
# the host answers a signal within this number of steps.
IN_FLIGHT = 2
SKIPPED, NORM, BY_QUARTILE = "health/skipped", "norm/grad", "loss_by_quartile"
Entry = dict[str, Any]  # the metrics of one step; {SKIPPED: 1} and perhaps NORM, if it was skipped


class TrainingMetrics:
    """Writes one row, see `row_of`, every `log_every` steps.

    Metrics are fetched IN_FLIGHT steps late. `unlogged` holds the metrics of the steps since the
    last row. Checkpoints store it, so the first row after a resume equals that of an uninterrupted
    run. A run that stops between two rows writes a partial row, which a resume replaces.

    done: number of steps before those of this process. unlogged, skipped_steps: from the
    checkpoint, see `meta`. origin: what the run started from, as in checkpoints.
    """

    def __init__(
        self,
        run: Run,
        workdir: AnyPath,
        done: int,
        unlogged: list[Entry],
        skipped_steps: Sequence[int],
        progress: run_log.Progress,
        origin: Mapping[str, Any],
    ):
        self._run, self._progress, self._origin = run, progress, origin
        self._may_skip = Rules.of(run.config["train"]).may_skip
        self._queue: collections.deque = collections.deque()
        self._last_step, self._draining, self.unlogged = done, False, list(unlogged)
        self._buckets: list[Size] = []  # of the steps since the clock was read
        first = jax.process_index() == 0
        self.writer = run_log.MetricsWriter(workdir, done - len(unlogged), first, validated=done)
        self._bad_steps = BadSteps(run.config, run.rows, workdir, self.writer, skipped_steps)
        self.clock = run_log.StepClock(run.config["data"]["batch_size"], done)

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint stores of the metrics, after `settle`.

        `unlogged`, and, if there are any, `skipped_steps` within the span that train.max_skips
        limits.
        """
        # Copies: a background thread may write them after the next steps.
        skipped = list(self._bad_steps.skipped)
        return {"unlogged": list(self.unlogged)} | ({"skipped_steps": skipped} if skipped else {})

    def add(
        self, step: int, device_metrics: Mapping[str, Any], bucket: Size, batch: Mapping[str, Any]
    ) -> None:
        """Queues the metrics of a step on images of the size `bucket`.

        batch: the rows of the step that this process has.

        Raises FloatingPointError if an earlier step ends the run (see `BadSteps.see`).
        """
        self._queue.append((step, device_metrics, bucket, ids_of(batch)))
        if len(self._queue) > IN_FLIGHT:
            self._process_oldest()

    def settle(self) -> None:
        """Waits for all queued steps. Raises FloatingPointError if one ends the run."""
        self._draining = True
        while self._queue:
            self._process_oldest()
        self._draining = False

    def _process_oldest(self) -> None:
        step, device_metrics, bucket, ids = self._queue.popleft()
        values = {name: value.tolist() for name, value in jax.device_get(device_metrics).items()}
        skipped = self._bad_steps.see(step, values, ids)
        self._last_step = step
        self._buckets.append(bucket)
        self.unlogged.append(of_skipped(values) if skipped else values)
        self._progress.update(self._last_step, loss=values["loss"])
        if self._last_step % self._run.config["train"]["log_every"] == 0:
            self._write()
            self.unlogged = []

    def _write(self) -> None:
        row = row_of(self.unlogged, self._may_skip)
        # `settle` fetches several steps at once. The time between them is not a step time, so a row
        # of only these steps gets no rates.
        has_step_time = not self._draining or len(self.unlogged) > IN_FLIGHT
        rates = {}
        if has_step_time:
            rates = self._run.rates(self.clock.read(self._last_step), self._buckets)
            self._buckets = []
        batch_size = self._run.config["data"]["batch_size"]
        examples = examples_seen(self._last_step, batch_size, self._origin)
        here = {"examples": examples, "time/unix_s": time.time()} | memory_metrics()
        self.writer.scalars(self._last_step, row | rates | here)

    def __enter__(self) -> "TrainingMetrics":
        return self

    def __exit__(self, *_: object) -> None:
        if self.unlogged:
            self._write()
        self.writer.close()


def of_skipped(values: Mapping[str, Any]) -> Entry:
    """The entry of a skipped step: its gradient norm, if that is finite."""
    return {SKIPPED: 1} | ({NORM: values[NORM]} if math.isfinite(values[NORM]) else {})


def row_of(entries: Sequence[Entry], may_skip: bool) -> dict[str, float]:
    """The row of an interval.

    It has the mean of each metric over the steps that were applied; `norm/grad_max`, over all
    steps; `loss/logsnr_q1` to `_q4`, means over the samples of the interval in each quartile of the
    training noise, without those of skipped steps; and `health/skipped`, if steps were skipped or
    may be. A value of which there are no samples is missing.
    """
    applied = [entry for entry in entries if SKIPPED not in entry]
    names = [name for name in applied[0] if name != BY_QUARTILE] if applied else []
    row = {name: sum(entry[name] for entry in applied) / len(applied) for name in names}
    if norms := [entry[NORM] for entry in entries if NORM in entry]:
        row[f"{NORM}_max"] = max(norms)
    # Checkpoints of earlier versions hold entries without it.
    quartiles = [entry[BY_QUARTILE] for entry in applied if BY_QUARTILE in entry]
    for i, (total, count) in enumerate(np.sum(quartiles, axis=0).T if quartiles else (), 1):
        if count:
            row[f"loss/logsnr_q{i}"] = float(total / count)
    if may_skip or len(applied) < len(entries):
        row[SKIPPED] = len(entries) - len(applied)
    return row
