"""Summarizes the shards of a source, in threads or, if there is much to do, in processes."""

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from imagen_jax.data.sources.folder import raise_unless_of_the_file
from imagen_jax.data.sources.shard_index import ShardIndex, Summary
from imagen_jax.data.workers import Workers
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

    def summary(self, path: Path) -> Summary: ...

    def summary_key(self, path: Path) -> str: ...


def summaries(
    source: Summarizer, paths: Sequence[Path], index: ShardIndex | None = None
) -> list[Summary]:
    """The summary of each shard, from the index if the shard is unchanged.

    New summaries are appended to the index as they are made. With an index, shards are summarized
    in random order, so that processes that open the same source share the work.
    """
    found: dict[Path, Summary] = {}
    with Progress("shards opened", len(paths), quiet=len(paths) < 10) as progress:
        stats = _stats(paths) if index else {}

        def known(path: Path) -> bool:
            """Whether the shard is in the index; then it is added to `found`."""
            if path not in stats:
                return False
            summary = index.find(path, source.summary_key(path), stats[path])
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
            if path in stats:
                index.add(path, source.summary_key(path), stats[path], summary)
    return [found[path] for path in paths]


def _stats(paths: Sequence[Path]) -> dict[Path, os.stat_result]:
    """Size and time of the shards that exist."""
    with ThreadPoolExecutor(THREADS) as pool:
        stats = pool.map(_stat, paths)
        return {path: stat for path, stat in zip(paths, stats) if stat}


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        raise_unless_of_the_file(error)
        return None


def _made(source: Summarizer, tasks: Iterator[Path], count: int) -> Iterator[tuple[Path, Summary]]:
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


def _in_processes(source: Summarizer, tasks: Iterable[Path]) -> Iterator[tuple[Path, Summary]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = min(cores or 1, MOST_PROCESSES)
    with Workers(source, processes) as workers:
        yield from workers.each(_summary, ((path,) for path in tasks), 2 * processes)


def _summary(source: Any, path: Path) -> tuple[Path, Summary]:
    return path, source.summary(path)


def _in_threads(
    summary: Callable[[Path], Summary], tasks: Iterable[Path]
) -> Iterator[tuple[Path, Summary]]:
    pool, running = ThreadPoolExecutor(THREADS), {}

    def finished() -> Iterator[tuple[Path, Summary]]:
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
