"""Runs that continue from fast checkpoints, or cannot because one host has lost its own."""

import re
import shutil
import time

import pytest

from imagen_jax.run_log import read_metrics
from tests import processes
from tests.data import synthetic

STEPS, SAVE_EVERY = 30, 8
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic.write_prepared(tmp_path_factory.mktemp("prepared") / "data", images=40)


def start(data, workdir, count):
    options = (
        f"--config.train.steps={STEPS}",
        f"--config.train.save_every={SAVE_EVERY}",
        "--config.train.sample_every=0",
        "--config.train.fast_every=3",
        f"--config.train.fast_dir={workdir.parent}/fast",
        "--host_lost=8",
    )
    return processes.train(data, workdir, workdir, count, *options)


def kill_after(running, workdir, step, seconds=300):
    """Kills all processes at once when every one has a fast checkpoint of `step` or later."""
    saved = lambda i: [
        int(path.parent.name)
        for path in (workdir.parent / "fast").glob(f"*/process_{i}/*/SHA256SUMS")
    ]
    end = time.monotonic() + seconds
    while not all(max(saved(i), default=0) >= step for i in range(len(running))):
        assert time.monotonic() < end and all(process.poll() is None for process in running)
        time.sleep(0.005)
    for process in running:
        process.kill()
    for process in running:
        process.wait()


def resumed_from(workdir):
    """(step, whether from a fast checkpoint) in the log of process 0; None if it began anew."""
    log = processes.log_of(workdir, 0).read_text()
    match = re.search(r"resuming from step (\d+)(, a fast checkpoint)?", log)
    return match and (int(match[1]), bool(match[2]))


def losses(workdir):
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_one_wiped_host(data, tmp_path, count):
    """Catches a fast checkpoint that changes a run, one that is used although a host has lost its
    part, and one that is not used although all have it.
    """
    whole = tmp_path / "whole" / "run"
    whole.parent.mkdir()
    processes.finish(start(data, whole, count), whole)
    killed = tmp_path / "killed" / "run"
    killed.parent.mkdir()
    kill_after(start(data, killed, count), killed, 3)
    again = start(data, killed, count)
    kill_after(again, killed, 12)
    step, fast = resumed_from(killed)
    assert fast and step >= 3
    (own,) = (tmp_path / "killed" / "fast").glob(f"*/process_{count - 1}")
    shutil.rmtree(own)
    processes.finish(start(data, killed, count), killed)
    step, fast = resumed_from(killed)
    assert not fast and step % SAVE_EVERY == 0
    log = processes.log_of(killed, 0).read_text()
    assert f"no fast checkpoint is used: process {count - 1} has none" in log
    assert losses(killed) == losses(whole)
