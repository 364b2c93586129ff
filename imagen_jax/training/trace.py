"""Profiler traces of a few training steps, planned or asked for while the run goes on."""

import contextlib
import logging
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from imagen_jax.object_storage import AnyPath, bucket_errors, in_bucket
from imagen_jax.storage import copy_directory, remove

REQUEST = "profile_now"  # file in the workdir that asks for a trace
STEPS = 5  # of a trace that was asked for without a number
POLL_S, BUCKET_POLL_S = 1.0, 15.0  # between two looks for the file
log = logging.getLogger("imagen_jax.train")


class Trace:
    """Traces `count` steps after step `first`, or those of them that this process runs.

    A trace is in `directory`. See `Requests` for further ones. An error of the profiler is logged.
    """

    def __init__(
        self, directory: AnyPath, first: int, count: int, requests: "Requests | None" = None
    ):
        self._directory, self._first, self._last = directory, first, first + count
        self._planned, self._requests = (first, self._last), requests
        self._target = directory  # of the current trace
        self._written = None  # a local directory, if the trace goes to a bucket
        self._running = self._traced = False

    def before(self, done: int) -> None:
        """Called before each step with the number of finished steps."""
        if self._running:
            return
        if self._first <= done < self._last and not self._traced:
            self._traced = True
            self._start(self._directory)
        elif self._requests and (count := self._requests.take()):
            self._first, self._last = done, done + count
            log.info("tracing %d steps after step %d", count, done)
            self._start(self._directory / str(done))

    def after(self, done: int, settle: Callable[[], None]) -> None:
        """Called after each step; `settle` waits for the steps in flight."""
        if self._running and done >= self._last:
            settle()
            self._stop()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        first, last = self._planned
        if first < last and not self._traced:
            log.warning("no trace: none of steps %d to %d was done", first, last)

    def _start(self, target: AnyPath) -> None:
        if in_bucket(target):
            self._written = tempfile.TemporaryDirectory()
        try:
            jax.profiler.start_trace(self._written.name if self._written else str(target))
        except (OSError, RuntimeError) as error:  # such as an earlier trace that was not written
            log.error("the trace of steps from %d was not started: %s", self._first, error)
            self._reset()
        else:
            self._target, self._running = target, True

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
            if self._written:
                copy_directory(Path(self._written.name), self._target)
            log.info("trace of steps from %d in %s", self._first, self._target)
        except (OSError, RuntimeError) as error:
            log.error("the trace of steps from %d was not written: %s", self._first, error)
        self._reset()

    def _reset(self) -> None:
        """Makes ready for the next trace."""
        if self._written:
            self._written.cleanup()
            self._written = None
        self._first, self._last = self._planned


class Requests:
    """Requests for a trace: the file `profile_now` in the workdir, or SIGUSR1 to process 0.

    The file may hold a number of steps; it is removed when it has been read. A context manager, in
    the main thread. The loop only looks at an attribute; a thread looks for the file.
    """

    def __init__(self, workdir: AnyPath, enabled: bool = True, poll_s: float | None = None):
        """enabled: False ignores all requests, for all processes except the first.

        poll_s: None for POLL_S, or BUCKET_POLL_S in a bucket.
        """
        self._path, self._enabled = workdir / REQUEST, enabled
        self._poll_s = poll_s or (BUCKET_POLL_S if in_bucket(workdir) else POLL_S)
        self._count, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True, name="profile")
        self._handler: Any = None

    def take(self) -> int:
        """The number of steps to trace now; 0 without a request."""
        count, self._count = self._count, 0
        return count

    def __enter__(self) -> "Requests":
        ask = lambda *_: self._ask(STEPS)
        self._handler = signal.signal(signal.SIGUSR1, ask if self._enabled else signal.SIG_IGN)
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._ended.set()
            self._thread.join()
        signal.signal(signal.SIGUSR1, self._handler)

    def _ask(self, count: int) -> None:
        self._count = count

    def _poll(self) -> None:
        while not self._ended.wait(self._poll_s):
            # A file system that does not answer now may do so later.
            with contextlib.suppress(OSError):
                if count := self._read():
                    self._ask(count)

    def _read(self) -> int:
        """The number of steps that the file asks for; 0 if there is no file."""
        with bucket_errors(self._path):
            if not self._path.exists():
                return 0
            text = self._path.read_bytes().decode(errors="replace").strip()
        remove(self._path)
        if text and not (text.isdecimal() and int(text)):
            log.warning("%s held %.40r, not a number of steps: %d", self._path, text, STEPS)
            return STEPS
        return int(text or STEPS)
