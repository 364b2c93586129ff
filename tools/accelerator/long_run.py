"""What a run of weeks needs on a device: killed and continued, traced, its memory, its bad steps.

A training is killed without warning after a checkpoint and a requested trace, and continues with
`on_bad_step` = skip and fast checkpoints. Its goodput ledger is compared with a clock outside.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.accelerator.running import ROOT

LOG_EVERY, SAVE_EVERY = 10, 40
ROWS = 8  # before the kill, and after it
ENDLESS = 10**6  # steps
LIMIT_S = 300.0  # that the first process gets
MEMORY = ("memory/device_gib", "memory/device_peak_gib", "memory/host_gib")


def run(emit: Callable, data: str, directory: str, tiny: bool) -> None:
    """Emits "killed" and "continued" (rows of both), "ledger" and "trace"."""
    workdir, began = Path(directory) / "long_run", time.time()
    first = started(data, workdir, tiny, ENDLESS)
    try:
        wait(first, lambda: len(rows(workdir)) >= ROWS // 2, LIMIT_S)
        (workdir / "profile_now").write_text("3")
        done = lambda: (
            len(rows(workdir)) >= ROWS and traces(workdir) and saved(workdir)
        )  # the trace and a checkpoint are complete
        wait(first, done, LIMIT_S)
    finally:
        first.kill()
        first.wait()
    emit("trace", files=len(traces(workdir)), bytes=sum(p.stat().st_size for p in traces(workdir)))
    emit("killed", **summary(rows(workdir)))
    options = ["--config.train.on_bad_step=skip", "--config.train.fast_every=20"]
    options += [f"--config.train.fast_dir={Path(directory) / 'fast'}"]
    last_saved = max(int(path.parent.name) for path in saved(workdir))
    second = started(data, workdir, tiny, last_saved + ROWS * LOG_EVERY, options)
    try:
        code = second.wait(timeout=LIMIT_S)
    finally:
        second.kill()
    if code:
        raise RuntimeError(f"the continued training ended with exit code {code}")
    emit_ledger(emit, workdir, time.time() - began)
    emit("continued", **summary([row for row in rows(workdir) if row["step"] > last_saved]))


def started(
    data: str, workdir: Path, tiny: bool, steps: int, options: Sequence[str] = ()
) -> subprocess.Popen:
    """A training of the demo's base model, which writes to the log of this process."""
    variant = "tiny" if tiny else "demo"
    command = [sys.executable, "-m", "imagen_jax.train", f"--config=configs/base_64.py:{variant}"]
    command += [f"--config.data.path={data}", f"--workdir={workdir}"]
    command += [f"--config.train.log_every={LOG_EVERY}", f"--config.train.save_every={SAVE_EVERY}"]
    command += [f"--config.train.steps={steps}", *options]
    return subprocess.Popen(command, cwd=ROOT)


def wait(process: subprocess.Popen, until: Callable[[], Any], limit_s: float) -> None:
    """Waits until a condition holds. Raises RuntimeError if the process ends, or after limit_s."""
    end = time.monotonic() + limit_s
    while not until():
        if process.poll() is not None:
            raise RuntimeError(f"the training ended with exit code {process.returncode}")
        if time.monotonic() > end:
            raise RuntimeError(f"the training has not come so far within {limit_s:.0f} s")
        time.sleep(0.2)


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The complete rows of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def traces(workdir: Path) -> list[Path]:
    """The files of the traces that are written."""
    return list((workdir / "profile").rglob("*.xplane.pb"))


def saved(workdir: Path) -> list[Path]:
    """The complete checkpoints."""
    return list((workdir / "checkpoints").glob("*/SHA256SUMS"))


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median speed of rows, without the first one, and memory and norms of the last one."""
    speeds = [row["time/images_per_s"] for row in found[1:] if "time/images_per_s" in row]
    last = found[-1]
    result = {"rows": len(found), "last_step": last["step"], "loss": last["loss"]}
    result |= {name: last[name] for name in MEMORY if name in last}
    return result | {"images_per_s": statistics.median(speeds) if speeds else None}


def emit_ledger(emit: Callable, workdir: Path, outside_s: float) -> None:
    """Emits the seconds of goodput.jsonl by category, and those of a clock outside."""
    from imagen_jax import goodput

    found = goodput.summarise(goodput.read_entries(workdir))
    emit("ledger", outside_s=outside_s, ledger_s=found.wall_s, seconds=dict(found.seconds))
