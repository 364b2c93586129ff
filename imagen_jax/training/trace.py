"""A profiler trace of a few training steps."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import copy_directory

log = logging.getLogger("imagen_jax.train")


class Trace:
    """Traces `count` steps after step `first`, or those of them that this process runs."""

    def __init__(self, directory: AnyPath, first: int, count: int):
        self._directory, self._first, self._last = directory, first, first + count
        self._written = None  # a local directory, if the trace goes to a bucket
        self._running = self._traced = False

    def before(self, done: int) -> None:
        """Called before each step with the number of finished steps."""
        if self._first <= done < self._last and not self._running:
            if in_bucket(self._directory):
                self._written = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._written.name if self._written else str(self._directory))
            self._running = self._traced = True

    def after(self, done: int, settle: Callable[[], None]) -> None:
        """Called after each step; `settle` waits for the steps in flight."""
        if self._running and done >= self._last:
            settle()
            self._stop()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._first < self._last and not self._traced:
            log.warning("no trace: none of steps %d to %d was done", self._first, self._last)

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if self._written:
                copy_directory(Path(self._written.name), self._directory)
                self._written.cleanup()
            log.info("trace of steps from %d in %s", self._first, self._directory)
