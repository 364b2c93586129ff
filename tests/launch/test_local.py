"""The local launcher, with short programs in place of trainings."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imagen_jax import exit_codes
from launch import local, status
from tests import tiny
from tests.launch.conftest import job, options

# Each attempt writes its environment as a line; then it acts as the test says for this process and
# attempt.
PROGRAM = """
import json, os, pathlib, signal, subprocess, sys, time
here, script = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
i = int(os.environ.get("JAX_PROCESS_ID", 0))
log = here / f"process_{i}"
variables = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))}
with open(log, "a") as file:
    file.write(json.dumps(variables) + "\\n")
do = script[min(len(log.read_text().splitlines()), len(script)) - 1][i]
print("hello from", i, do, flush=True)
def told(*_):
    (here / f"told_{i}").touch()
    sys.exit({"late": 2, "interrupted": 130}.get(do, 0))
if do == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif do in ("wait", "late", "interrupted"):
    signal.signal(signal.SIGTERM, told)
if do == "child":
    (here / "child").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
(here / f"ready_{i}").touch()
if do in ("wait", "late", "interrupted", "stubborn", "child"):
    time.sleep(600)
if do in ("kill", 75):
    count = int(os.environ["JAX_NUM_PROCESSES"])
    while not all((here / f"ready_{n}").exists() for n in range(count)):
        time.sleep(0.02)
if do == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if do == 2:
    print("error: a field is wrong", file=sys.stderr)
sys.exit(do)
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(local, "GRACE_S", 1.0)


def program(tmp_path: Path, *attempts: list, name: str = "run", **fields):
    """A job whose process i does attempts[n][i] in its attempt n.

    An action is an exit code, kill, wait, late (exits with 2 on SIGTERM), interrupted (130),
    stubborn (ignores SIGTERM) or child (starts another process).
    """
    (tmp_path / name).mkdir(exist_ok=True)
    return job(
        tmp_path / name,
        arguments=("-c", PROGRAM, str(tmp_path / name), json.dumps(attempts)),
        **fields,
    )


def told(workdir: Path, process: int) -> list[dict]:
    """The environment of each attempt of a process."""
    return [json.loads(line) for line in (workdir / f"process_{process}").read_text().splitlines()]


def two(*more: str):
    return options("local", "--processes=2", "--devices=3", *more)


