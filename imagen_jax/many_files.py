"""Work on one file after another; in a bucket, where a request takes long, on several at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from imagen_jax.object_storage import AnyPath, in_bucket

THREADS = 16
Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    function: Callable[[Item], Result], items: Iterable[Item], directory: AnyPath
) -> Iterator[Result]:
    """The results of a function that reads or writes a file below a directory, in order.

    In a bucket, at most THREADS results are in memory. `items` are drawn by the calling thread.
    """
    if not in_bucket(directory):
        yield from map(function, items)
        return
    running: deque[Future] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) == THREADS:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
