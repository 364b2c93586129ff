"""Summarizes the shards of a source, in threads or, if there is much to do, in processes."""

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, Protocol, runtime_checkable

from imagen_jax.data.sources.folder import raise_unless_of_the_file
from imagen_jax.data.sources.shard_index import ShardIndex, Summary
from imagen_jax.data.workers import Workers
from imagen_jax.object_storage import AnyPath, FileState, file_state
from imagen_jax.run_log import Progress

THREADS = 8  # each waits for the file system most of the time
MOST_PROCESSES = 32
# Processes start in a few seconds. They pay if Python alone, which runs one thread at a time, would
# take longer than this, in seconds of one thread.
PROCESSES_FROM_S = 20.0
_TIMED = 3  # shards that are timed before the decision


@runtime_checkable
class Summarizer(Protocol):
    """A source that can summarize a shard, as `sharded.ShardedSource`. It can be pickled."""

    def summary(self, path: AnyPath) -> Summary: ...

    def summary_key(self, path: AnyPath) -> str: ...


def summaries(
    source: Summarizer, paths: Sequence[AnyPath], index: ShardIndex | None = None
) -> list[Summary]:
    """The summary of each shard, from the index if the shard is unchanged.

    New summaries are appended to the index as they are made. With an index, shards are summarized
    in random order, so that processes that open the same source share the work.
    """
    found: dict[AnyPath, Summary] = {}
    with Progress("shards opened", len(paths), quiet=len(paths) < 10) as progress:
        states = _states(paths) if index else {}

        def known(path: AnyPath) -> bool:
            """Whether the shard is in the index; then it is added to `found`."""
            if path not in states:
                return False
            summary = index.find(path, source.summary_key(path), states[path])
            if summary is not None:
                found[path] = summary
                progress.update(len(found))
            return summary is not None

        todo = [path for path in paths if not known(path)]
        if index:
            random.shuffle(todo)
        rest = iter(todo)
        tasks = (path for path in rest if not known(path))
        for path, summary in _made(source, tasks, len(todo)):
            found[path] = summary
            progress.update(len(found))
            if path in states:
                index.add(path, source.summary_key(path), states[path], summary)
    return [found[path] for path in paths]


def _states(paths: Sequence[AnyPath]) -> dict[AnyPath, FileState]:
    """Size and version of the shards that exist."""
    with ThreadPoolExecutor(THREADS) as pool:
        states = pool.map(_state, paths)
        return {path: state for path, state in zip(paths, states) if state}


def _state(path: AnyPath) -> FileState | None:
    try:
        return file_state(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise_unless_of_the_file(error)
        return None


def _made(
    source: Summarizer, tasks: Iterator[AnyPath], count: int
) -> Iterator[tuple[AnyPath, Summary]]:
    """Yields the summaries of `tasks`, at most `count`, as they are ready."""
    times = []
    for path in tasks:
        start = time.process_time()
        yield path, source.summary(path)
        times.append(time.process_time() - start)
        if len(times) == _TIMED:
            break
    if times and min(times) * (count - len(times)) > PROCESSES_FROM_S:
        yield from _in_processes(source, tasks)
    else:
        yield from _in_threads(source.summary, tasks)


def _in_processes(
    source: Summarizer, tasks: Iterable[AnyPath]
) -> Iterator[tuple[AnyPath, Summary]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = min(cores or 1, MOST_PROCESSES)
    with Workers(source, processes) as workers:
        yield from workers.each(_summary, ((path,) for path in tasks), 2 * processes)


def _summary(source: Any, path: AnyPath) -> tuple[AnyPath, Summary]:
    return path, source.summary(path)


def _in_threads(
    summary: Callable[[AnyPath], Summary], tasks: Iterable[AnyPath]
) -> Iterator[tuple[AnyPath, Summary]]:
    pool, running = ThreadPoolExecutor(THREADS), {}

    def finished() -> Iterator[tuple[AnyPath, Summary]]:
        done = wait(running, return_when=FIRST_COMPLETED).done
        # Those that raise come last, so that no summary is lost.
        for future in sorted(done, key=lambda future: future.exception() is not None):
            yield running.pop(future), future.result()

    try:
        for path in tasks:
            running[pool.submit(summary, path)] = path
            if len(running) >= 2 * THREADS:
                yield from finished()
        while running:
            yield from finished()
    finally:
        pool.shutdown(cancel_futures=True)
