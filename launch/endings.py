"""Why a training without a launcher has ended, from what it has recorded in its workdir."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from imagen_jax import exit_codes, goodput
from imagen_jax.distributed.host_failures import Failure
from imagen_jax.object_storage import AnyPath
from imagen_jax.run_log import BAD_STEPS, NONFINITE, SPAN, read_metrics
from imagen_jax.storage import read_object, written_at


def failure(
    workdir: AnyPath, entries: Iterable[Mapping[str, Any]], failures: Sequence[Failure], most: int
) -> str:
    """The exit code and reason with which the last process ended; "" where that is not certain.

    Only what was recorded after the process began counts. Without a ledger of time, that is not
    known.

    entries: of the ledger. failures: of the hosts, oldest first. most: train.max_skips. Raises
    OSError if a file cannot be read, and ValueError if one is damaged.
    """
    process = goodput.last_process(entries)
    if not process or process[-1].get("ended"):
        return ""
    began = process[0]["start"]
    code = f"exit code {exit_codes.NOT_FINITE}"
    if written_at(workdir / NONFINITE) >= began:
        step = read_object(workdir / NONFINITE, {"step": int}, "remove it")["step"]
        return f"{code}; loss, gradient or update of step {step} is not finite, see {NONFINITE}"
    if most:
        rows = read_metrics(workdir, BAD_STEPS)
        steps = [row["step"] for row in rows if row.get("action") == "skipped"]
        recent = [step for step in steps if step > steps[-1] - SPAN]
        resumed = next((one["from_step"] for one in process if "step" in one["seconds"]), math.inf)
        if len(recent) > most and recent[-1] > resumed:
            return f"{code}; {len(recent)} of the last {SPAN} steps were skipped, see {BAD_STEPS}"
    last = failures[-1] if failures else None
    if last and last.time >= began:
        return f"exit code {last.code}; {last.reason[:200]}"
    return ""
