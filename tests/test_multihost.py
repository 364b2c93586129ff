"""Runs of several processes over loopback with virtual CPU devices: stopped, killed, continued by
another number.
"""

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

from imagen_jax import exit_codes
from imagen_jax.exit_codes import LOST
from imagen_jax.run_log import VALIDATION, read_metrics
from tests import tiny, xla
from tests.data import synthetic

DEVICES = 4  # over all processes
LOST_S = 12  # seconds after which a process is given up

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic.write_prepared(
        tmp_path_factory.mktemp("prepared") / "data", images=20, size=32
    )


class Team:
    """The processes of one run, started."""

    def __init__(
        self,
        data: Path,
        workdir: Path,
        count: int,
        *more: str,
        programs: dict[int, str] | None = None,
        leave_out: tuple[int, ...] = (),
        devices: int = DEVICES,
    ):
        """programs: Python that a process runs instead of `-m imagen_jax.train`. leave_out:
        processes that are not started. devices: of all together.
        """
        self.logs = [workdir.with_suffix(f".{i}.log") for i in range(count)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [
            f"--config={tiny.ROOT}/configs/sr_1024.py:tiny",
            f"--workdir={workdir}",
            f"--config.data.path={data}",
            "--config.train.save_every=4",
            f"--config.text.dim={synthetic.DIM}",
            "--config.mesh.data=2",
            f"--config.mesh.fsdp={devices // 2}",
            "--config.mesh.fsdp_min_elements=64",
            f"--host_lost={LOST_S}",
            "--host_timeout=60",
            *tiny.ONE_LEVEL,
            *more,
        ]
        self.processes = {}
        for i in set(range(count)) - set(leave_out):
            variables = (
                {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(i),
                }
                if count > 1
                else {}
            )
            env = (
                os.environ
                | {"XLA_FLAGS": xla.flags(devices=devices // count), "PYTHONPATH": str(tiny.ROOT)}
                | variables
            )
            program = (
                ["-c", programs[i]] if programs and i in programs else ["-m", "imagen_jax.train"]
            )
            with open(self.logs[i], "w") as log:
                self.processes[i] = subprocess.Popen(
                    [sys.executable, *program, *command],
                    env=env,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def log(self, i: int) -> str:
        return self.logs[i].read_text(errors="replace")

    def wait(self, seconds: float = 600) -> dict[int, int]:
        """Exit codes by process, of all that are still there."""
        end = time.monotonic() + seconds
        return {
            i: process.wait(timeout=max(0.1, end - time.monotonic()))
            for i, process in self.processes.items()
        }

    def until(self, condition, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and all(
                p.poll() is None for p in self.processes.values()
            ), "\n".join(self.log(i)[-3000:] for i in self.processes)
            time.sleep(0.01)


def finish(data: Path, workdir: Path, count: int, *more: str, **others) -> Team:
    """A run that comes to its end, with exit code 0 in every process."""
    with Team(data, workdir, count, *more, **others) as team:
        assert set(team.wait().values()) == {0}, "\n".join(
            team.log(i)[-3000:] for i in range(count)
        )
    return team


def losses(workdir: Path) -> list[float]:
    """By step, without a gap or a step twice."""
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def saved(workdir: Path) -> list[int]:
    return sorted(
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
    )


def last_line(log: str) -> str:
    return [line for line in log.splitlines() if line.startswith("error: ")][-1]


@pytest.mark.slow
@pytest.mark.parametrize("victim, next_count", [(1, 1), pytest.param(0, 4, marks=pytest.mark.long)])
def test_stopped_killed_and_continued_by_another_number(data, tmp_path, victim, next_count):
    """Catches: a signal that each process answers after a step of its own; survivors that wait for
    ever, or do not say for whom; checkpoints, data or noise that depend on the number of processes.
    """
    workdir = tmp_path / "run"
    with Team(data, workdir, 2, "--config.train.steps=100000", devices=8) as team:
        team.until(lambda: len(read_metrics(workdir)) >= 3)
        team.processes[1 - victim].send_signal(signal.SIGTERM)
        assert team.wait() == {0: 0, 1: 0}, team.log(0)[-3000:]
    stopped = max(saved(workdir))
    for i in (0, 1):
        assert f"{stopped} of 100000 steps done, saved" in team.log(i)
    steps = stopped + 12
    with Team(data, workdir, 2, f"--config.train.steps={steps}", devices=8) as team:
        team.until(lambda: len(read_metrics(workdir)) >= stopped + 5)
        team.processes[victim].kill()
        killed = time.monotonic()
        codes = team.wait(200)
    assert codes == {victim: -signal.SIGKILL, 1 - victim: LOST}, team.log(1 - victim)[-3000:]
    assert time.monotonic() - killed < 5 * LOST_S
    assert f"lost process {victim} ({socket.gethostname()})" in last_line(team.log(1 - victim))
    assert stopped < max(saved(workdir)) < steps
    finish(data, workdir, next_count, f"--config.train.steps={steps}", devices=8)
    finish(data, tmp_path / "straight", 1, f"--config.train.steps={steps}", devices=8)
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "straight"), rtol=1e-5)


@pytest.mark.slow
def test_missing_and_unlike_processes_are_named(data, tmp_path):
    """Catches: a start that waits for ever, or ends without a name; and hosts with another config
    or version that train together all the same.
    """
    with Team(data, tmp_path / "missing", 3, "--host_timeout=30", leave_out=(1,)) as team:
        assert team.wait() == {0: 2, 2: 2}
        for i in (0, 2):
            assert (
                "1 of 3 processes did not report within 30 s: process 1; there are 0 ("
                in last_line(team.log(i))
            )
    other = (
        "import runpy, sys; sys.argv += ['--config.optim.lr=0.5'];"
        " runpy.run_module('imagen_jax.train', run_name='__main__')"
    )
    host = socket.gethostname()
    with Team(data, tmp_path / "unlike", 2, programs={1: other}) as team:
        assert team.wait() == {0: 2, 1: 2}
        for i in (0, 1):
            assert (
                f"process 1 ({host}) differs from process 0 ({host}) in: config.optim.lr;"
                in last_line(team.log(i))
            )
    assert not (tmp_path / "unlike").exists()


@pytest.mark.slow
def test_stalled_process_is_named_and_given_up(data, tmp_path):
    """Catches: a stall that nobody explains, one that ends a run which could go on, and one that is
    waited for without end.
    """
    workdir, host = tmp_path / "run", socket.gethostname()
    with Team(data, workdir, 2, "--config.train.steps=100000", "--host_lost=20") as team:
        for time_ in (1, 2):
            seen, rows = len(team.log(0)), len(read_metrics(workdir))
            team.until(lambda: len(read_metrics(workdir)) >= rows + 3)
            team.processes[1].send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            team.until(
                lambda: f"waiting for process 1 ({host}), no heartbeat for" in team.log(0)[seen:]
            )
            assert time.monotonic() - stopped < 20
            if time_ == 1:
                team.processes[1].send_signal(signal.SIGCONT)
        assert team.processes[0].wait(200) == LOST
        assert f"lost process 1 ({host}), no heartbeat for" in last_line(team.log(0))


# Process 1's data end with an error after three batches.
DAMAGED_DATA = """
import runpy
from imagen_jax.data import pipeline
batches = pipeline.batches
def damaged(*args, **kwargs):
    reader = batches(*args, **kwargs)
    for _ in range(3):
        yield next(reader)
    raise ValueError("shard 7 is damaged")
pipeline.batches = damaged
runpy.run_module("imagen_jax.train", run_name="__main__")
"""

# Process 1 gets one number of one copy of the parameters wrong, by the last bit, in its third step.
DRIFTING = """
import runpy
import jax, numpy as np
from imagen_jax.training.step import TrainProgram
lower = TrainProgram.lower
def flip(leaf):
    shards = [shard.data for shard in leaf.addressable_shards]
    with jax.transfer_guard("allow"):
        wrong = np.array(shards[0])
        wrong.flat[-1] = np.nextafter(wrong.flat[-1], np.float32(9))
        shards[0] = jax.device_put(wrong, shards[0].sharding)
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
class Program:
    def __init__(self, lowered):
        self.lowered, self.done = lowered, 0
    def compile(self):
        self.step = self.lowered.compile()
        return self
    def __call__(self, state, batch):
        state, metrics = self.step(state, batch)
        self.done += 1
        if self.done == 3:
            leaves, structure = jax.tree.flatten(state.params)
            leaves[7] = flip(leaves[7])
            state = state.replace(params=jax.tree.unflatten(structure, leaves))
        return state, metrics
TrainProgram.lower = lambda self, *bucket: Program(lower(self, *bucket))
runpy.run_module("imagen_jax.train", run_name="__main__")
"""


@pytest.mark.slow
def test_failure_of_one_ends_all_with_its_reason(data, tmp_path):
    """Catches: processes that wait in a collective operation for one that has ended with an error,
    and logs that do not say which.
    """
    with Team(data, tmp_path / "run", 2, programs={1: DAMAGED_DATA}) as team:
        assert team.wait() == {0: LOST, 1: 2}
        assert last_line(team.log(1)) == "error: shard 7 is damaged"
        assert f"process 1 ({socket.gethostname()}) failed: shard 7 is damaged" in last_line(
            team.log(0)
        )


@pytest.mark.slow
def test_copies_that_differ_stop_the_run_before_it_saves(data, tmp_path):
    """Catches: a fault of one device that spoils a run in silence, and a check that names the wrong
    process, or nothing.
    """
    workdir = tmp_path / "run"
    four_copies = ["--config.mesh.data=4", "--config.mesh.fsdp=1"]
    with Team(data, workdir, 2, *four_copies, programs={1: DRIFTING}) as team:
        assert team.wait() == dict.fromkeys((0, 1), exit_codes.HARDWARE)
        for i in (0, 1):
            line = last_line(team.log(i))
            assert (
                line.startswith("error: after step 4 the copies of params/")
                and f"differ: on process 1 ({socket.gethostname()}), devices" in line
            )
    assert not (workdir / "checkpoints").exists()


@pytest.mark.slow
def test_non_finite_loss_stops_all_alike(data, tmp_path):
    """Catches: processes that go on while others stop, a report that several write, a save under
    way that is cut off.
    """
    workdir = tmp_path / "run"
    with Team(
        data,
        workdir,
        2,
        "--config.optim.lr=1e38",
        "--config.optim.clip=1e38",
        "--config.train.save_every=1",
    ) as team:
        assert team.wait() == dict.fromkeys((0, 1), exit_codes.NOT_FINITE)
        assert all("is not finite" in last_line(team.log(i)) for i in (0, 1))
    step = json.loads((workdir / "nonfinite.json").read_text())["step"]
    assert saved(workdir) and max(saved(workdir)) == step


@pytest.mark.slow
@pytest.mark.long
def test_failed_save_fails_in_all_and_the_run_goes_on(data, tmp_path):
    """Catches: a failed save of one process that the others wait for, or count as done; samples
    drawn by one process alone; a profile that stops it.
    """
    workdir, more = (
        tmp_path / "run",
        ["--config.train.sample_every=4", "--config.train.sample_rows=4", "--profile=5:2"],
    )
    team = finish(data, workdir, 2, "--config.train.steps=12", *more, programs={0: tiny.FULL_ONCE})
    for i in (0, 1):
        assert (
            f"checkpoint 4 was not saved in {workdir / 'checkpoints'}: [Errno 28] No space left on"
            " device" in team.log(i)
        )
    assert saved(workdir) == [8, 12] and list((workdir / "profile").rglob("*.xplane.pb"))
    assert sorted(path.name for path in (workdir / "images" / "ema").iterdir()) == [
        f"{n:08d}.png" for n in (4, 8, 12)
    ]


@pytest.mark.slow
@pytest.mark.long
def test_all_fall_back_to_the_same_checkpoint(data, tmp_path):
    """Catches: processes that each look for the newest checkpoint and find different ones; one that
    is damaged used by the process that did not look.
    """
    workdir = tmp_path / "run"
    finish(data, workdir, 2, "--config.train.steps=8")
    (workdir / "checkpoints" / "8" / "meta.json").write_text("{}")
    team = finish(data, workdir, 2, "--config.train.steps=12")
    assert all(
        "resuming from step 4" in team.log(i) for i in (0, 1)
    ) and "CHECKPOINT REJECTED" in team.log(0)
    finish(data, tmp_path / "straight", 1, "--config.train.steps=12")
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "straight"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_new_run_from_weights_ends_for_all_at_the_same_time(data, tmp_path):
    """Catches: weights loaded by one process alone, a time limit that each process keeps for
    itself.
    """
    workdir, later = tmp_path / "run", tmp_path / "later"
    finish(data, workdir, 1, "--config.train.steps=4")
    team = finish(
        data, later, 2, "--config.train.steps=100000", "--minutes=0.05", f"--init_from={workdir}"
    )
    newest = max(saved(later))
    assert (
        json.loads((later / "checkpoints" / str(newest) / "meta.json").read_text())["meta"][
            "init_from"
        ]["step"]
        == 4
    )
    assert all(f"{newest} of 100000 steps done, saved" in team.log(i) for i in (0, 1))


@pytest.mark.slow
@pytest.mark.long
def test_validation_does_not_depend_on_the_number_of_processes(tmp_path):
    """Catches: rows that a process does not read, reads twice or pads the batch with; a shuffled
    condition that each process chooses for itself; rows written by several.
    """
    data = synthetic.write_prepared(tmp_path / "data", images=20, size=32, heldout=0)
    more = [
        "--config.train.steps=4",
        "--config.train.validate_every=3",
        "--config.train.validate_rows=10",
    ]
    finish(data, tmp_path / "two", 2, *more)
    finish(data, tmp_path / "one", 1, *more)
    two, one = (read_metrics(tmp_path / name, VALIDATION) for name in ("two", "one"))
    assert [row["step"] for row in one] == [3, 4]
    assert [row.keys() for row in two] == [row.keys() for row in one]
    for found, expected in zip(two, one):
        for name, value in expected.items():  # differences are measured against the error itself
            scale = expected[f"{name.split('x_error_rise')[0]}x_error" if "rise" in name else name]
            assert abs(found[name] - value) <= 1e-6 * scale, name


@pytest.mark.slow
@pytest.mark.long
def test_image_split_over_processes(data, tmp_path):
    """Catches: processes that share an image's rows but read different ones."""
    split = [
        "--config.mesh.data=1",
        "--config.mesh.fsdp=1",
        "--config.mesh.spatial=4",
        "--config.train.steps=4",
    ]
    finish(data, tmp_path / "four", 4, *split)
    finish(data, tmp_path / "one", 1, *split)
    np.testing.assert_allclose(losses(tmp_path / "four"), losses(tmp_path / "one"), rtol=1e-5)


# The devices of a process are a block of the mesh, as those of a TPU host are, not neighbours in
# the order of the batch.
BLOCKS = """
import runpy
import jax
from imagen_jax import sharding
make_mesh = sharding.make_mesh
sharding.make_mesh = lambda sizes: make_mesh(sizes, [jax.devices()[i] for i in (0, 2, 1, 3)])
runpy.run_module("imagen_jax.train", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.long
def test_rows_that_are_not_neighbours(data, tmp_path):
    """Catches: rows in another order, with other noise, than on one host, where a process's devices
    are not neighbours.
    """
    finish(data, tmp_path / "two", 2, "--config.train.steps=4", programs={0: BLOCKS, 1: BLOCKS})
    finish(data, tmp_path / "one", 1, "--config.train.steps=4")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_overfit_on_several_processes(data, tmp_path):
    """Catches: a self-test that gives each process the whole batch, or ends differently in each."""
    found = []
    for count in (1, 2):
        with Team(data, tmp_path / str(count), count, "--overfit=3") as team:
            assert set(team.wait().values()) == {
                1
            }  # three steps do not bring the loss to a quarter
        found += [
            line
            for i in range(count)
            for line in team.log(i).splitlines()
            if line.startswith("overfit: loss")
        ]
    assert len(found) == 3 and len(set(found)) == 1


@pytest.mark.slow
def test_slurm_is_detected(data, tmp_path):
    """Catches: a cluster that jax knows but we do not ask about."""
    number = os.getpid()
    port = number % 2**12 + (65535 - 2**12 + 1)  # as jax makes it
    env = os.environ | {
        "SLURM_JOB_ID": str(number),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "PYTHONPATH": str(tiny.ROOT),
    }
    program = (
        "import logging; logging.basicConfig(level=20); from imagen_jax import distributed;"
        " distributed.start(60); import jax; print('devices', jax.device_count())"
    )
    start = lambda i: subprocess.Popen(
        [sys.executable, "-c", program],
        env=env
        | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "XLA_FLAGS": xla.flags(devices=2)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for i, process in enumerate([start(0), start(1)]):
        out, _ = process.communicate(timeout=300)
        assert (
            process.returncode == 0
            and "devices 4" in out
            and f"process {i} of 2 (slurm)" in out
            and f":{port}" in out
        ), out
