"""The record of bad steps, workdir/bad_steps.jsonl, and the limit of skipped steps."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from imagen_jax.distributed import agreement
from imagen_jax.object_storage import AnyPath
from imagen_jax.run_log import BAD_STEPS, NONFINITE, SPAN, MetricsWriter
from imagen_jax.storage import write_json

# {array of a batch: its name in the records}; `set` only with data.mixture.
IDS = {"index": "images", "caption_id": "captions", "set": "sets"}

log = logging.getLogger("imagen_jax.train")
Ids = dict[str, list[int]]


def ids_of(batch: Mapping[str, Any]) -> Ids:
    """What identifies the rows of a host batch. A copy, so that the batch itself can be freed."""
    return {name: batch[name].tolist() for name in IDS if name in batch}


class BadSteps:
    """Records skipped steps and spikes, and ends the run at a step that may not be skipped.

    All processes see every step, in the same order. Each keeps the ids of its own rows while a step
    is in flight. For a bad step they gather them: one message of each process through the
    coordination service, no batch read again. Process 0 writes.

    skipped: the steps skipped so far, as far as the limit needs them. Checkpoints store it.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        rows: Sequence[int],
        workdir: AnyPath,
        writer: MetricsWriter,
        skipped: Sequence[int],
    ):
        """config: of the run. rows: of the global batch, which this process reads.

        writer: writes in process 0 only. skipped: from the checkpoint.
        """
        self._seed, self._most = config["seed"], config["train"]["max_skips"]
        self._rows, self._workdir, self._writer = list(rows), workdir, writer
        self._path, self.skipped = workdir / BAD_STEPS, list(skipped)

    def see(self, step: int, values: dict[str, Any], ids: Ids) -> bool:
        """Whether a step was skipped. Removes the metrics of `step.decide` from `values`.

        step: number of steps done with this one, as in metrics.jsonl. values: its metrics. ids: of
        the rows of its batch that this process has.

        Raises FloatingPointError if the run must end.
        """
        bad_step = int(values.pop("bad_step"))
        skipped, spike = (bool(values.pop(name, False)) for name in ("skipped", "spike"))
        median = values.pop("norm/grad_median", math.inf)
        if bad_step >= 0:
            raise FloatingPointError(self._stop(bad_step, ids))
        if not skipped and not spike:
            return False
        reason, action = "spike" if spike else "not finite", "skipped" if skipped else "logged"
        row = {"step": step, "reason": reason, "action": action}
        row |= {name: values[name] for name in ("loss", "norm/grad")}
        row |= {"norm/grad_median": median} if math.isfinite(median) else {}
        self._record(row | {"seed": self._seed} | self._of_all_rows(ids))
        if skipped:
            self._count(step)
        return skipped

    def _record(self, row: Mapping[str, Any]) -> None:
        shown = ", ".join(f"{name} {row[name]:.4g}" for name in row if "norm" in name)
        text = "step %d: %s, %s: loss %.4g, %s; its images are in %s"
        log.warning(text, *(row["step"], kind(row), row["action"], row["loss"], shown, self._path))
        self._writer.bad_step(row)

    def _count(self, step: int) -> None:
        """Counts a skipped step. Raises FloatingPointError if it is one too many."""
        self.skipped = [n for n in self.skipped if n > step - SPAN] + [step]
        if len(self.skipped) > self._most:
            raise FloatingPointError(
                f"{len(self.skipped)} of the last {SPAN} steps were skipped, the last one step"
                f" {step}; train.max_skips is {self._most}. No later state was saved. Inspect"
                f" {self._path}, then start a new --workdir with a lower optim.lr or optim.clip, or"
                " raise train.max_skips"
            )

    def _of_all_rows(self, ids: Ids) -> Ids:
        """The ids of the global batch, in its order. A barrier: all processes call it."""
        found: dict[int, tuple[int, ...]] = {}
        for text in agreement.gather(json.dumps([self._rows, ids])):
            rows, there = json.loads(text)
            found |= zip(rows, zip(*there.values()))
        columns = zip(*(found[row] for row in sorted(found)))
        return {IDS[name]: list(column) for name, column in zip(ids, columns)}

    def _stop(self, bad: int, ids: Ids) -> str:
        """Writes workdir/nonfinite.json with the batch of step `bad`. Returns the error message."""
        report = {"step": bad, "seed": self._seed} | self._of_all_rows(ids)
        path = self._workdir / NONFINITE
        if jax.process_index() == 0:
            write_json(path, report)
        return (
            f"loss, gradient or update of step {bad} is not finite. The update was skipped and no"
            f" later state was saved. Inspect the batch of the step, listed in {path}, then start a"
            f" new --workdir with a lower optim.lr or optim.clip. Seed {report['seed']}, images"
            f" {report['images'][:8]}..."
        )


def kind(row: Mapping[str, Any]) -> str:
    """What is bad about a step, from its row of bad_steps.jsonl, in words."""
    if row["reason"] == "spike":
        return "a spike of the gradient"
    wrong = [name for name in ("loss", "norm/grad") if not math.isfinite(row[name])]
    return f"{' and '.join(wrong) or 'the update'} not finite"
