"""Training metrics: fetched with a delay, checked for non-finite values, averaged and written."""

import collections
from collections.abc import Mapping
from typing import Any

import jax

from imagen_jax import run_log
from imagen_jax.object_storage import AnyPath
from imagen_jax.stage_sizes import Size
from imagen_jax.storage import write_json
from imagen_jax.training.run import Run

# The host runs this number of steps ahead of the device. So the device always has work queued, and
# the host answers a signal within this number of steps.
IN_FLIGHT = 2


class TrainingMetrics:
    """Writes one row, the mean of each metric, every `log_every` steps.

    Metrics are fetched IN_FLIGHT steps late. `unlogged` holds the metrics of the steps since the
    last row. Checkpoints store it, so the first row after a resume equals that of an uninterrupted
    run. A run that stops between two rows writes a partial row, which a resume replaces.

    done: number of steps before those of this process. unlogged: from the checkpoint.
    """

    def __init__(
        self,
        run: Run,
        workdir: AnyPath,
        done: int,
        unlogged: list[dict[str, float]],
        progress: run_log.Progress,
    ):
        self._run, self._workdir, self._progress = run, workdir, progress
        self._queue: collections.deque = collections.deque()
        self._last_step, self._draining, self.unlogged = done, False, list(unlogged)
        self._buckets: list[Size] = []  # of the steps since the clock was read
        first = jax.process_index() == 0
        self.writer = run_log.MetricsWriter(workdir, done - len(unlogged), first, validated=done)
        self.clock = run_log.StepClock(run.config["data"]["batch_size"], done)

    def add(self, step: int, device_metrics: Mapping[str, Any], bucket: Size) -> None:
        """Queues the metrics of a step on images of the size `bucket`.

        Raises FloatingPointError if an earlier step was not finite.
        """
        self._queue.append((step, device_metrics, bucket))
        if len(self._queue) > IN_FLIGHT:
            self._process_oldest()

    def settle(self) -> None:
        """Waits for all queued steps. Raises FloatingPointError if one was not finite."""
        self._draining = True
        while self._queue:
            self._process_oldest()
        self._draining = False

    def _process_oldest(self) -> None:
        step, device_metrics, bucket = self._queue.popleft()
        values = {name: value.item() for name, value in jax.device_get(device_metrics).items()}
        bad_step = int(values.pop("bad_step"))
        if bad_step >= 0:
            raise FloatingPointError(report_bad_step(self._run, self._workdir, bad_step))
        self._last_step = step
        self._buckets.append(bucket)
        self.unlogged.append(values)
        self._progress.update(self._last_step, loss=values["loss"])
        if self._last_step % self._run.config["train"]["log_every"] == 0:
            self._write()
            self.unlogged = []

    def _write(self) -> None:
        means = {
            name: sum(values[name] for values in self.unlogged) / len(self.unlogged)
            for name in self.unlogged[0]
        }
        # `settle` fetches several steps at once. The time between them is not a step time, so a row
        # of only these steps gets no rates.
        has_step_time = not self._draining or len(self.unlogged) > IN_FLIGHT
        rates = {}
        if has_step_time:
            rates = self._run.rates(self.clock.read(self._last_step), self._buckets)
            self._buckets = []
        self.writer.scalars(self._last_step, means | rates)

    def __enter__(self) -> "TrainingMetrics":
        return self

    def __exit__(self, *_: object) -> None:
        if self.unlogged:
            self._write()
        self.writer.close()


def report_bad_step(run: Run, workdir: AnyPath, bad: int) -> str:
    """Writes workdir/nonfinite.json with the batch of step `bad`. Returns the error message."""
    data = run.batches(bad)
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
        f"loss, gradient or update of step {bad} is not finite. The update was skipped and no later"
        f" state was saved. Inspect the batch of the step, listed in {path}, then start a new"
        f" --workdir with a lower optim.lr or optim.clip. Seed {report['seed']}, images"
        f" {report['images'][:8]}..."
    )
