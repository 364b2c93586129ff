"""Runs jobs on this machine: each as several processes that find one another over the loopback
address, started again when one of them dies.

Processes on CPU get --devices virtual devices each. A machine's GPUs or TPU chips are one process's
(--processes=1, the default).
"""

import argparse
import contextlib
import ctypes
import functools
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from imagen_jax.distributed.watch import LOST
from imagen_jax.storage import only_process
from launch import status
from launch.job import USAGE_ERROR, Job, exports

POLL_S = 0.1
GRACE_S = 10.0  # for the other processes to end when one has failed: they cannot go on without it
END_S = 300.0  # for the other processes to end when one has ended in order
TABLE_S = 60.0  # between two tables of several jobs; on a terminal it is kept up to date
INTERRUPTED = 130
LOG = "output.log"
PORTS = range(21_000, 29_000)  # below those that Linux gives to whoever asks for any (32768 and up)


def define_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--where local")
    group.add_argument("--processes", type=int, default=1, help="of each job")
    group.add_argument(
        "--devices",
        type=int,
        default=0,
        help="virtual CPU devices of each process; 0: the devices that the machine has",
    )


def check(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    if options.processes < 1 or options.devices < 0:
        raise ValueError(
            f"--processes={options.processes} --devices={options.devices}: at least one process,"
            " with no negative number of devices"
        )
    if options.processes > 1 and not options.devices:
        raise ValueError(
            "--processes needs --devices: several processes on one machine share no GPU or TPU, so"
            " they run on virtual CPU devices"
        )


def render(jobs: Sequence[Job], options: argparse.Namespace) -> str:
    """What will be run, as shell lines; the port is chosen when it is."""
    lines = []
    for job in jobs:
        lines += [
            f"# {job.title}",
            *([f"({'; '.join([*exports(job.environment), job.setup])})"] if job.setup else []),
        ]
        for process in range(options.processes):
            variables = {**job.environment, **_variables(options, process, "PORT")}
            lines.append(
                " ".join(
                    [f"{name}={shlex.join([value])}" for name, value in variables.items()]
                    + [shlex.join(job.command("python"))]
                )
            )
    return "\n".join(lines)


def _variables(options: argparse.Namespace, process: int, port: int | str) -> dict[str, str]:
    """What tells a process its place: the coordinator, which listens on this machine only, and its
    devices.
    """
    found = {
        "JAX_NUM_PROCESSES": str(options.processes)
    }  # 1: alone, whatever cluster this machine is in
    if options.processes > 1:
        address = f"127.0.0.1:{port}"
        found |= {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_COORDINATOR_BIND_ADDRESS": address,
            "JAX_PROCESS_ID": str(process),
        }
    if options.devices:
        found |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
    return found


def _take_port(kept: contextlib.ExitStack) -> int:
    """A free port that nobody else is given until `kept` is closed: not one that the system hands
    out, and no other launcher's on this machine.
    """
    directory = Path(tempfile.gettempdir()) / f"imagen_jax_ports_{os.getuid()}"
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with contextlib.suppress(ValueError, OSError), contextlib.ExitStack() as taken:
            taken.enter_context(only_process(directory / str(port), "using"))
            socket.create_server(("", port)).close()
            kept.push(taken.pop_all())
            return port
    raise ValueError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")


class Group:
    """The processes of one attempt at a job. What they print goes to `write` line by line, with the
    process's number before it.
    """

    def __init__(self, job: Job, options: argparse.Namespace, write: Any):
        self._first: int | None = None  # exit code of the first process that ended
        self._deadline = float("inf")
        self._kept = contextlib.ExitStack()
        port = _take_port(self._kept)
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not re.match("JAX_(COORDINATOR|NUM_PROC|PROCESS)", name)
        }
        if (
            options.devices
        ):  # an older way to ask for virtual devices, which would say something else
            flags = re.sub(
                r"--xla_force_host_platform_device_count=\d+", "", inherited.get("XLA_FLAGS", "")
            ).strip()
            inherited |= {"XLA_FLAGS": flags}
        self._processes: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []
        self._running: set[int] = set()
        for i in range(options.processes):
            environment = {
                **inherited,
                **job.environment,
                **_variables(options, i, port),
                "PYTHONUNBUFFERED": "1",
            }
            process = subprocess.Popen(
                job.command(sys.executable),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=_end_with_launcher(),
            )
            prefix = f"[{i}] ".encode() if options.processes > 1 else b""
            reader = threading.Thread(
                target=_pass_lines, args=(process.stdout, prefix, write), daemon=True
            )
            reader.start()
            self._processes.append(process)
            self._running.add(process.pid)
            self._readers.append(reader)

    def poll(self) -> int | None:
        """None while a process runs, else the exit code: that of the first process that failed,
        negative if a signal ended it.
        """
        codes = [process.poll() for process in self._processes]
        for process, code in zip(self._processes, codes):
            if code is not None:
                self._end_children(process)
        ended = [code for code in codes if code is not None]
        # Of several at once the cause comes first: what a signal ended, then what failed by itself,
        # then what only noticed.
        failed = sorted((code for code in ended if code), key=lambda code: (code == LOST, code))
        if ended and self._first in (None, 0) and (self._first is None or failed):
            self._first = failed[0] if failed else 0
            self._deadline = time.monotonic() + (GRACE_S if failed else END_S)
            if failed:
                self.send(signal.SIGTERM)
        elif (
            self._first == LOST
        ):  # it noticed before the one that failed had ended, which no signal of ours explains
            self._first = next((code for code in failed if code > 0), LOST)
        if len(ended) == len(codes):
            self.close()
            return self._first
        if time.monotonic() > self._deadline:
            self._first = self._first or 1  # ended in order, but not all of it
            self.close()
            return self._first
        return None

    def send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def close(self) -> None:
        """Ends what is left, with the processes that it started, and frees the port."""
        for process in self._processes:
            self._end_children(process)
            process.wait()
        for reader in self._readers:
            reader.join(timeout=GRACE_S)
        self._kept.close()

    def _end_children(self, process: subprocess.Popen) -> None:
        """Kills a process with all that it started, such as data workers. Once: afterwards the
        number may be another's.
        """
        if process.pid in self._running:
            self._running.remove(process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _pass_lines(stream: BinaryIO, prefix: bytes, write: Any) -> None:
    for line in stream:
        write(prefix + line.rstrip(b"\n") + b"\n")


def _end_with_launcher() -> Any:
    """For a new process: SIGTERM, upon which a training saves and ends, when the launcher dies
    without a word. Linux only.
    """
    if sys.platform != "linux":
        return None
    prctl, set_death_signal = _libc().prctl, 1
    return lambda: prctl(set_death_signal, signal.SIGTERM)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class Attempts:
    """A job, from its first start to its last end. `code` is None until then."""

    def __init__(self, job: Job, options: argparse.Namespace, echo: bool):
        self.job, self.code, self._options, self._attempt, self._retries, self._stopped = (
            job,
            None,
            options,
            0,
            job.retries,
            False,
        )
        self._log = open(job.record / LOG, "ab", buffering=0)
        self._sinks = [self._log, *([sys.stdout.buffer] if echo else [])]
        self._start()

    def _start(self) -> None:
        self._last_error = b""
        status.record(
            self.job,
            "local",
            "running",
            f"attempt {self._attempt + 1}" if self._attempt else "",
            self._attempt,
        )
        self._group = Group(self.job, self._options, self._write)

    def poll(self) -> None:
        code = None if self.code is not None else self._group.poll()
        if code is None:
            return
        why = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        if code in (0, USAGE_ERROR) or self._attempt >= self._retries:
            self.code = code
            error = self._last_error.decode(errors="replace")
            if code:
                state = (
                    "stopped" if self._stopped and (code < 0 or code == INTERRUPTED) else "failed"
                )
            else:
                state = "finished" if self._ended() else "stopped"
            status.record(
                self.job,
                "local",
                state,
                f"{why}{f'; {error}' if error else ''}" if code else "",
                self._attempt,
            )
            return
        self._attempt += 1
        self._write(
            f"{self.job.title}: {why}; starting again from its newest checkpoint, attempt"
            f" {self._attempt + 1} of {self._retries + 1}\n".encode()
        )
        self._start()

    def _ended(self) -> bool:
        """Whether processes that ended in order are at their end: they also do when asked to stop,
        which only a training's files tell from its end.
        """
        return status.read(self.job).ended if self.job.steps else not self._stopped

    def stop(self, number: int) -> None:
        """Passes a signal on; the job is not started again."""
        self._retries, self._stopped = 0, True
        if self.code is None:
            at_once = "its processes are ended at once"
            asked = (
                "its processes are told to save and end, which they do after the step that they are"
                " at; a second signal ends them at once"
            )
            self._write(
                f"{self.job.title}: {at_once if number == signal.SIGKILL else asked}\n".encode()
            )
            self._group.send(number)

    def close(self) -> None:
        if self.code is None:
            self._group.close()
            status.record(self.job, "local", "stopped", "the launcher ended", self._attempt)
        self._log.close()

    def _write(self, line: bytes) -> None:
        if re.search(rb"[Ee]rror: ", line):
            self._last_error = line.strip()
        for sink in self._sinks:
            with contextlib.suppress(
                OSError
            ):  # whoever read the output has gone, or the disk is full; the job goes on
                sink.write(line)
                sink.flush()


def run(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Runs all jobs to their end, side by side, and shows them in a table if they are several. 0 if
    all ended well, else the first bad exit code.

    SIGINT and SIGTERM go on to all processes, which save and end, and the exit code is 130; a
    second one ends them at once.
    """
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    with contextlib.ExitStack() as stack:
        for number, handler in before.items():
            stack.callback(signal.signal, number, handler)
        for job in jobs:
            stack.enter_context(only_process(job.record, "launching in"))
            _set_up(job)
        attempts = [
            stack.enter_context(contextlib.closing(Attempts(job, options, echo=len(jobs) == 1)))
            for job in jobs
        ]
        _watch(attempts, received, Board(jobs) if len(jobs) > 1 else None)
        if received:
            return INTERRUPTED
        code = next((attempt.code for attempt in attempts if attempt.code), 0)
        return code if code >= 0 else 128 - code


def _set_up(job: Job) -> None:
    if (
        job.setup
        and subprocess.run(
            job.setup, shell=True, executable="/bin/bash", env=os.environ | dict(job.environment)
        ).returncode
    ):
        raise ValueError(f"--setup of {job.title} failed: {job.setup}")


def _watch(attempts: Sequence[Attempts], received: Sequence[int], board: "Board | None") -> None:
    """Until all have ended."""
    passed_on = 0
    while True:
        for number in received[passed_on:2]:
            for attempt in attempts:
                attempt.stop(number if not passed_on else signal.SIGKILL)
            passed_on += 1
        for attempt in attempts:
            attempt.poll()
        done = all(attempt.code is not None for attempt in attempts)
        if board:
            board.show(at_once=done)
        if done:
            return
        time.sleep(POLL_S)


class Board:
    """The table of several jobs: on a terminal in one place, elsewhere now and then."""

    def __init__(self, jobs: Sequence[Job], interval_s: float = TABLE_S):
        self._jobs, self._live = jobs, sys.stdout.isatty()
        self._interval, self._next, self._lines = 2.0 if self._live else interval_s, 0.0, 0

    def show(self, at_once: bool = False) -> None:
        if not at_once and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._interval
        text = status.table(status.read(job) for job in self._jobs)
        if self._live and self._lines:
            print(f"\x1b[{self._lines}A\x1b[J", end="")
        print(text, flush=True)
        self._lines = text.count("\n") + 1


def find(job: Job, options: argparse.Namespace) -> str:
    """Nobody but the workdir's locks knows of local jobs."""
    return ""
