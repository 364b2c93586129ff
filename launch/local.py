"""Runs jobs on this machine. A job has one or more processes; all restart if one fails.

The processes of a job connect over the loopback address. On CPU each has --devices virtual devices.
The machine's GPUs or TPU chips belong to a single process (--processes=1, the default).
"""

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from absl import flags

from imagen_jax.distributed.host_failures import HostFailures, advice, read
from imagen_jax.exit_codes import FAILED, FINAL, INTERRUPTED, LOST
from imagen_jax.locks import only_process
from imagen_jax.storage import as_path
from launch import status
from launch.job import Job, exports, is_bucket_url

POLL_S = 0.1
GRACE_S = 10.0  # time for the other processes to end after one has failed
END_S = 300.0  # time for the other processes to end after one has ended without an error
TABLE_S = 60.0  # between two tables of several jobs; a terminal shows a live table
LIVE_S, LIVE_BUCKET_S = 2.0, 15.0  # between two changes of the live table
LOG = "output.log"
PORTS = range(21_000, 29_000)  # below Linux's ephemeral ports (32768 and up)


def define_flags(values: flags.FlagValues) -> None:
    """The options of --where local."""
    flags.DEFINE_integer("processes", 1, "processes of each job", flag_values=values)
    flags.DEFINE_integer(
        "devices",
        0,
        "virtual CPU devices of each process; 0: the devices of the machine",
        flag_values=values,
    )


def check(jobs: Sequence[Job], options: flags.FlagValues) -> None:
    """Raises ValueError for numbers of processes and devices that cannot run."""
    if options.processes < 1 or options.devices < 0:
        raise ValueError(
            f"--processes={options.processes} --devices={options.devices}: give at least one"
            " process and no negative number of devices"
        )
    if options.processes > 1 and not options.devices:
        raise ValueError(
            "--processes needs --devices: processes on one machine cannot share its GPU or TPU, so"
            " they run on virtual CPU devices"
        )


def render(jobs: Sequence[Job], options: flags.FlagValues) -> str:
    """The commands as shell lines; PORT is chosen when they run."""
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


def _variables(options: flags.FlagValues, process: int, port: int | str) -> dict[str, str]:
    """Environment variables of a process: its index, devices and coordinator address."""
    # One process: JAX looks for no others, whatever cluster this machine belongs to.
    variables = {"JAX_NUM_PROCESSES": str(options.processes)}
    if options.processes > 1:
        address = f"127.0.0.1:{port}"
        variables |= {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_COORDINATOR_BIND_ADDRESS": address,
            "JAX_PROCESS_ID": str(process),
        }
    if options.devices:
        variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
    return variables


def _take_port(stack: contextlib.ExitStack) -> int:
    """A free port, reserved among the launchers of this user until `stack` is closed."""
    directory = Path(tempfile.gettempdir()) / f"imagen_jax_ports_{os.getuid()}"
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with contextlib.suppress(ValueError, OSError), contextlib.ExitStack() as taken:
            taken.enter_context(only_process(directory / str(port), "using"))
            socket.create_server(("", port)).close()
            stack.push(taken.pop_all())
            return port
    raise ValueError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free: end other launchers")


