"""Tasks are handed to processes one by one."""

import os
import signal
import time

import pytest

from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.data.workers import Workers
from tests.data.synthetic_source import write_folder


def later(source, number):
    time.sleep(0.02)
    return number


@pytest.mark.parametrize(("processes", "ahead"), [(1, 1), (2, 3)])
def test_tasks_are_asked_for_one_by_one(tmp_path, processes, ahead):
    """Catches all tasks, so all features, in memory at once; a result lost or given twice."""
    asked, most = 0, 0

    def tasks():
        nonlocal asked
        for number in range(20):
            asked += 1
            yield (number,)

    received = []
    with Workers(
        FolderSource(write_folder(tmp_path / "ramps", images=1), 0.0), processes
    ) as workers:
        for result in workers.each(later, tasks(), ahead):
            received.append(result)
            most = max(most, asked - len(received))
    assert sorted(received) == list(range(20)) and most < ahead + 1


def killed(source):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(tmp_path):
    """Catches a traceback of the process pool, which does not say what to do."""
    source = FolderSource(write_folder(tmp_path / "ramps", images=1), 0.0)
    with Workers(source, 2) as workers:
        with pytest.raises(ValueError, match="perhaps because memory ran out: run the same"):
            list(workers.each(killed, [()], ahead=2))
