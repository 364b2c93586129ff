"""Several processes in one: threads for processes, and one dictionary for jax's store."""

import concurrent.futures
import threading

import pytest

from imagen_jax.distributed import agreement, startup

COUNT = 3


class Store(dict):
    """What is used of jax's client."""

    def __init__(self):
        self.barriers: dict[str, threading.Barrier] = {}
        self.lock = threading.Lock()

    def key_value_set(self, key, value):
        assert key not in self
        self[key] = value

    def key_value_dir_get(self, directory):
        return [(key, value) for key, value in sorted(self.items()) if key.startswith(directory)]

    def key_value_delete(self, directory):
        for key in [key for key in self if key.startswith(directory)]:
            del self[key]

    def wait_at_barrier(self, name, timeout_in_ms):
        with self.lock:
            barrier = self.barriers.setdefault(name, threading.Barrier(COUNT))
        barrier.wait(10)


class Rounds:
    """A count of its own for each thread, as each process has one."""

    def __init__(self):
        self.own = threading.local()

    def __next__(self):
        self.own.n = getattr(self.own, "n", -1) + 1
        return self.own.n


@pytest.fixture
def together(monkeypatch):
    """Runs a function of the process's number in three processes at once."""
    own, store = threading.local(), Store()
    monkeypatch.setattr(startup, "member", lambda: own.member)
    monkeypatch.setattr(startup, "hosts", lambda: ["a", "b", "c"])
    monkeypatch.setattr(startup, "store", lambda: store)
    monkeypatch.setattr(agreement, "_rounds", Rounds())

    def process(function, index):
        own.member = startup.Member("a:1", COUNT, index, "test")
        return function(index)

    def run(function):
        store.clear(), store.barriers.clear()  # new threads begin with round 0
        with concurrent.futures.ThreadPoolExecutor(COUNT) as pool:
            return [
                future.result()
                for future in [pool.submit(process, function, index) for index in range(COUNT)]
            ]

    run.store, run.count = store, COUNT
    return run
