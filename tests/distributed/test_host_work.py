"""Arithmetic on rows that several processes share; threads stand for the processes."""

import threading
import types

import numpy as np
import pytest

from imagen_jax.distributed import host_work


@pytest.fixture
def together(monkeypatch):
    """together(count, function): the results of `function` in `count` processes."""

    def run(count, function):
        local, barrier, said = threading.local(), threading.Barrier(count), {}

        def exchange(value):
            said[local.index] = value
            barrier.wait(timeout=60)
            everything = [said[i] for i in range(count)]
            barrier.wait(timeout=60)
            return everything

        monkeypatch.setattr(
            host_work,
            "jax",
            types.SimpleNamespace(process_count=lambda: count, process_index=lambda: local.index),
        )
        monkeypatch.setattr(host_work.agreement, "gather", exchange)
        gather = lambda array: np.stack(exchange(array))
        monkeypatch.setattr(host_work.multihost_utils, "process_allgather", gather)
        results = [None] * count

        def work(index):
            local.index = index
            results[index] = function()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_every_process_gets_the_values_of_all_rows(together, monkeypatch, count, n):
    """Catches padding that is counted, rows in another order, float64 cut to float32, a row that
    two processes compute, and a process without rows."""
    monkeypatch.setattr(host_work, "PART_BYTES", 20)
    asked = []

    def compute(rows):
        asked.extend(rows.tolist())
        return np.sin(rows[:, None] + np.arange(3)[None] / 7)

    results = together(count, lambda: host_work.for_rows(n, compute))
    assert sorted(asked) == list(range(n))
    expected = np.sin(np.arange(n)[:, None] + np.arange(3)[None] / 7)
    for result in results:
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("count", [1, 3])
def test_what_one_process_computes_is_told_to_all(together, count):
    """Catches a computation in every process, and a shape that is lost."""
    asked = []

    def compute():
        asked.append(1)
        return np.arange(6.0).reshape(2, 3)

    results = together(count, lambda: host_work.by_first(compute))
    assert len(asked) == 1
    for result in results:
        np.testing.assert_array_equal(result, np.arange(6.0).reshape(2, 3))
