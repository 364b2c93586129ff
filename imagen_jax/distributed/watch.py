"""Who holds the others up: processes of a run tell each other where they are, and each says in its
log whom it is waiting for.

A process that is stopped, cut off or slow makes all others wait inside a collective operation,
where nothing can be said. So a thread publishes what its process is doing, through the key-value
store of jax's coordination service, and looks at the others when its own process gets no further. A
process that ends with an error publishes the error, and the others end with it instead of waiting;
one that just disappears is given up by jax after `lost_s`, and named here in one last line.
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

from imagen_jax.distributed import startup
from imagen_jax.storage import is_away

# exit code (EX_TEMPFAIL) of a process that ends because another one did: nothing is wrong with it,
# start all again
LOST = 75
FORESEEN = (
    ValueError,
    OSError,
    FloatingPointError,
)  # errors that are one line; others come with a traceback
FINISHED = "finished"
AGAIN = "start all processes again, the run goes on from its last checkpoint"
BEATS = 20  # in `lost_s`: how often a process tells where it is
SIGNS, FAILURES = "imagen_jax/sign/", "imagen_jax/failure/"
log = logging.getLogger(__name__)


@dataclasses.dataclass
class Sign:
    """What was last heard of a process: its step, what it was doing, its how manieth doing that
    was, how often it has told, and when that last changed here.
    """

    step: int
    doing: str
    turn: int
    beat: int
    heard: float


def verdict(
    signs: Mapping[int, Sign], hosts: Sequence[str], now: float, silent_s: float
) -> tuple[list[int], str]:
    """(processes that hold the others up, in words): the silent ones, else those that have done
    least, of what all do in the same order.

    A process from which nothing came for `silent_s` is silent, unless it had finished.
    """
    words = lambda i: (
        f"process {i} ({hosts[i]}), "
        + (f"silent for {now - signs[i].heard:.0f} s, last " if i in silent else "")
        + place(signs[i])
    )
    place = lambda sign: f"at step {sign.step}, {sign.doing}"
    silent = [
        i for i, sign in signs.items() if now - sign.heard >= silent_s and sign.doing != FINISHED
    ]
    least = min(sign.turn for sign in signs.values())
    behind = silent or [i for i, sign in signs.items() if sign.turn == least]
    if len(behind) == len(signs) and not silent:
        return (
            [],
            f"nobody: all {len(hosts)} processes are alive and {place(next(iter(signs.values())))}",
        )
    return behind, "; ".join(words(i) for i in behind)


class Watch:
    """Around everything that processes do together. Of a process that is alone it wants nothing and
    does nothing.

    An exception that leaves it is published and ends the process at once, with exit code 2 (1 if it
    has a traceback, or is of a file system that did not answer; LOST if the cause is another
    process): an orderly end would wait for the others, who wait for this one.
    """

    def __init__(self, lost_s: float, store: Any = None, end: Callable[[int], None] = os._exit):
        """lost_s: as in `startup.start`; who is waited for is logged after half of it. store, end:
        others are given by tests only.
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
        """This process has done `step` steps and now begins `doing`. Cheap. All processes have to
        call it in the same order.
        """
        self._now, self._since, self._patience = (
            (self._now[0] + 1, step, doing),
            time.monotonic(),
            self._lost_s / 2,
        )

    def __enter__(self) -> "Watch":
        if self._several:
            self._store = startup.store() if self._store is None else self._store
            _on_abort(self._last_words)
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._several:
            return
        if error is not None:
            self._leave(error)
        self.at(self._now[1], FINISHED)
        self._ended.set()
        self._thread.join(self._interval)

    def _run(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(
                RuntimeError
            ):  # the store is gone: jax is about to end this process
                self._tell()
                self._look()
            self._ended.wait(self._interval)
        with contextlib.suppress(RuntimeError):
            self._tell()

    def _tell(self) -> None:
        self._beat += 1
        turn, step, doing = self._now
        sign = {"step": step, "doing": doing, "turn": turn, "beat": self._beat}
        self._store.key_value_set(f"{SIGNS}{self._index}", json.dumps(sign), allow_overwrite=True)

    def _look(self) -> None:
        """Whether another process has failed, and, if this one has been getting no further for a
        while, who is behind.
        """
        self._failures = {
            int(key.rpartition("/")[2]): text
            for key, text in self._store.key_value_dir_get(FAILURES)
        }
        others = {i: text for i, text in self._failures.items() if i != self._index}
        if others and not self._leaving.is_set():
            # It may have the same reason to fail, and be about to say so itself.
            self._leaving.wait(3 * self._interval)
        if others and not self._leaving.is_set() and not self._ended.is_set():
            self._finish(LOST, others[min(others)], others[min(others)])
        waiting = time.monotonic() - self._since
        if waiting < self._lost_s / 6 and not self._leaving.is_set():
            self._signs = {}
            return
        self._listen()
        if waiting >= self._patience:
            self._patience *= 2
            _, step, doing = self._now
            behind, words = verdict(self._signs, self._hosts, time.monotonic(), self._lost_s / 4)
            words = (
                "the others wait for this process"
                if self._index in behind
                else f"waiting for {words}"
            )
            log.warning("step %d, %s for %.0f s, %s", step, doing, waiting, words)

    def _listen(self) -> None:
        now, before, signs = time.monotonic(), self._signs, {}
        told = {
            int(key.rpartition("/")[2]): json.loads(text)
            for key, text in self._store.key_value_dir_get(SIGNS)
        }
        for i in range(len(self._hosts)):
            sign = told.get(i, {"step": 0, "doing": "starting", "turn": 0, "beat": 0})
            signs[i] = Sign(
                **sign,
                heard=before[i].heard if i in before and before[i].beat == sign["beat"] else now,
            )
        self._signs = signs

    def _leave(self, error: BaseException) -> None:
        """Says why this process ends, here and to the others, and ends it."""
        import jax

        self._leaving.set()
        line = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason = (
                self._fault_of_another()
            )  # a collective operation fails when another process goes away
            if reason:
                log.warning("%s", line)
                return self._finish(LOST, reason, reason)
        foreseen = isinstance(error, FORESEEN)
        if not foreseen or os.environ.get("IMAGEN_JAX_TRACEBACK"):
            traceback.print_exception(error)
        self._finish(
            2 if foreseen and not is_away(error) else 1,
            line,
            f"process {self._index} ({self._hosts[self._index]}) failed: {line}",
        )

    def _fault_of_another(self) -> str:
        """What another process did that makes an operation fail here, "" if there is no such thing;
        takes up to a third of `lost_s`.
        """
        until = time.monotonic() + self._lost_s / 3
        while time.monotonic() < until:
            others = [text for i, text in self._failures.items() if i != self._index]
            reason = others[0] if others else self._lost(self._lost_s / 6)
            if reason:
                return reason
            time.sleep(self._interval / 2)
        return ""

    def _finish(self, code: int, line: str, told: str) -> None:
        """Tells the other processes why this one ends and waits, if it is the one that keeps the
        store, until they know; then ends it.
        """
        end = time.monotonic() + 6 * self._interval
        with contextlib.suppress(RuntimeError):
            self._store.key_value_set(f"{FAILURES}{self._index}", told, allow_overwrite=True)
            while (
                self._index == 0
                and len(self._store.key_value_dir_get(FAILURES)) < len(self._hosts)
                and time.monotonic() < end
            ):
                time.sleep(self._interval / 4)
        self._die(code, line)

    def _lost(self, silent_s: float) -> str:
        """Names the processes that are silent, or process 0 if it cannot be reached; "" if all are
        there.
        """
        now = time.monotonic()
        signs = {i: sign for i, sign in self._signs.items() if i != self._index}
        if any(now - sign.heard >= silent_s and sign.doing != FINISHED for sign in signs.values()):
            return f"lost {verdict(signs, self._hosts, now, silent_s)[1]}; {AGAIN}"
        if self._index and not _reachable(self._place.host, self._place.port):
            return f"lost process 0 ({self._hosts[0]}), to which all others are connected; {AGAIN}"
        return ""

    def _last_words(self) -> None:
        """Called when jax ends this process, which it does from C++ when it has given up another
        one or process 0 is gone.
        """
        failures = [text for i, text in self._failures.items() if i != self._index]
        reason = failures[0] if failures else self._lost(self._lost_s / 4)
        if reason and not self._ended.is_set():
            self._die(LOST, reason)

    def _die(self, code: int, line: str) -> None:
        os.write(2, f"error: {line}\n".encode())
        self._end(code)


def _reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


_handlers: list[Any] = []  # kept: C has only their address


def _on_abort(say: Callable[[], None]) -> None:
    """Calls `say` when this process is aborted. Python's own handlers run between two bytecodes,
    too late for abort(); libc's run at once.
    """
    libc = ctypes.CDLL(None)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, kind], ctypes.c_void_p
    _handlers.append(kind(lambda number: say()))
    libc.signal(signal.SIGABRT, _handlers[-1])
