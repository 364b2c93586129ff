"""Names the process that the others wait for, and ends all processes when one is lost.

A process that is stopped, cut off or slow makes all others wait inside a collective operation,
where no code of ours runs. A thread of each process therefore publishes its step and activity in
the key-value store of jax's coordination service, and reads those of the others while its own
process makes no progress. A process that fails publishes its error, and the others end with that
error instead of waiting. A process that disappears is given up after `lost_s` and named.
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
from imagen_jax.distributed import startup
from imagen_jax.exit_codes import LOST

FINISHED = "finished"
AGAIN = "restart all processes, the run resumes from its last checkpoint"
BEATS = 20  # publications of a process within `lost_s`
REQUEST_MS = 3000  # well under the 6 s by which `_delay_abort` delays an abort
SIGNS, FAILURES, ENDED = "imagen_jax/sign/", "imagen_jax/failure/", "imagen_jax/ended/"
log = logging.getLogger(__name__)


@dataclasses.dataclass
class Sign:
    """The last publication of a process.

    step: steps it has done. doing: its current activity. turn: the number of activities so far.
    beat: the number of publications so far. heard: local time when `beat` last changed.
    """

    step: int
    doing: str
    turn: int
    beat: int
    heard: float


def verdict(
    signs: Mapping[int, Sign], hosts: Sequence[str], now: float, silent_s: float
) -> tuple[list[int], str]:
    """(processes that the others wait for, the same in words).

    These are the silent processes; if none is silent, those with the fewest activities, since all
    processes do the same ones in the same order. A process is silent if it has not finished and
    nothing came from it for `silent_s`.
    """
    silent = [
        i for i, sign in signs.items() if now - sign.heard >= silent_s and sign.doing != FINISHED
    ]
    where = lambda sign: f"at step {sign.step}, {sign.doing}"
    words = lambda i: (
        f"process {i} ({hosts[i]}), "
        + (f"silent for {now - signs[i].heard:.0f} s, last " if i in silent else "")
        + where(signs[i])
    )
    fewest = min(sign.turn for sign in signs.values())
    behind = silent or [i for i, sign in signs.items() if sign.turn == fewest]
    if len(behind) == len(signs) and not silent:
        alive = f"all {len(hosts)} processes are alive and {where(next(iter(signs.values())))}"
        return [], f"nobody: {alive}"
    return behind, "; ".join(words(i) for i in behind)


class Watch:
    """A context manager around all work that processes do together. Does nothing in a
    single-process run.

    An exception that leaves it is published and ends the process at once with the exit code of
    imagen_jax/exit_codes.py, or with LOST if another process is the cause. An orderly exit would
    wait for the other processes, and they wait for this one.
    """

    def __init__(self, lost_s: float, store: Any = None, end: Callable[[int], None] = os._exit):
        """lost_s: as in `startup.start`; waiting is logged after half of it. store, end: replaced
        in tests only.
        """
        self._hosts, self._place = startup.hosts(), startup.place()
        self._several = self._place is not None
        self._index = self._place.index if self._place else 0
        self._store, self._end, self._interval, self._lost_s = store, end, lost_s / BEATS, lost_s
        self._now, self._since, self._patience = (0, 0, "starting"), time.monotonic(), lost_s / 2
        self._beat = 0
        self._signs: dict[int, Sign] = {}
        self._failures: dict[int, str] = {}
        self._ended, self._leaving = threading.Event(), threading.Event()

    def at(self, step: int, doing: str) -> None:
        """Notes that this process has done `step` steps and begins the activity `doing`.

        It only assigns to attributes. All processes call it in the same order.
        """
        turn = self._now[0] + 1
        self._now, self._since = (turn, step, doing), time.monotonic()
        self._patience = self._lost_s / 2

    def __enter__(self) -> "Watch":
        if self._several:
            self._store = startup.store() if self._store is None else self._store
            _delay_abort()
            targets = (self._run, self._attend) if self._index else (self._run,)
            self._threads = [
                threading.Thread(target=target, name="watch", daemon=True) for target in targets
            ]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._several:
            return
        if error is not None:
            self._leave(error)
        self.at(self._now[1], FINISHED)
        self._ended.set()
        with contextlib.suppress(RuntimeError):
            self._store.key_value_set(f"{ENDED}{self._index}", "", allow_overwrite=True)
        for thread in self._threads:
            thread.join(self._interval)

    def _run(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(RuntimeError):  # the store is gone, see `_attend`
                self._tell()
                self._look()
            self._ended.wait(self._interval)
        with contextlib.suppress(RuntimeError):
            self._tell()

    def _attend(self) -> None:
        """Ends this process when process 0 disappears.

        jax then aborts every other process within milliseconds. A request that waits at process 0
        fails at that moment, and `_delay_abort` leaves time to say why. If process 0's host does
        not even refuse connections, it is given up after `lost_s`.
        """
        reached = time.monotonic()
        while not self._ended.is_set():
            try:
                self._store.blocking_key_value_get(f"{ENDED}{self._index}", REQUEST_MS)
                return
            except RuntimeError:  # process 0 is gone, or REQUEST_MS are over
                error = _connection_error(self._place.host, self._place.port)
            if error is None:
                reached = time.monotonic()
            gone = isinstance(error, ConnectionRefusedError)
            gone |= time.monotonic() - reached > self._lost_s
            if gone and self._leaving.is_set():
                time.sleep(1.0)  # `_leave` ends this process, unless its request to process 0 hangs
            if gone and not self._ended.is_set():
                others = [text for i, text in self._failures.items() if i != self._index]
                self._die(LOST, others[0] if others else self._lost_leader())

    def _tell(self) -> None:
        self._beat += 1
        turn, step, doing = self._now
        sign = {"step": step, "doing": doing, "turn": turn, "beat": self._beat}
        self._store.key_value_set(f"{SIGNS}{self._index}", json.dumps(sign), allow_overwrite=True)

    def _look(self) -> None:
        """Ends this process if another one failed or is lost; logs who is behind if this process
        has made no progress for a while.
        """
        self._failures = {
            int(key.rpartition("/")[2]): text
            for key, text in self._store.key_value_dir_get(FAILURES)
        }
        others = {i: text for i, text in self._failures.items() if i != self._index}
        if others and not self._leaving.is_set():
            # This process may be about to fail for the same reason, and to say so itself.
            self._leaving.wait(3 * self._interval)
        if others and not self._leaving.is_set() and not self._ended.is_set():
            self._finish(LOST, others[min(others)], others[min(others)])
        waiting = time.monotonic() - self._since
        if waiting < self._lost_s / 6 and not self._leaving.is_set():
            self._signs = {}
            return
        self._listen()
        # Signs are read from `lost_s / 6` on, so a process is given up after about `lost_s`.
        reason = self._lost(self._lost_s * 5 / 6)
        if reason and not self._leaving.is_set() and not self._ended.is_set():
            self._finish(LOST, reason, reason)
        if waiting >= self._patience:
            self._patience *= 2
            _, step, doing = self._now
            behind, words = verdict(self._signs, self._hosts, time.monotonic(), self._lost_s / 4)
            mine = self._index in behind
            words = "the others wait for this process" if mine else f"waiting for {words}"
            log.warning("step %d, %s for %.0f s, %s", step, doing, waiting, words)

    def _listen(self) -> None:
        """Reads the signs of all processes."""
        now, before, signs = time.monotonic(), self._signs, {}
        published = {
            int(key.rpartition("/")[2]): json.loads(text)
            for key, text in self._store.key_value_dir_get(SIGNS)
        }
        for i in range(len(self._hosts)):
            sign = published.get(i, {"step": 0, "doing": "starting", "turn": 0, "beat": 0})
            unchanged = i in before and before[i].beat == sign["beat"]
            signs[i] = Sign(**sign, heard=before[i].heard if unchanged else now)
        self._signs = signs

    def _leave(self, error: BaseException) -> None:
        """Publishes why this process fails, and ends it."""
        import jax

        self._leaving.set()
        line = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, jax.errors.JaxRuntimeError):
            # A collective operation fails when another process disappears.
            reason = self._fault_of_another()
            if reason:
                log.warning("%s", line)
                return self._finish(LOST, reason, reason)
        expected = isinstance(error, exit_codes.EXPECTED)
        if not expected or os.environ.get("IMAGEN_JAX_TRACEBACK"):
            traceback.print_exception(error)
        host = self._hosts[self._index]
        self._finish(exit_codes.of(error), line, f"process {self._index} ({host}) failed: {line}")

    def _fault_of_another(self) -> str:
        """The failure or loss of another process that makes an operation fail here; "" if there is
        none. Waits for up to a third of `lost_s`.
        """
        until = time.monotonic() + self._lost_s / 3
        while time.monotonic() < until:
            others = [text for i, text in self._failures.items() if i != self._index]
            reason = others[0] if others else self._lost(self._lost_s / 6)
            if not reason and self._index:
                error = _connection_error(self._place.host, self._place.port)
                reason = self._lost_leader() if error else ""
            if reason:
                return reason
            time.sleep(self._interval / 2)
        return ""

    def _finish(self, code: int, line: str, published: str) -> None:
        """Publishes why this process ends, and ends it. Process 0, which keeps the store, first
        waits until the others have read it.
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

    def _lost(self, silent_s: float) -> str:
        """Names the processes that are silent; "" if none is."""
        now = time.monotonic()
        signs = {i: sign for i, sign in self._signs.items() if i != self._index}
        if any(now - sign.heard >= silent_s and sign.doing != FINISHED for sign in signs.values()):
            return f"lost {verdict(signs, self._hosts, now, silent_s)[1]}; {AGAIN}"
        return ""

    def _lost_leader(self) -> str:
        return f"lost process 0 ({self._hosts[0]}), which all others are connected to; {AGAIN}"

    def _die(self, code: int, line: str) -> None:
        os.write(2, f"error: {line}\n".encode())
        self._end(code)


def _connection_error(host: str, port: int) -> OSError | None:
    """Why no connection can be made; None if one can."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError as error:
        return error
    return None


def _delay_abort() -> None:
    """Makes abort() wait for six seconds, in which `_attend` can name the process that is lost.

    No Python may run in a handler of SIGABRT. The handler is libc's sleep itself, which POSIX
    allows in a handler; its argument is the number of the signal, 6. Then the abort goes on.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
