"""`evaluate --cascade` with several processes: the result of one process, after a kill too."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from imagen_jax import picture_set, pictures
from tests import processes, tiny_cascade

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROMPTS = [f"{colour} {thing}" for colour in ("red", "blue") for thing in "apple cat sun".split()]
TOTAL = 4 * len(PROMPTS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A prompt file, a folder of real images, and the stages of a small cascade."""
    root = tmp_path_factory.mktemp("files")
    tiny_cascade.write(root)
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    rng = np.random.default_rng(0)
    for i in range(9):
        image = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        (root / "images").mkdir(exist_ok=True)
        pictures.write_png(root / "images" / f"{i}.png", image)
    return root


def start(files: Path, output: Path, count: int, devices: int, *more: str):
    base = {"base": files / "base.safetensors"}
    command = [
        *("-m", "imagen_jax.evaluate", *tiny_cascade.options(base, "cascade")),
        "--cascade.batch_size=8",
        *("--suite=prompts", f"--suite_file={files / 'prompts.txt'}", "--per_prompt=4"),
        *(f"--images={files / 'images'}", "--network=efficientnet-lite0", "--metrics=kid,mind"),
        *(f"--output={output}", "--host_lost=12", "--host_timeout=120", *more),
    ]
    return processes.start(lambda i: command, output, count, devices)


def log(output: Path) -> str:
    return processes.log_of(output, 0).read_text(errors="replace")


def finish(files: Path, output: Path, count: int, devices: int, *more: str) -> dict:
    processes.finish(start(files, output, count, devices, *more), output)
    return json.loads((output / "evaluation.json").read_text())


def features(output: Path) -> np.ndarray:
    """The features of all files; their rows depend on the number of processes."""
    rows = {}
    for path in (output / "features" / "efficientnet-lite0").glob("rows_*.npz"):
        with np.load(path) as file:
            rows |= zip(map(tuple, file["keys"].tolist()), file["values"])
    keys = [(i, j) for i in range(len(PROMPTS)) for j in range(4)]
    assert sorted(rows) == keys
    return np.stack([rows[key] for key in keys])


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out"
    return finish(files, output, 1, 1), features(output)


def assert_same(result: dict, output: Path, alone) -> None:
    expected, rows = alone
    np.testing.assert_allclose(features(output), rows, rtol=1e-3, atol=1e-3)
    assert set(result["metrics"]["efficientnet-lite0"]) == {"kid", "mind"}
    for name, found in result["metrics"]["efficientnet-lite0"].items():
        other = expected["metrics"]["efficientnet-lite0"][name]
        for key in ("value", "se"):
            assert found[key] == pytest.approx(other[key], rel=1e-6)
    same = ("suite", "references", "networks", "checkpoints")
    for name in same:
        assert (
            json.dumps(result["provenance"][name]).replace(str(output), "")
            == json.dumps(expected["provenance"][name])
            .replace(str(output.parent), "")
            .replace("/alone0/out", "")
            or name == "references"
        )


def test_two_processes_of_four_devices_measure_the_same(files, alone, tmp_path):
    """Catches features in the order of the processes, padding that is counted, and rows that are
    lost or doubled between processes.
    """
    output = tmp_path / "out"
    result = finish(files, output, 2, 8, "--cascade.mesh.fsdp=2", "--cascade.mesh.data=4")
    assert_same(result, output, alone)


def test_a_killed_evaluation_is_finished_by_four_processes(files, alone, tmp_path):
    """Catches pictures that are drawn again, or a result without them; and a metric that is added
    later and draws pictures.
    """
    output = tmp_path / "out"
    running = start(files, output, 2, 2)
    end = time.monotonic() + 600
    drawn = lambda: [*picture_set.part_rows(output / "pictures", 0)]
    while len(drawn()) < 8 and time.monotonic() < end:
        assert all(process.poll() is None for process in running), log(output)
        time.sleep(0.01)
    running[0].send_signal(signal.SIGKILL)
    assert running[1].wait(timeout=120) != 0
    running[0].wait()
    before = len(drawn())
    assert 8 <= before < TOTAL
    result = finish(files, output, 4, 4)
    assert f"{before} of {TOTAL} pictures are there already" in log(output)
    assert f"{TOTAL - before} pictures in " in log(output)
    assert_same(result, output, alone)
    result = finish(files, output, 1, 1, "--metrics=kid")
    assert f"{TOTAL} of {TOTAL} pictures are there already" in log(output)
    assert set(result["metrics"]["efficientnet-lite0"]) == {"kid"}
