"""Metrics of a training: fetched from the devices late, averaged, checked to be finite, written."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from imagen_jax import run_log
from imagen_jax.data import pipeline
from imagen_jax.storage import write_json
from imagen_jax.training.run import Run

# Steps by which the device may lag behind the host: it always has work queued, and a signal is
# answered within this number of steps.
IN_FLIGHT = 2


class Record:
    """Writes one row of metrics, a mean, every `log_every` steps.

    Metrics are fetched IN_FLIGHT steps late. `unlogged` holds the steps since the last row. It is
    saved with a checkpoint, so that the first row after a resume equals that of an undisturbed run.
    A run that stops between two rows writes a partial row, which a resume replaces.
    """

    def __init__(
        self,
        run: Run,
        workdir: Path,
        done: int,
        unlogged: list[dict[str, float]],
        progress: run_log.Progress,
    ):
        self._run, self._workdir, self._progress = run, workdir, progress
        self._pending: collections.deque = collections.deque()
        self._seen, self._settling, self.unlogged = done, False, list(unlogged)
        first = jax.process_index() == 0
        self.writer = run_log.MetricsWriter(workdir, done - len(unlogged), enabled=first)
        self.clock = run_log.StepClock(run.config["data"]["batch_size"], done)

    def add(self, step: int, device_metrics: Mapping[str, Any]) -> None:
        """Queues the metrics of a step. Raises as `settle` does, for an earlier step."""
        self._pending.append((step, device_metrics))
        if len(self._pending) > IN_FLIGHT:
            self._take()

    def settle(self) -> None:
        """Waits for all queued steps. Raises FloatingPointError if one was not finite."""
        self._settling = True
        while self._pending:
            self._take()
        self._settling = False

    def _take(self) -> None:
        step, device_metrics = self._pending.popleft()
        values = {name: value.item() for name, value in jax.device_get(device_metrics).items()}
        bad = int(values.pop("bad_step"))
        if bad >= 0:
            raise FloatingPointError(report_bad_step(self._run, self._workdir, bad))
        self._seen = step
        self.unlogged.append(values)
        self._progress.update(self._seen, loss=values["loss"])
        if self._seen % self._run.config["train"]["log_every"] == 0:
            self._write()
            self.unlogged = []

    def _write(self) -> None:
        means = {
            name: sum(values[name] for values in self.unlogged) / len(self.unlogged)
            for name in self.unlogged[0]
        }
        # While `settle` fetches all steps in flight at once, the time between two of them is not
        # the time of a step.
        timed = not self._settling or len(self.unlogged) > IN_FLIGHT
        rates = self._run.rates(self.clock.read(self._seen)) if timed else {}
        self.writer.scalars(self._seen, means | rates)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        if self.unlogged:
            self._write()
        self.writer.close()


def report_bad_step(run: Run, workdir: Path, bad: int) -> str:
    """Writes workdir/nonfinite.json, which identifies the step's batch, and returns the message."""
    data = pipeline.batches(run.config["data"], run.config["seed"], bad)
    batch = next(data)
    data.close()
    report = {
        "step": bad,
        "seed": run.config["seed"],
        "images": batch["index"].tolist(),
        "captions": batch["caption_id"].tolist(),
    }
    path = workdir / "nonfinite.json"
    if jax.process_index() == 0:
        write_json(path, report)
    return (
        f"loss, gradient or update of step {bad} is not finite. The update was skipped and nothing"
        f" was saved after it. Look at its batch, listed in {path}, then restart with a lower"
        f" optim.lr or optim.clip in a new --workdir. Seed {report['seed']}, images"
        f" {report['images'][:8]}..."
    )
