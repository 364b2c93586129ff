"""A run of two processes is killed at random moments and continued, on a disk and in a bucket.

IMAGEN_JAX_KILLS sets the number of kills; by default there are a few.
"""

import os
import random
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from imagen_jax import exit_codes, storage
from imagen_jax.checksums import find_damage
from imagen_jax.distributed import host_failures
from imagen_jax.run_log import VALIDATION, read_metrics
from imagen_jax.weights import step_directories
from imagen_jax.weights.checkpoint import load_params
from tests import processes, storage_emulator, tiny
from tests.data import synthetic

KILLS = int(os.environ.get("IMAGEN_JAX_KILLS", "3"))
STEPS, SAVE_EVERY = 6 * (KILLS + 1), 3
LOST_S = 5  # seconds after which the other process gives up
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300 + 120 * KILLS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic.write_prepared(tmp_path_factory.mktemp("prepared") / "data", images=40)


def start(data, workdir, logs):
    options = (
        f"--config.train.steps={STEPS}",
        f"--config.train.save_every={SAVE_EVERY}",
        "--config.train.validate_every=6",
        "--config.train.validate_rows=16",
        f"--host_lost={LOST_S}",
        "--host_timeout=60",
    )
    return processes.train(data, workdir, logs, 2, *options)


def losses(workdir):
    """The loss of every step, and the validations; fails for a missing or doubled row."""
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    validations = read_metrics(workdir, VALIDATION)
    assert [row["step"] for row in validations] == list(range(6, STEPS + 1, 6))
    return [row["loss"] for row in rows], validations


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    """Losses, validations and parameters of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    processes.finish(start(data, workdir, workdir), workdir)
    return *losses(workdir), load_params(workdir)[0]


@pytest.fixture(params=["bucket", "disk"])
def workdir(request, tmp_path):
    if request.param == "disk":
        yield tmp_path / "run"
        return
    with storage_emulator.used(failing=0.02, delay=0.02):
        yield storage.as_path("--workdir", f"gs://{storage_emulator.BUCKET}/run")


def test_killed_at_random_moments(data, expected, workdir, tmp_path):
    """Catches a row that a kill loses or doubles, a half-written checkpoint that is used, a lock
    that blocks the next process, and any state that a resume does not bring back.
    """
    rng, killed = random.Random(KILLS), 0
    for number in range(10 * KILLS):
        logs = tmp_path / f"attempt_{number}"
        running = start(data, workdir, logs)
        if killed == KILLS:
            break
        wait_for_steps(running, logs)
        time.sleep(rng.uniform(0, 4))
        victim = rng.randrange(2)
        if any(process.poll() is not None for process in running):
            victim = None  # the run has ended first
        else:
            running[victim].kill()
            killed += 1
        codes = [process.wait(timeout=120) for process in running]
        if victim is not None:
            assert codes[1 - victim] in (0, exit_codes.LOST, exit_codes.FAILED), read(logs)
            if codes[1 - victim] == exit_codes.LOST:
                assert host_failures.read(workdir)[-1].process == victim
        directory = workdir / "checkpoints"
        for step in step_directories.steps(directory):
            assert find_damage(directory / str(step)) is None
    processes.finish(running, logs)
    assert killed == KILLS
    rows, validations, params = expected
    assert losses(workdir) == (rows, validations)
    assert equal(load_params(workdir)[0], params)
    check_commands(data, workdir, tmp_path, params)
    assert not [name for name in storage.entry_names(workdir / "checkpoints") if "." in name]


def check_commands(data, workdir, tmp_path, params):
    """Exports and evaluates the run; both write beside it."""
    file, evaluation = workdir.parent / "out.safetensors", workdir.parent / "evaluation"
    run = [sys.executable, "-m"]
    export = ["imagen_jax.export", f"--checkpoint={workdir}@{STEPS}", f"--output={file}"]
    evaluate = ["imagen_jax.evaluate", f"--checkpoint={workdir}", f"--data={data}", "--rows=8"]
    evaluate += [f"--output={evaluation}", "--measures=loss"]
    for command in (export, evaluate):
        done = subprocess.run([*run, *command], capture_output=True, text=True, cwd=tiny.ROOT)
        assert done.returncode == 0, done.stderr
    exported = load_params(file)[0]
    assert equal(exported, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params))
    found = storage.read_json(evaluation / "evaluation.json")
    assert found["step"] == STEPS


def wait_for_steps(running, logs, seconds=120):
    """Waits until the processes train, or have ended."""
    end = time.monotonic() + seconds
    while "replicas are compared" not in read(logs) and time.monotonic() < end:
        if all(process.poll() is not None for process in running):
            return
        time.sleep(0.05)


def read(logs):
    texts = [processes.log_of(logs, i).read_text(errors="replace")[-3000:] for i in range(2)]
    return "\n".join(texts)


def equal(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)