def test_processes_are_told_their_place(tmp_path, capfdbinary, monkeypatch):
    """Catches a coordinator that other machines can reach, and inherited flags.

    Also catches output that does not show which process wrote it.
    """
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_enable_fast_math=false"
    )
    monkeypatch.setenv("JAX_NUM_PROCESSES", "7")
    assert local.run([program(tmp_path, [0, 0])], two()) == 0
    first, second = (told(tmp_path / "run", i)[0] for i in (0, 1))
    host, port = first["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == "127.0.0.1" and int(port) in local.PORTS
    assert [result.pop("JAX_PROCESS_ID") for result in (first, second)] == [
        "0",
        "1",
    ] and first == second
    assert (first["JAX_NUM_PROCESSES"], first["JAX_PLATFORMS"], first["JAX_NUM_CPU_DEVICES"]) == (
        "2",
        "cpu",
        "3",
    )
    assert first["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"
    assert set(capfdbinary.readouterr().out.splitlines()) == {
        b"[0] hello from 0 0",
        b"[1] hello from 1 0",
    }


def test_one_process_needs_no_coordinator(tmp_path, monkeypatch):
    """Catches a single process that waits for others named in the launcher's environment."""
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1")
    assert local.run([program(tmp_path, [0])], options("local")) == 0
    (environment,) = told(tmp_path / "run", 0)
    assert environment["JAX_NUM_PROCESSES"] == "1" and not {
        "JAX_COORDINATOR_ADDRESS",
        "JAX_PROCESS_ID",
    } & set(environment)


@pytest.mark.parametrize("dies", [0, 1])
def test_when_one_dies_all_end_and_start_again(tmp_path, dies):
    """Catches processes that wait for a dead one, keep the old port or stay down."""
    first = ["stubborn", "stubborn"]
    first[dies] = "kill"
    assert local.run([program(tmp_path, first, [0, 0])], two()) == 0
    assert [len(told(tmp_path / "run", i)) for i in (0, 1)] == [2, 2]


def test_a_machine_that_fails_again_is_named(tmp_path, capfdbinary):
    """Catches a host that fails at every attempt and is never named."""
    attempts = program(tmp_path, ["kill"], ["kill"], [0], retries=2)
    assert local.run([attempts], options("local")) == 0
    output = capfdbinary.readouterr().out.decode()
    assert f"host {socket.gethostname()} failed 2 times in this run" in output
    assert "remove it from the job" in output and "killed by SIGKILL" in output


def test_failures_are_repeated_so_often_and_mistakes_never(tmp_path):
    """Catches a wrong number of restarts, restarts after invalid input, and a lost exit code."""
    assert local.run([program(tmp_path, [5], name="a", retries=2)], options("local")) == 5
    assert len(told(tmp_path / "a", 0)) == 3
    assert (
        local.run([program(tmp_path, ["kill"], name="b", retries=0)], options("local"))
        == 128 + signal.SIGKILL
    )
    for code in exit_codes.FINAL:
        one_job = program(tmp_path, [code], name=f"final_{code}", retries=2)
        assert local.run([one_job], options("local")) == code
        assert len(told(tmp_path / f"final_{code}", 0)) == 1
    row = status.read(job(tmp_path / "final_2"))
    assert (row.state, row.detail) == ("failed", "exit code 2; error: a field is wrong")


def test_the_cause_decides_and_not_who_noticed(tmp_path, monkeypatch):
    """Catches a restart after invalid input because another process exited with LOST."""

    class Late(local.Group):
        def poll(self):
            for process in self._processes:
                process.wait()  # both have ended when it looks
            return super().poll()

    monkeypatch.setattr(local, "Group", Late)
    assert local.run([program(tmp_path, [75, 2])], two()) == 2
    assert len(told(tmp_path / "run", 0)) == 1


def test_the_cause_decides_also_if_it_ends_last(tmp_path, monkeypatch):
    """Catches a restart because the process with invalid input ended after the others."""
    monkeypatch.setattr(local, "GRACE_S", 60.0)
    assert local.run([program(tmp_path, [75, "late"])], two()) == 2
    assert len(told(tmp_path / "run", 0)) == 1


def test_a_process_that_never_ends_does_not_hold_the_others(tmp_path, monkeypatch):
    """Catches a launcher that waits for ever for one of its processes."""
    monkeypatch.setattr(local, "END_S", 1.0)
    assert local.run([program(tmp_path, [0, "stubborn"], retries=0)], two()) == 1


def test_what_a_process_started_ends_with_it(tmp_path):
    """Catches data workers that survive their trainer and hold memory and files."""
    assert (
        local.run([program(tmp_path, ["child", "kill"], retries=0)], two()) == 128 + signal.SIGKILL
    )
    child = int((tmp_path / "run" / "child").read_text())
    assert (
        not Path(f"/proc/{child}/stat").exists() or " Z " in Path(f"/proc/{child}/stat").read_text()
    )


def test_jobs_side_by_side_do_not_end_one_another(tmp_path, capfd):
    """Catches a failed stage that ends the others or is hidden by their success.

    Also catches two jobs that get the same port.
    """
    jobs = [
        program(tmp_path, [2, 2], name="base", stage="base"),
        program(tmp_path, [0, 0], name="sr", stage="sr"),
    ]
    assert local.run(jobs, two()) == 2
    assert (
        told(tmp_path / "base", 0)[0]["JAX_COORDINATOR_ADDRESS"]
        != told(tmp_path / "sr", 0)[0]["JAX_COORDINATOR_ADDRESS"]
    )
    lines = capfd.readouterr().out.splitlines()
    assert lines[-3].split()[:2] == ["stage", "state"]
    assert [line.split()[:2] for line in lines[-2:]] == [["base", "failed"], ["sr", "finished"]]
    assert "hello from 1" in (tmp_path / "sr" / "launch" / local.LOG).read_text()


def start(one_job, stdout: int, *more: str) -> subprocess.Popen:
    """A launcher in a process of its own."""
    source = f"""
import sys
from launch import local
from tests.launch.conftest import job, options
jobs = [job({one_job.workdir!r}, arguments={one_job.arguments!r})]
sys.exit(local.run(jobs, options("local", *{more!r})))
"""
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=tiny.ROOT,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


def launcher(tmp_path: Path, *attempts: list) -> subprocess.Popen:
    """A launcher in a process of its own, whose two processes are ready."""
    process = start(
        program(tmp_path, *attempts), subprocess.DEVNULL, "--processes=2", "--devices=1"
    )
    wait_for(lambda: all((tmp_path / "run" / f"ready_{i}").exists() for i in (0, 1)))
    return process


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_signal_reaches_every_process_and_starts_nothing_again(tmp_path):
    """Catches Ctrl-C that leaves processes behind or restarts the job.

    Also catches a second launcher in the same workdir.
    """
    process = launcher(tmp_path, ["wait", "wait"])
    with pytest.raises(ValueError, match="another process is launching in"):
        local.run([program(tmp_path, [0, 0])], two())
    assert status.read(job(tmp_path / "run")).state == "running"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == local.INTERRUPTED
    assert all((tmp_path / "run" / f"told_{i}").exists() for i in (0, 1))
    assert [len(told(tmp_path / "run", i)) for i in (0, 1)] == [1, 1]


@pytest.mark.parametrize("saved, state", [(8, "finished"), (4, "stopped")])
def test_exit_code_0_is_the_end_only_at_the_last_step(tmp_path, saved, state):
    """Catches a training that saved and stopped on request but is recorded as finished."""
    one_job = program(tmp_path, [0], steps=8)
    (tmp_path / "run" / "checkpoints" / str(saved)).mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / str(saved) / "SHA256SUMS").touch()
    assert local.run([one_job], options("local")) == 0
    assert json.loads((one_job.record / status.STATE_FILE).read_text())["state"] == state


@pytest.mark.parametrize("does", ["wait", "interrupted"])
def test_what_is_told_to_end_is_stopped(tmp_path, does):
    """Catches a stopped command recorded as finished (exit code 0) or as failed (130)."""
    process = launcher(tmp_path, [does, does])
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == local.INTERRUPTED
    assert (
        json.loads((tmp_path / "run" / "launch" / status.STATE_FILE).read_text())["state"]
        == "stopped"
    )


def test_setup_has_the_variables_of_the_job(tmp_path, capfd):
    """Catches --setup that runs without the variables of --env."""
    one_job = program(tmp_path, [0], setup='echo "word is $WORD"', environment={"WORD": "a 'b'"})
    assert local.run([one_job], options("local")) == 0
    assert "word is a 'b'\n" in capfd.readouterr().out
    shown = subprocess.run(
        ["bash", "-c", local.render([one_job], options("local")).splitlines()[1]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "word is a 'b'\n"


def test_a_second_signal_ends_what_does_not_listen(tmp_path):
    """Catches a process that ignores SIGTERM and cannot be ended with the launcher."""
    process = launcher(tmp_path, ["stubborn", "stubborn"])
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == local.INTERRUPTED
    assert status.read(job(tmp_path / "run")).state == "stopped"
    log = (tmp_path / "run" / "launch" / local.LOG).read_text()
    assert "save after their current step" in log and "killing its processes" in log


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process that its parent died"
)
def test_a_killed_launcher_leaves_nothing_running(tmp_path):
    """Catches trainings that survive kill -9 of their launcher."""
    process = launcher(tmp_path, ["wait", "wait"])
    process.kill()
    process.wait()
    wait_for(lambda: all((tmp_path / "run" / f"told_{i}").exists() for i in (0, 1)))
    assert status.read(job(tmp_path / "run")).state == "stopped"
    assert local.run([program(tmp_path, [0, 0])], two()) == 0


def test_output_that_nobody_reads_any_more_holds_nothing_up(tmp_path):
    """Catches `python -m launch ... | head`, which blocks the training on a full pipe."""
    one_job = job(
        tmp_path / "run", arguments=("-c", "for i in range(20_000): print('a line of the log', i)")
    )
    process = start(one_job, subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=120)
    assert (tmp_path / "run" / "launch" / local.LOG).read_text().count("\n") == 20_000
    assert status.read(one_job).state == "finished"
