"""Worker processes that compile blocks in parallel.

They are processes, not threads, because the compiler holds a lock and keeps its memory.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from imagen_jax.planning import kernels

# A SIGTERM often goes to all processes at once; the main process then ends first and reports it.
GRACE_S = 5


@contextlib.contextmanager
def compile_pool(
    processes: int, schedules: str = ""
) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A pool of worker processes.

    An error cancels the tasks that have not started. Workers end with the main process, however
    that ends.

    Args:
        processes: number of workers.
        schedules: directory for the schedules of kernels (`kernels.ask_for_schedules`), or "" for
            none. Workers delete it when they are ended early.
    """
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _start_worker, (schedules,)
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _start_worker(schedules: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides when to stop
    # Blocked, because the compiler's own handler prints a message that looks like a crash.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    for wait in (parent.join, lambda: (signal.sigwait({signal.SIGTERM}), parent.join(GRACE_S))):
        threading.Thread(target=_end_after, args=(wait, schedules), daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_compilation_cache_dir", None)
    if schedules:
        kernels.ask_for_schedules(schedules)


def _end_after(wait: Callable[[], Any], schedules: str) -> None:
    """Ends this process when `wait` returns, even while it compiles. Runs in a thread."""
    wait()
    shutil.rmtree(schedules or os.devnull, ignore_errors=True)
    os._exit(1)
