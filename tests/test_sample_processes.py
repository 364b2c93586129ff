"""`sample` with several processes: each picture is that of one process, drawn once."""

import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagen_jax import picture_set
from tests import processes, tiny_cascade
from tests.processes import log_of

PROMPTS = [f"{colour} {thing}" for colour in ("red", "blue") for thing in "apple cat sun".split()]
COUNT = 4  # pictures per prompt
TOTAL = COUNT * len(PROMPTS)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def start(
    files: dict[str, Path], output: Path, count: int, devices: int, *more: str
) -> list[subprocess.Popen]:
    """Starts `sample` in `count` processes, on all `devices` together."""
    prompts = output.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    command = [
        *("-m", "imagen_jax.sample", *tiny_cascade.options(files)),
        *(f"--prompts={prompts}", f"--count={COUNT}", f"--output={output}"),
        *("--config.batch_size=8", "--host_lost=12", "--host_timeout=120", *more),
    ]
    return processes.start(lambda i: command, output, count, devices)


def finish(files: dict[str, Path], output: Path, count: int, devices: int, *more: str) -> None:
    processes.finish(start(files, output, count, devices, *more), output)


def rows(output: Path) -> list[dict]:
    """The rows of the manifest, and nothing else in the directory that is unfinished."""
    (listed,) = picture_set.chunks(output / "set_0000.jsonl", TOTAL + 1, 1)
    assert not list(output.glob("*part*"))
    return listed


def pixels(output: Path, row: dict) -> np.ndarray:
    return np.asarray(Image.open(output / row["file"])).astype(int)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The stages of a small cascade."""
    return tiny_cascade.write(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """The pictures of one process with one device, one at a time.

    So it computes one row at once, as each of eight devices does: more rows are rounded in another
    way, which reaches two levels of a pixel on some CPUs.
    """
    output = tmp_path_factory.mktemp("alone") / "out"
    finish(files, output, 1, 1, "--config.batch_size=1")
    return output


def assert_same_pictures(output: Path, alone: Path) -> None:
    assert [row["row"] for row in rows(output)] == list(range(TOTAL))
    for mine, other in zip(rows(output), rows(alone)):
        assert (mine["prompt"], mine["seed"]) == (other["prompt"], other["seed"])
        assert np.abs(pixels(output, mine) - pixels(alone, other)).max() <= 1


def test_two_processes_of_four_devices_draw_the_same(files, alone, tmp_path):
    """Catches noise that depends on the device, rows that change places between processes, and a
    row that two processes write. The parameters are sharded.
    """
    finish(files, tmp_path / "out", 2, 8, "--config.mesh.data=4", "--config.mesh.fsdp=2")
    assert_same_pictures(tmp_path / "out", alone)


def test_a_killed_run_is_finished_by_more_processes(files, alone, tmp_path):
    """Catches pictures that are drawn again, or never, after a kill."""
    output = tmp_path / "out"
    running = start(files, output, 2, 2)
    end = time.monotonic() + 600
    drawn = lambda: [*picture_set.part_rows(output, 0)]
    while len(drawn()) < 8 and time.monotonic() < end:
        assert all(process.poll() is None for process in running), log_of(output, 0).read_text()
        time.sleep(0.01)
    running[1].send_signal(signal.SIGKILL)
    assert running[0].wait(timeout=120) != 0  # it names the lost process and ends
    before = {row["row"]: row["sha256"] for row in drawn()}
    assert 8 <= len(before) < TOTAL
    finish(files, output, 4, 4)
    log = log_of(output, 0).read_text()
    assert re.search(rf"\b{len(before)} of {TOTAL} pictures are there already", log)
    assert re.search(rf"\b{TOTAL - len(before)} pictures in ", log)
    assert before.items() <= {row["row"]: row["sha256"] for row in rows(output)}.items()
    assert_same_pictures(output, alone)
    finish(files, output, 1, 1)
    assert f"{TOTAL} of {TOTAL} pictures are there already" in log_of(output, 0).read_text()
    assert sorted(path.name for path in output.glob("set_*")) == ["set_0000.json", "set_0000.jsonl"]
