"""`evaluate --cascade --grid` from the command line: interrupted, continued, finished."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from imagen_jax import picture_set
from tests import processes, tiny_cascade
from tests.data import synthetic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROMPTS = 6
POINTS = [f"base_w={w}/sr_1_w={v}" for w in (1, 3) for v in (1, 3)]
SETS = ["base_w=1", "base_w=3", *POINTS]


def start(data: Path, output: Path, *more: str) -> subprocess.Popen:
    files = {name: data.parent / f"{name}.safetensors" for name in tiny_cascade.STAGES}
    command = [
        *("-m", "imagen_jax.evaluate", *tiny_cascade.options(files, "cascade")),
        *("--cascade.batch_size=2", "--suite=data", f"--data={data}"),
        *("--split=train", "--network=efficientnet-lite0", "--metrics=kid"),
        *("--grid=base.w=1,3", "--grid=sr_1.w=1,3", f"--output={output}", *more),
    ]
    (process,) = processes.start(lambda i: command, output, 1, 1)
    return process


def log(output: Path) -> str:
    return processes.log_of(output, 0).read_text()


def finish(data: Path, output: Path, *more: str) -> str:
    processes.finish([start(data, output, *more)], output)
    return log(output)


def drawn(output: Path, name: str) -> dict[int, str]:
    """{row: checksum} of the pictures of a set."""
    rows = picture_set.part_rows(output / "grid" / name / "pictures", 0)
    return {row["row"]: row["sha256"] for row in rows}


def test_an_interrupted_grid_continues(tmp_path):
    """Catches base pictures that each point draws, pictures or features that are computed again,
    and a finished point whose metrics are computed again.
    """
    tiny_cascade.write(tmp_path)
    data, output = synthetic.write_prepared(tmp_path / "data", images=PROMPTS), tmp_path / "out"
    running, end = start(data, output), time.monotonic() + 600
    while not drawn(output, SETS[2]) and time.monotonic() < end:
        assert running.poll() is None, log(output)[-3000:]
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = {name: drawn(output, name) for name in SETS}
    left = len(SETS) * PROMPTS - sum(map(len, before.values()))
    assert len(before[SETS[0]]) == len(before[SETS[1]]) == PROMPTS and left

    told = finish(data, output)
    assert f"4 points, 6 sets, {left} pictures to draw of 36" in told
    after = {name: drawn(output, name) for name in SETS}
    assert all(before[name].items() <= after[name].items() for name in SETS)
    pictures = list((output / "grid").glob("**/pictures/*_caption_*.png"))
    assert len(pictures) == 6 * PROMPTS  # 2 sets of base pictures for 4 points
    result = json.loads((output / "grid.json").read_text())
    assert [point["settings"] for point in result["points"]] == [
        {"base.w": w, "sr_1.w": v} for w in (1.0, 3.0) for v in (1.0, 3.0)
    ]
    for point, name in zip(result["points"], POINTS):
        assert Path(point["pictures"]["manifest"]).parent == output / "grid" / name / "pictures"
        assert set(point["metrics"]["efficientnet-lite0"]) == {"kid"}
        assert point["retrieval"]["n"] == PROMPTS and point["retrieval"]["gallery"] == 9
    assert {found["metric"] for found in result["best"]} == {"kid", "top1", "top5"}
    assert result["provenance"]["suite"]["count"] == PROMPTS
    assert (output / "pareto.png").stat().st_size > 10_000 and "retrieval" in told

    times = {path: path.stat().st_mtime_ns for path in (output / "grid").glob("**/*.*z")}
    times |= {path: path.stat().st_mtime_ns for path in (output / "grid").glob("**/scores.json")}
    told = finish(data, output)
    assert "0 pictures to draw of 36" in told and "point 1 of 4" not in told
    assert times == {path: path.stat().st_mtime_ns for path in times} and len(times) > 8
