"""`evaluate --checkpoint` with several processes: the numbers of one process, written once."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from imagen_jax.stage import create_stage
from imagen_jax.weights.checkpoint import Checkpoints
from imagen_jax.weights.retention import Retention
from tests import processes, tiny
from tests.data import synthetic
from tests.processes import log_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SHARDED = """
import runpy
from imagen_jax.text import program
program.fewest_parts = lambda weights, memory, devices: 2
runpy.run_module("imagen_jax.evaluate", run_name="__main__")
"""
STEPS = (7, 9)
NUMBERS = ["--rows=7", "--samples=5", "--bins=2", "--batch_size=4", "--steps=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic.write_prepared(
        tmp_path_factory.mktemp("prepared") / "data", images=20, size=32, heldout=5
    )


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
    """A finished run of a super-resolution stage, with two checkpoints."""
    workdir = tmp_path_factory.mktemp("run")
    changes = {"mesh__fsdp_min_elements": 64, "text__dim": synthetic.DIM}
    config = tiny.config("sr_1024", **tiny.ONE_LEVEL_FIELDS, **changes)
    params = tiny.random_params(create_stage(config).init)
    manifest = json.loads((data / "manifest.json").read_text())
    meta = {"config": config, "encoder": manifest["encoder"], "manifest_hash": manifest["hash"]}
    with Checkpoints(workdir / "checkpoints", Retention(9)) as checkpoints:
        for step in STEPS:
            state = {"ema": jax.tree.map(lambda leaf: leaf * np.float32(step / 7), params)}
            checkpoints.save(step, jax.device_put(state), meta)
    (workdir / "config.json").write_text(json.dumps({"train": {"steps": STEPS[-1]}}))
    return workdir


def start(output: Path, count: int, devices: int, *more: str, program=(), apart=()):
    """Starts `evaluate` in `count` processes, on all `devices` together.

    program: Python options to run instead of the command. apart: options of the last process only.
    """
    command = [*(program or ("-m", "imagen_jax.evaluate")), f"--output={output}", *more]
    options = lambda i: [*command, *(apart if i == count - 1 else ())]
    return processes.start(options, output, count, devices)


def finish(output: Path, count: int, devices: int, *more: str, code=0, **others) -> None:
    running = start(output, count, devices, *more, *NUMBERS, **others)
    processes.finish(running, output, code)


@pytest.fixture(scope="module")
def alone(data, workdir, tmp_path_factory):
    """The newest checkpoint, evaluated by one process with one device."""
    output = tmp_path_factory.mktemp("alone") / "out"
    finish(output, 1, 1, f"--checkpoint={workdir}", f"--data={data}")
    return output


def numbers(result):
    """The numbers of a result in order, without ratios, which enlarge rounding."""
    if isinstance(result, dict):
        left_out = ("provenance", "ratio")
        return [x for k, v in result.items() if k not in left_out for x in numbers(v)]
    if isinstance(result, list):
        return [x for value in result for x in numbers(value)]
    return [result] if isinstance(result, (int, float)) else []


def assert_same(output: Path, alone: Path) -> None:
    read = lambda directory: json.loads((directory / "evaluation.json").read_text())
    mine, other = read(output), read(alone)
    assert mine.keys() == other.keys() and "kid" in mine and "detail" in mine
    np.testing.assert_allclose(numbers(mine), numbers(other), rtol=1e-4, atol=1e-5)
    for name in ("rows.npz", "samples.npz"):
        with np.load(output / name) as a, np.load(alone / name) as b:
            assert a.files == b.files
            for key in a.files:
                if a[key].dtype == np.uint8:  # rounding may move a value to the next one
                    assert np.abs(a[key].astype(int) - b[key]).max() <= 1
                elif a[key].dtype.kind != "U":
                    np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-4)
    assert (output / "loss.png").is_file() and (output / "samples_heldout.png").is_file()


@pytest.mark.parametrize(
    "processes, devices, program",
    [(2, 2, ()), pytest.param(4, 8, ("-c", SHARDED), marks=pytest.mark.long)],
)
def test_several_processes_measure_what_one_does(
    data, workdir, alone, tmp_path, processes, devices, program
):
    """Catches padding that is counted, rows of another process, noise by place in the batch, a
    part of the gallery left out, and arrays that only one process has. With 4 processes, the
    parameters are sharded.
    """
    output = tmp_path / "out"
    options = (f"--checkpoint={workdir}", f"--data={data}")
    finish(output, processes, devices, *options, program=program)
    assert_same(output, alone)
    for i in range(processes):
        printed = "all results: " in log_of(output, i).read_text()
        assert printed == (i == 0)


@pytest.mark.long
def test_followers_take_each_checkpoint_together(data, workdir, alone, tmp_path):
    """Catches processes that evaluate different checkpoints, or that append a line each."""
    output = tmp_path / "out"
    options = (f"--checkpoint={workdir}", f"--data={data}", "--follow")
    finish(output, 2, 2, *options)
    written = (output / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == list(STEPS)
    assert_same(output / str(STEPS[-1]), alone)
    assert not list((workdir / "checkpoints").glob("*reading*"))


def test_processes_with_other_settings_are_refused(data, workdir, tmp_path):
    """Catches processes that wait for each other for ever, or mix two evaluations."""
    output = tmp_path / "out"
    options = (f"--checkpoint={workdir}", f"--data={data}")
    finish(output, 2, 2, *options, code=2, apart=("--seed=1",))
    assert "process 1 (" in log_of(output, 0).read_text()
    assert ") in: seed; start the same command" in log_of(output, 0).read_text()


def test_damage_is_an_error_in_all_processes(data, workdir, tmp_path):
    """Catches processes that wait for process 0, which alone verifies the checkpoint."""
    damaged, output = tmp_path / "5", tmp_path / "out"
    damaged.mkdir()
    (damaged / "SHA256SUMS").write_text(f"{64 * '0'}  meta.json\n")
    finish(output, 2, 2, f"--checkpoint={damaged}", f"--data={data}", code=2)
    for i in (0, 1):
        assert "5 cannot be used: meta.json is missing" in log_of(output, i).read_text()
