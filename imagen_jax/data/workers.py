"""A pool of processes that each hold the source, for work on its shards and images."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

_source: Any = None  # in a worker process


class Workers:
    """Runs function(source, *task) in `processes` processes; in this process if there is one.

    Workers are spawned, not forked, because this process may have started JAX's threads. They end
    with this process, even if it is killed.
    """

    def __init__(self, source: Any, processes: int, start: Callable[[], Any] = int):
        """start: called first in each worker process."""
        self._source = source
        self._pool = None
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                processes, context, initializer=_start, initargs=(source, start)
            )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def each(
        self, function: Callable[..., Any], tasks: Iterable[tuple], ahead: int
    ) -> Iterator[Any]:
        """Yields the results as they are ready, in no order; raises an exception of a task.

        Draws `tasks` one by one, at most `ahead` more than have results. Raises ValueError if a
        worker process was killed.
        """
        if self._pool is None:
            yield from (function(self._source, *task) for task in tasks)
            return
        try:
            yield from self._each(function, tasks, ahead)
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was killed, perhaps because memory ran out: run the same command"
                " with fewer --processes; it continues"
            ) from error

    def _each(
        self, function: Callable[..., Any], tasks: Iterable[tuple], ahead: int
    ) -> Iterator[Any]:
        running: set[Future] = set()
        for task in tasks:
            running.add(self._pool.submit(_run, function, task))
            if len(running) >= ahead:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        for future in as_completed(running):
            yield future.result()


def _start(source: Any, start: Callable[[], Any]) -> None:
    global _source
    _source = source
    start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once and prints nothing
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Runs in a thread of a worker: ends the worker when the process that started it ends."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(function: Callable[..., Any], task: tuple) -> Any:
    return function(_source, *task)
