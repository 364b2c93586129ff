"""A training of two processes under the local launcher, one of which is killed half-way.

It takes minutes and runs in `make test-long` only. test_local.py tests the launcher with small
programs, and test_multihost.py kills a training of two processes without it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagen_jax.run_log import read_metrics
from launch import local, status
from tests import tiny, xla
from tests.data import synthetic
from tests.launch.conftest import job

STEPS = 20
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic.write_prepared(
        tmp_path_factory.mktemp("prepared") / "data", images=24, size=32
    )


@contextlib.contextmanager
def launch(data: Path, workdir: Path) -> Iterator[subprocess.Popen]:
    """The launcher; it is killed with its processes if the test ends first."""
    command = [
        sys.executable,
        "-m",
        "launch",
        "--where=local",
        "--processes=2",
        "--devices=2",
        f"--workdir={workdir}",
        "--config=configs/sr_1024.py:tiny",
        f"--config.data.path={data}",
        f"--config.text.dim={synthetic.DIM}",
        f"--config.train.steps={STEPS}",
        "--config.train.save_every=5",
        *tiny.ONE_LEVEL,
    ]
    process = subprocess.Popen(
        command,
        cwd=tiny.ROOT,
        env=os.environ | {"XLA_FLAGS": xla.flags(), "PYTHONPATH": str(tiny.ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()


def losses(workdir: Path) -> dict[int, float]:
    rows = read_metrics(workdir)
    assert len({row["step"] for row in rows}) == len(rows), "rows of the same step twice"
    return {row["step"]: row["loss"] for row in rows}


def process(launcher: subprocess.Popen, index: int) -> int:
    """The id of the launcher's process with this index."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"JAX_PROCESS_ID={index}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no process {index}")


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with launch(data, workdir) as running:
        assert running.wait(timeout=600) == 0
    return losses(workdir)


@pytest.mark.long
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_killed_in_the_middle_changes_no_loss(data, undisturbed, tmp_path, index):
    """Catches a run that stays down, hangs or starts over after a process was killed.

    Also catches a restart with other batches, noise or optimizer state.
    """
    workdir = tmp_path / "run"
    with launch(data, workdir) as running:
        end = time.monotonic() + 600
        while len(read_metrics(workdir)) < 8:
            assert running.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        assert status.read(job(workdir)).state == "running"
        os.kill(process(running, index), signal.SIGKILL)
        assert running.wait(timeout=600) == 0
    assert losses(workdir) == undisturbed and max(undisturbed) == STEPS
    assert "killed by SIGKILL; starting again" in (workdir / "launch" / local.LOG).read_text()
    assert status.read(job(workdir)).state == "finished"