class Group:
    """The processes of one attempt at a job.

    Each line of their output goes to `write`, after the process's number if there are several.
    """

    def __init__(self, job: Job, options: flags.FlagValues, write: Callable[[bytes], None]):
        self._first: int | None = None  # exit code of the first process that ended
        self._deadline = float("inf")
        self._stack = contextlib.ExitStack()
        port = _take_port(self._stack)
        inherited = _inherited(options)
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
        """None while a process runs, else the exit code of the first process that failed.

        It is negative if a signal ended that process.
        """
        codes = [process.poll() for process in self._processes]
        for process, code in zip(self._processes, codes):
            if code is not None:
                self._end_children(process)
        ended = [code for code in codes if code is not None]
        # Of several failures at once, the cause comes first: a process ended by a signal, then one
        # that failed, then one that ended because of another.
        failed = sorted((code for code in ended if code), key=lambda code: (code == LOST, code))
        if ended and self._first in (None, 0) and (self._first is None or failed):
            self._first = failed[0] if failed else 0
            self._deadline = time.monotonic() + (GRACE_S if failed else END_S)
            if failed:
                self.send(signal.SIGTERM)
        elif self._first == LOST:  # the process that failed may end after those that noticed
            self._first = next((code for code in failed if code > 0), LOST)
        if len(ended) == len(codes):
            self.close()
            return self._first
        if time.monotonic() > self._deadline:
            self._first = self._first or FAILED  # some processes never ended
            self.close()
            return self._first
        return None

    def send(self, number: int) -> None:
        """Sends a signal to all running processes."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def close(self) -> None:
        """Kills the remaining processes and their children, and frees the port."""
        for process in self._processes:
            self._end_children(process)
            process.wait()
        for reader in self._readers:
            reader.join(timeout=GRACE_S)
        self._stack.close()

    def _end_children(self, process: subprocess.Popen) -> None:
        """Kills a process's group, such as its data workers; once, as ids are reused."""
        if process.pid in self._running:
            self._running.remove(process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _inherited(options: flags.FlagValues) -> dict[str, str]:
    """This environment without variables that set the process index or number of devices."""
    process_variables = re.compile("JAX_(COORDINATOR|NUM_PROC|PROCESS)")
    variables = {
        name: value for name, value in os.environ.items() if not process_variables.match(name)
    }
    if options.devices:
        count = r"--xla_force_host_platform_device_count=\d+"
        variables["XLA_FLAGS"] = re.sub(count, "", variables.get("XLA_FLAGS", "")).strip()
    return variables


def _pass_lines(stream: BinaryIO, prefix: bytes, write: Callable[[bytes], None]) -> None:
    for line in stream:
        write(prefix + line.rstrip(b"\n") + b"\n")


def _end_with_launcher() -> Callable[[], Any] | None:
    """Makes a new process get SIGTERM when the launcher dies, so that it saves; Linux only."""
    if sys.platform != "linux":
        return None
    prctl, set_death_signal = _libc().prctl, 1
    return lambda: prctl(set_death_signal, signal.SIGTERM)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class Attempts:
    """All attempts at a job; `code` is its exit code, None until the last attempt has ended."""

    def __init__(self, job: Job, options: flags.FlagValues, echo: bool):
        self.job, self._options = job, options
        self.code: int | None = None
        self._attempt, self._retries, self._stopped = 0, job.retries, False
        self._log = open(job.record / LOG, "ab", buffering=0)
        self._sinks = [self._log, *([sys.stdout.buffer] if echo else [])]
        self._start()

    def _start(self) -> None:
        self._last_error = b""
        self._write_state("running", f"attempt {self._attempt + 1}" if self._attempt else "")
        self._group = Group(self.job, self._options, self._write)

    def poll(self) -> None:
        """Looks at the processes: starts the next attempt, or sets `code` after the last one."""
        code = None if self.code is not None else self._group.poll()
        if code is None:
            return
        why = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        if code in (0, *FINAL) or self._attempt >= self._retries:
            self.code = code
            error = self._last_error.decode(errors="replace")
            detail = f"{why}{f'; {error}' if error else ''}" if code else ""
            self._write_state(self._end_state(code), detail)
            return
        self._attempt += 1
        self._record_failure(code, why)
        self._write(
            f"{self.job.title}: {why}; starting again from its newest checkpoint, attempt"
            f" {self._attempt + 1} of {self._retries + 1}\n".encode()
        )
        self._start()

    def _record_failure(self, code: int, why: str) -> None:
        """Names this machine if it has failed again; records a process that a signal ended."""
        try:
            workdir = as_path("--workdir", self.job.workdir)
            if code < 0 and self._options.processes == 1:  # of several, the others record it
                attempt = f"{int(time.time())}-{os.urandom(2).hex()}"
                HostFailures(workdir, attempt).record(0, socket.gethostname(), code, why)
            lines = advice(read(workdir))
        except (OSError, ValueError) as error:  # the job starts again all the same
            lines = [f"the failures of its hosts cannot be read: {error}"]
        for line in lines:
            self._write(f"{self.job.title}: {line}\n".encode())

    def _end_state(self, code: int) -> str:
        """finished, stopped or failed. A training that saved and stopped also exits with 0."""
        if code:
            return "stopped" if self._stopped and (code < 0 or code == INTERRUPTED) else "failed"
        ended = status.read(self.job).ended if self.job.steps else not self._stopped
        return "finished" if ended else "stopped"

    def _write_state(self, state: str, detail: str) -> None:
        status.write_state(self.job, "local", state, detail, self._attempt)

    def stop(self, number: int) -> None:
        """Forwards a signal to the job, which is then not restarted."""
        self._retries, self._stopped = 0, True
        if self.code is None:
            notice = (
                "killing its processes"
                if number == signal.SIGKILL
                else "its processes save after their current step and end; a second signal kills"
                " them"
            )
            self._write(f"{self.job.title}: {notice}\n".encode())
            self._group.send(number)

    def close(self) -> None:
        """Kills the processes if they run, and closes the log."""
        if self.code is None:
            self._group.close()
            self._write_state("stopped", "the launcher ended")
        self._log.close()

    def _write(self, line: bytes) -> None:
        if re.search(rb"[Ee]rror: ", line):
            self._last_error = line.strip()
        for sink in self._sinks:
            # The job goes on if the reader of a pipe is gone or the disk is full.
            with contextlib.suppress(OSError):
                sink.write(line)
                sink.flush()


def run(jobs: Sequence[Job], options: flags.FlagValues) -> int:
    """Runs all jobs in parallel until they end; shows several jobs in a table.

    Returns 0, or the first exit code that is not 0. SIGINT and SIGTERM are passed on to all
    processes, which save and end; the exit code is then 130. A second signal kills them.
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
    """Runs --setup. Raises ValueError if it fails."""
    if not job.setup:
        return
    environment = os.environ | dict(job.environment)
    done = subprocess.run(job.setup, shell=True, executable="/bin/bash", env=environment)
    if done.returncode:
        raise ValueError(
            f"--setup of {job.title} failed with exit code {done.returncode}: {job.setup}"
        )


def _watch(attempts: Sequence[Attempts], received: Sequence[int], board: "Board | None") -> None:
    """Polls until all jobs have ended; forwards the first two signals in `received`."""
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
    """The table of several jobs: redrawn in place on a terminal, else printed at intervals."""

    def __init__(self, jobs: Sequence[Job], interval_s: float = TABLE_S):
        self._jobs, self._live = jobs, sys.stdout.isatty()
        live_s = LIVE_BUCKET_S if any(is_bucket_url(job.workdir) for job in jobs) else LIVE_S
        self._interval, self._next, self._lines = live_s if self._live else interval_s, 0.0, 0

    def show(self, at_once: bool = False) -> None:
        """Prints the table if the interval has passed, or `at_once`."""
        if not at_once and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._interval
        text = status.table(status.read(job) for job in self._jobs)
        if self._live and self._lines:
            print(f"\x1b[{self._lines}A\x1b[J", end="")
        print(text, flush=True)
        self._lines = text.count("\n") + 1


def find(job: Job, options: flags.FlagValues) -> str:
    """Always "": the locks in the workdir show local jobs."""
    return ""
