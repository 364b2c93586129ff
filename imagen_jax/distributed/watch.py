"""Detects stalled processes, logs which ones, and ends all processes when one is lost.

A process that is stopped, disconnected or slow makes all others wait inside a collective operation,
where no Python code runs. Each process therefore runs a heartbeat thread. It publishes the
process's step and activity in the key-value store of JAX's coordination service. While the process
makes no progress, the thread also reads the heartbeats of the others. A process that fails
publishes its error, and the others end with that error instead of waiting. After the timeout
`lost_s` without a heartbeat, the others report the process as lost and end.
"""

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imagen_jax import exit_codes
from imagen_jax.distributed import device_faults, startup
from imagen_jax.distributed.host_failures import HostFailures
from imagen_jax.exit_codes import LOST

FINISHED = "finished"
RESTART = "restart all processes; the run then resumes from its last checkpoint"
HEARTBEATS_PER_TIMEOUT = 20  # heartbeats of a process within `lost_s`
# Why a process counts as lost long before `lost_s`: its connections have closed.
EARLY = " (noticed when an operation with other processes failed here)"
REQUEST_MS = 3000  # well under the 6 s by which `_delay_abort` delays an abort
# Key prefixes in the store.
HEARTBEATS, FAILURES, ENDED = "imagen_jax/heartbeat/", "imagen_jax/failure/", "imagen_jax/ended/"
log = logging.getLogger(__name__)


@dataclasses.dataclass
class Heartbeat:
    """The last heartbeat of a process.

    step: number of completed steps.
    activity: the current activity.
    activity_index: number of activities so far.
    index: number of heartbeats so far.
    received_at: local time in seconds when `index` last changed.
    """

    step: int
    activity: str
    activity_index: int
    index: int
    received_at: float

    def is_silent(self, now: float, silent_s: float) -> bool:
        """Whether the process has not finished and sent no heartbeat for `silent_s` seconds."""
        return now - self.received_at >= silent_s and self.activity != FINISHED


def stalled_processes(
    heartbeats: Mapping[int, Heartbeat], hosts: Sequence[str], now: float, silent_s: float
) -> tuple[list[int], str]:
    """Returns (indices of the processes that the others wait for, a description of them).

    These are the silent processes (see `Heartbeat.is_silent`). If none is silent, they are those
    with the fewest activities: all processes do the same activities in the same order, so the
    fewest means the furthest behind.
    """
    silent = [i for i, heartbeat in heartbeats.items() if heartbeat.is_silent(now, silent_s)]
    position = lambda heartbeat: f"at step {heartbeat.step}, {heartbeat.activity}"
    silence = lambda i: f"no heartbeat for {now - heartbeats[i].received_at:.0f} s, last "
    description = lambda i: (
        f"process {i} ({hosts[i]}), "
        + (silence(i) if i in silent else "")
        + position(heartbeats[i])
    )
    fewest = min(heartbeat.activity_index for heartbeat in heartbeats.values())
    behind = silent or [
        i for i, heartbeat in heartbeats.items() if heartbeat.activity_index == fewest
    ]
    if len(behind) == len(heartbeats) and not silent:
        first = next(iter(heartbeats.values()))
        return [], f"no single process: all {len(hosts)} are alive and {position(first)}"
    return behind, "; ".join(description(i) for i in behind)


