"""Runs of several processes over loopback, four virtual CPU devices each with two of them: stopped, killed, continued by another number."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from imagen_jax.metrics import read_metrics
from tests import tiny, xla
from tests.data import synthetic

DEVICES = 8  # over all processes
LOST_S = 8  # in which jax gives a process up
LOST = 75  # exit code of a process that ends because another one did
EIGHT_DEVICES = ("--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.mesh.fsdp_min_elements=64")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic.write_prepared(tmp_path_factory.mktemp("prepared") / "data", images=20, size=32)


class Team:
    """The processes of one run, started."""

    def __init__(self, data: Path, workdir: Path, count: int, *more: str, programs: dict[int, str] | None = None, leave_out: tuple[int, ...] = ()):
        """programs: Python that a process runs instead of `-m imagen_jax.train`. leave_out: processes that are not started."""
        self.logs = [workdir.with_suffix(f".{i}.log") for i in range(count)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [
            f"--config={tiny.ROOT}/configs/sr_1024.py:tiny", f"--workdir={workdir}", f"--config.data.path={data}", "--config.train.save_every=4",
            f"--config.text.dim={synthetic.DIM}", *EIGHT_DEVICES, f"--host_lost={LOST_S}", "--host_timeout=60", *more,
        ]  # fmt: skip
        self.processes = {}
        for i in set(range(count)) - set(leave_out):
            place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)} if count > 1 else {}
            env = os.environ | {"XLA_FLAGS": xla.flags(devices=DEVICES // count), "PYTHONPATH": str(tiny.ROOT)} | place
            program = ["-c", programs[i]] if programs and i in programs else ["-m", "imagen_jax.train"]
            with open(self.logs[i], "w") as log:
                self.processes[i] = subprocess.Popen([sys.executable, *program, *command], env=env, stdout=log, stderr=log, start_new_session=True)

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def log(self, i: int) -> str:
        return self.logs[i].read_text(errors="replace")

    def wait(self, seconds: float = 200) -> dict[int, int]:
        """Exit codes by process, of all that are still there."""
        end = time.monotonic() + seconds
        return {i: process.wait(timeout=max(0.1, end - time.monotonic())) for i, process in self.processes.items()}

    def until(self, condition, seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and all(p.poll() is None for p in self.processes.values()), "\n".join(self.log(i)[-3000:] for i in self.processes)
            time.sleep(0.01)


def finish(data: Path, workdir: Path, count: int, *more: str, **others) -> Team:
    """A run that comes to its end, with exit code 0 in every process."""
    with Team(data, workdir, count, *more, **others) as team:
        assert set(team.wait().values()) == {0}, "\n".join(team.log(i)[-3000:] for i in range(count))
    return team


def losses(workdir: Path) -> list[float]:
    """By step, without a gap or a step twice."""
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def last_line(log: str) -> str:
    return [line for line in log.splitlines() if line.startswith("error: ")][-1]


@pytest.mark.parametrize("victim, next_count", [(1, 1), pytest.param(0, 4, marks=pytest.mark.slow)])
def test_stopped_killed_and_continued_by_another_number(data, tmp_path, victim, next_count):
    """Catches: a signal that each process answers after a step of its own; survivors that wait for ever, or do not say for whom; checkpoints,
    data or noise that depend on the number of processes."""
    workdir = tmp_path / "run"
    with Team(data, workdir, 2, "--config.train.steps=100000") as team:
        team.until(lambda: len(read_metrics(workdir)) >= 3)
        team.processes[1 - victim].send_signal(signal.SIGTERM)
        assert team.wait() == {0: 0, 1: 0}, team.log(0)[-3000:]
    stopped = max(saved(workdir))
    for i in (0, 1):
        assert f"{stopped} of 100000 steps done, saved" in team.log(i)
    steps = stopped + 12
    with Team(data, workdir, 2, f"--config.train.steps={steps}") as team:
        team.until(lambda: len(read_metrics(workdir)) >= stopped + 5)
        team.processes[victim].kill()
        killed = time.monotonic()
        codes = team.wait(60)
    assert codes == {victim: -signal.SIGKILL, 1 - victim: LOST}, team.log(1 - victim)[-3000:]
    assert time.monotonic() - killed < 5 * LOST_S
    assert f"lost process {victim} ({socket.gethostname()})" in last_line(team.log(1 - victim))
    assert stopped < max(saved(workdir)) < steps
    finish(data, workdir, next_count, f"--config.train.steps={steps}")
    finish(data, tmp_path / "straight", 1, f"--config.train.steps={steps}")
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "straight"), rtol=1e-5)
