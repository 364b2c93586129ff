"""Runs measurements in turn, each in a process of its own with a time limit.

A process that raises, hangs or runs out of memory costs only its own measurement. A measurement
appends JSON lines to a file while it runs, so its records survive if it is killed.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.accelerator.results import Results
from tools.accelerator.task import OUT_OF_MEMORY

ROOT = Path(__file__).resolve().parents[2]
GRACE = 4.0  # seconds between SIGTERM and SIGKILL
POLL = 0.1
LOG_TAIL = 60_000  # bytes of each process's output in the log


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a process: its status ("done" or the reason) and its records."""

    status: str
    records: list[dict[str, Any]]

    @property
    def done(self) -> bool:
        return self.status == "done"

    def last(self, what: str) -> dict[str, Any]:
        """The newest record of a kind; empty if there is none."""
        return next((r for r in reversed(self.records) if r["what"] == what), {})


@dataclasses.dataclass
class Process:
    """A running process with its log and records; `ended` is set when it ends."""

    popen: subprocess.Popen
    started: float
    log: Path
    records: Path
    ended: float = 0.0

    def watch(self) -> None:
        """Records the time at which the process ends, even if nothing waits for it."""

        def wait():
            self.popen.wait()
            self.ended = time.monotonic()

        threading.Thread(target=wait, daemon=True).start()

    @property
    def seconds(self) -> float:
        """Seconds that the process has run."""
        return (self.ended or time.monotonic()) - self.started


class Session:
    """One call of the tool: its deadlines, its work directory and its results."""

    def __init__(
        self, results: Results, work: Path, end: float, environment: Mapping[str, str], tiny: bool
    ):
        """end: the time.monotonic() at which the call ends."""
        self.results, self.work, self.end, self.tiny = results, work, end, tiny
        self._environment, self._part_end = dict(environment), end
        self._running: list[Process] = []

    def more_flags(self, flags: str) -> dict[str, str]:
        """The environment of a process with more XLA_FLAGS."""
        return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}

    def begin(self, seconds: float) -> None:
        """Starts a part with this time limit in seconds."""
        self._part_end = min(self.end, time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds until the part's end."""
        return max(0.0, self._part_end - time.monotonic())

    def task(
        self,
        part: str,
        name: str,
        module: str,
        arguments: Mapping[str, Any],
        limit: float,
        environment: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Runs `run` of tools.accelerator.MODULE in a process of its own."""
        given = json.dumps({**arguments, "tiny": self.tiny})
        command = [sys.executable, "-m", "tools.accelerator.task", module, given]
        return self.command(part, name, command, limit, environment)

    def command(
        self,
        part: str,
        name: str,
        command: Sequence[object],
        limit: float,
        environment: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Runs a command to its end or its limit; its outcome is in the results at once."""
        limit = min(limit, self.left())
        if limit < 1.0:
            outcome = Outcome("not started: no time left", [])
            self.results.add(part, name, outcome.status, 0.0, [])
            return outcome
        process = self.start(name, command, environment)
        return self.finish(part, name, process, limit)

    def start(
        self, name: str, command: Sequence[object], environment: Mapping[str, str] | None = None
    ) -> Process:
        """Starts a command in the background; `finish` waits for it."""
        stem = self.work / "".join(c if c.isalnum() else "_" for c in name)
        log, records = stem.with_suffix(".log"), stem.with_suffix(".jsonl")
        records.unlink(missing_ok=True)
        variables = os.environ | self._environment | dict(environment or {})
        with open(log, "wb") as file:
            popen = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=variables | {"ACCELERATOR_RECORDS": str(records)},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        print(f"== {name}: {shlex.join(map(str, command))[:300]}", flush=True)
        self._running.append(process := Process(popen, time.monotonic(), log, records))
        process.watch()
        return process

    def finish(self, part: str, name: str, process: Process, limit: float) -> Outcome:
        """Waits for a started command, `limit` seconds from now, and records its outcome."""
        end, seen = time.monotonic() + limit, -1
        while (code := process.popen.poll()) is None and time.monotonic() < end:
            size = process.records.stat().st_size if process.records.exists() else 0
            if size != seen:
                seen = size
                complete = read_records(process.records)
                self.results.add(part, name, "running", process.seconds, complete)
            time.sleep(POLL)
        if code is None:
            stop(process.popen)
        took = process.seconds
        self._running.remove(process)
        records = read_records(process.records)
        status = f"ended: over its limit of {limit:.0f} s" if code is None else said(code, records)
        output = process.log.read_bytes()
        if code and not any(r["what"] == "error" for r in records):
            status += last_line(output)
        self.results.add(part, name, status, took, records)
        self.results.log(name, status, took, output[-LOG_TAIL:].decode(errors="replace"))
        print(f"   {name}: {status}, {took:.1f} s", flush=True)
        return Outcome(status, records)

    def stop(self, process: Process) -> None:
        """Ends a started command without a result."""
        stop(process.popen)
        self._running.remove(process)

    def stop_all(self) -> None:
        """Ends all running processes."""
        for process in self._running:
            stop(process.popen)
        self._running.clear()


def stop(popen: subprocess.Popen) -> None:
    """Ends a process and its children: SIGTERM, then SIGKILL."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, number)
        try:
            popen.wait(patience)
            if number == signal.SIGKILL:
                return
        except subprocess.TimeoutExpired:
            continue


def said(code: int, records: Sequence[Mapping[str, Any]]) -> str:
    """The status of a process that ended by itself."""
    if code == 0:
        return "done"
    message = next((r["message"] for r in reversed(records) if r["what"] == "error"), "")
    if code == OUT_OF_MEMORY:
        return f"out of memory: {message}"
    if code < 0:
        return f"failed: killed by {signal.Signals(-code).name}"
    return f"failed: {message}" if message else f"failed with exit code {code}"


def last_line(output: bytes) -> str:
    """The last line of a failed command's output, as the reason in its status."""
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1].strip()[:200]}" if lines else ""


def read_records(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a records file."""
    complete = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            complete.append(json.loads(line))
        except ValueError:
            continue
    return complete