class Watch:
    """A context manager for the part of the program that all processes run together.

    It does nothing in a single-process run.

    If an exception leaves the context, the watch publishes it and ends the process at once with the
    exit code of imagen_jax/exit_codes.py, or with LOST if another process is the cause. A normal
    exit would wait for the other processes, which wait for this one.
    """

    def __init__(
        self,
        lost_s: float,
        store: Any = None,
        end: Callable[[int], None] = os._exit,
        restart: str = RESTART,
    ):
        """lost_s: as in `startup.start`; the watch logs a wait after lost_s / 2.

        store, end: tests replace them. restart: what to do after a loss, for the message.

        The attribute `failures`, None at first, records the failing host if it is set.
        """
        self.failures: HostFailures | None = None
        self._restart = restart
        self._hosts, self._member = startup.hosts(), startup.member()
        self._multi_process = self._member is not None
        self._index = self._member.index if self._member else 0
        self._store, self._end, self._lost_s = store, end, lost_s
        self._interval = lost_s / HEARTBEATS_PER_TIMEOUT
        self._activity = (0, 0, "starting")  # (index, step, name)
        self._activity_start, self._next_log_s = time.monotonic(), lost_s / 2
        self._heartbeat_index = 0
        self._heartbeats: dict[int, Heartbeat] = {}
        self._failures: dict[int, str] = {}
        self._ended, self._leaving = threading.Event(), threading.Event()

    def at(self, step: int, activity: str) -> None:
        """Records that this process has completed `step` steps and begins `activity`.

        It only assigns to attributes. All processes call it in the same order.
        """
        index = self._activity[0] + 1
        self._activity, self._activity_start = (index, step, activity), time.monotonic()
        self._next_log_s = self._lost_s / 2

    def __enter__(self) -> "Watch":
        if self._multi_process:
            self._store = startup.store() if self._store is None else self._store
            _delay_abort()
            targets = (self._run, self._watch_coordinator) if self._index else (self._run,)
            self._threads = [
                threading.Thread(target=target, name="watch", daemon=True) for target in targets
            ]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._multi_process:
            return
        if error is not None:
            self._leave(error)
        self.at(self._activity[1], FINISHED)
        self._ended.set()
        with contextlib.suppress(RuntimeError):
            self._store.key_value_set(f"{ENDED}{self._index}", "", allow_overwrite=True)
        for thread in self._threads:
            thread.join(self._interval)

    def _run(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(RuntimeError):  # store unreachable: see `_watch_coordinator`
                self._publish_heartbeat()
                self._check_others()
            self._ended.wait(self._interval)
        with contextlib.suppress(RuntimeError):
            self._publish_heartbeat()

    def _watch_coordinator(self) -> None:
        """Ends this process when process 0 disappears.

        JAX then aborts every other process within milliseconds. A pending request to process 0 then
        fails, and `_delay_abort` leaves time to log the cause. If the host of process 0 does not
        answer at all, this process gives up after `lost_s`.
        """
        last_answer = time.monotonic()
        while not self._ended.is_set():
            try:
                self._store.blocking_key_value_get(f"{ENDED}{self._index}", REQUEST_MS)
                return
            except RuntimeError:  # process 0 is gone, or the request timed out
                error = _connection_error(self._member.host, self._member.port)
            if error is None:
                last_answer = time.monotonic()
            gone = isinstance(error, ConnectionRefusedError)
            gone |= time.monotonic() - last_answer > self._lost_s
            if gone and self._leaving.is_set():
                # `_leave` is ending this process already; continue here only if its request to
                # process 0 hangs.
                time.sleep(1.0)
            if gone and not self._ended.is_set():
                others = [text for i, text in self._failures.items() if i != self._index]
                if not others:
                    self._record([0], LOST, self._lost_coordinator())
                self._die(LOST, others[0] if others else self._lost_coordinator())

    def _publish_heartbeat(self) -> None:
        self._heartbeat_index += 1
        text = json.dumps(_message(*self._activity, self._heartbeat_index))
        self._store.key_value_set(f"{HEARTBEATS}{self._index}", text, allow_overwrite=True)

    def _check_others(self) -> None:
        """Ends this process if another one failed or is lost.

        Logs the stalled processes if this process has made no progress for `_next_log_s` seconds.
        """
        self._failures = {
            int(key.rpartition("/")[2]): text
            for key, text in self._store.key_value_dir_get(FAILURES)
        }
        others = {i: text for i, text in self._failures.items() if i != self._index}
        if others and not self._leaving.is_set():
            # This process may be failing for the same reason: leave it time to publish its error.
            self._leaving.wait(3 * self._interval)
        if others and not self._leaving.is_set() and not self._ended.is_set():
            self._finish(LOST, others[min(others)], others[min(others)])
        waiting = time.monotonic() - self._activity_start
        if waiting < self._lost_s / 6 and not self._leaving.is_set():
            self._heartbeats = {}
            return
        self._read_heartbeats()
        # Reading starts after lost_s / 6; with the 5/6 below, a process counts as lost after about
        # lost_s.
        lost, reason = self._lost(self._lost_s * 5 / 6)
        if reason and not self._leaving.is_set() and not self._ended.is_set():
            self._record(lost, LOST, reason)
            self._finish(LOST, reason, reason)
        if waiting >= self._next_log_s:
            self._next_log_s *= 2
            self._log_wait(waiting)

    def _log_wait(self, waiting: float) -> None:
        _, step, activity = self._activity
        behind, description = stalled_processes(
            self._heartbeats, self._hosts, time.monotonic(), self._lost_s / 4
        )
        is_behind = self._index in behind
        cause = "the others wait for this process" if is_behind else f"waiting for {description}"
        log.warning("step %d, %s for %.0f s, %s", step, activity, waiting, cause)

    def _read_heartbeats(self) -> None:
        """Reads the heartbeats of all processes."""
        now, previous, heartbeats = time.monotonic(), self._heartbeats, {}
        published = {
            int(key.rpartition("/")[2]): json.loads(text)
            for key, text in self._store.key_value_dir_get(HEARTBEATS)
        }
        for i in range(len(self._hosts)):
            message = published.get(i, _message(0, 0, "starting", 0))
            unchanged = i in previous and previous[i].index == message["index"]
            received_at = previous[i].received_at if unchanged else now
            heartbeats[i] = Heartbeat(**message, received_at=received_at)
        self._heartbeats = heartbeats

    def _leave(self, error: BaseException) -> None:
        """Publishes the error of this process, and ends the process."""
        import jax

        self._leaving.set()
        line = " ".join(str(error).split()) or type(error).__name__
        runtime = jax.errors.JaxRuntimeError
        from_runtime = isinstance(error, runtime) or isinstance(error.__cause__, runtime)
        if from_runtime and not device_faults.is_certain(error):
            # A collective operation fails when another process disappears.
            reason = self._failure_elsewhere()
            if reason:
                log.warning("%s", line)
                return self._finish(LOST, reason, reason)
        expected = exit_codes.is_expected(error)
        if not expected or os.environ.get("IMAGEN_JAX_TRACEBACK"):
            traceback.print_exception(error)
        code, host = exit_codes.of(error), self._hosts[self._index]
        self._record(getattr(error, "processes", [self._index]), code, line)
        self._finish(code, line, f"process {self._index} ({host}) failed: {line}")

    def _record(self, processes: Sequence[int], code: int, reason: str) -> None:
        """Records that these processes failed."""
        for i in processes if self.failures else ():
            self.failures.record(i, self._hosts[i], code, reason)

    def _failure_elsewhere(self) -> str:
        """Describes the failed or lost process that caused a collective operation to fail here.

        Returns "" if there is none. Waits up to lost_s / 3.
        """
        until = time.monotonic() + self._lost_s / 3
        while time.monotonic() < until:
            others = [text for i, text in self._failures.items() if i != self._index]
            lost, reason = ([], others[0]) if others else self._lost(self._lost_s / 6, EARLY)
            if not reason and self._index:
                error = _connection_error(self._member.host, self._member.port)
                lost, reason = ([0], self._lost_coordinator()) if error else ([], "")
            if reason:
                self._record(lost, LOST, reason)
                return reason
            time.sleep(self._interval / 2)
        return ""

    def _finish(self, code: int, line: str, published: str) -> None:
        """Publishes the reason why this process ends, and ends it.

        Process 0 hosts the store, so it first waits, for at most six intervals, until every process
        has published its own failure.
        """
        end = time.monotonic() + 6 * self._interval
        with contextlib.suppress(RuntimeError):
            self._store.key_value_set(f"{FAILURES}{self._index}", published, allow_overwrite=True)
            while (
                self._index == 0
                and len(self._store.key_value_dir_get(FAILURES)) < len(self._hosts)
                and time.monotonic() < end
            ):
                time.sleep(self._interval / 4)
        self._die(code, line)

    def _lost(self, silent_s: float, noticed: str = "") -> tuple[list[int], str]:
        """The other processes without a heartbeat for `silent_s`, and a description of them.

        ([], "") if there is none. noticed: how the loss was noticed, for the description.
        """
        now = time.monotonic()
        others = {i: heartbeat for i, heartbeat in self._heartbeats.items() if i != self._index}
        if not any(heartbeat.is_silent(now, silent_s) for heartbeat in others.values()):
            return [], ""
        lost, description = stalled_processes(others, self._hosts, now, silent_s)
        return lost, f"lost {description}{noticed}; {self._restart}"

    def _lost_coordinator(self) -> str:
        return f"lost process 0 ({self._hosts[0]}), the coordinator; {self._restart}"

    def _die(self, code: int, line: str) -> None:
        os.write(2, f"error: {line}\n".encode())
        self._end(code)


def _message(activity_index: int, step: int, activity: str, index: int) -> dict[str, Any]:
    """The published fields of a `Heartbeat`."""
    return {
        "step": step,
        "activity": activity,
        "activity_index": activity_index,
        "index": index,
    }


def _connection_error(host: str, port: int) -> OSError | None:
    """The error of an attempt to connect; None if it succeeds."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError as error:
        return error
    return None


def _delay_abort() -> None:
    """Delays abort() by six seconds, in which `_watch_coordinator` can report the lost process.

    No Python may run in a handler of SIGABRT. The handler is libc's `sleep`, which is
    async-signal-safe. It receives the signal number 6 as its argument, so it sleeps 6 seconds; then
    the abort continues.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
