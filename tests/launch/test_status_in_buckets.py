"""The table of trainings in buckets, on an emulator of Cloud Storage."""

import json
import time

import pytest

from imagen_jax import goodput, locks, run_log, storage
from imagen_jax.checksums import CHECKSUMS
from imagen_jax.distributed.host_failures import HostFailures
from launch import status
from tests import storage_emulator
from tests.launch.conftest import job

URL = f"gs://{storage_emulator.BUCKET}"
pytestmark = pytest.mark.usefixtures("real_buckets")


def write(name: str, step: int, checkpoints=()):
    """A run after `step` of 100 steps of 10 images, written by a process that has ended."""
    path = storage.as_path("WORKDIR", f"{URL}/{name}")
    content = {"train": {"steps": 100}, "data": {"batch_size": 10}}
    storage.write_json(path / "config.json", content)
    with goodput.Ledger(path, began=time.monotonic() - 5) as ledger:
        ledger.at(0, "step")
        ledger.at(step, "step")
        writer = run_log.MetricsWriter(path, 0)
        for n in range(1, step + 1):
            writer.scalars(n, {"loss": 1 / n, "time/images_per_s": 5})
        writer.close()
    for file in checkpoints:
        storage.write_atomically(path / "checkpoints" / file, b"")
    return path


def test_the_row_of_a_run():
    """Catches a run in a bucket shown as not started, an incomplete checkpoint, a run that has
    ended shown as running because its newest row is recent, and a lock that is not seen.
    """
    files = [f"40/{CHECKSUMS}", "40/meta.json", "45/meta.json", f"50.writing/{CHECKSUMS}"]
    path = write("one", 50, files)
    row = status.read(job(f"{URL}/one"))
    assert (row.state, row.step, row.steps, row.loss) == ("stopped", 50, 100, 0.02)
    assert (row.checkpoint, row.is_locked) == (40, False)
    assert 0 < row.left < 100.0  # of the ledger, not of images/s
    assert 0 < row.goodput < 1 and row.losses
    with locks.only_process(path, "training in"):
        row = status.read(job(f"{URL}/one"))
        assert row.state == "running" and row.is_locked
    assert status.read(job(f"{URL}/other")).state == "not started"


@pytest.mark.parametrize(
    "lock, seconds, state",
    [
        (None, 300, "running"),  # of a mounted bucket
        (b"", 300, "running"),
        (None, 700, "stopped"),
        (json.dumps({"pid": 1, "host": "a"}).encode(), 30, "running"),
        (json.dumps({"pid": 1, "host": "a"}).encode(), 90, "stopped"),  # has not been renewed
    ],
)
def test_a_run_that_has_not_ended_by_itself(monkeypatch, lock, seconds, state):
    """Catches a killed run that appears to run for ten minutes, and a run on a mounted bucket,
    whose lock is invisible, that appears to have stopped.
    """
    path = write("killed", 3)
    (entry,) = goodput.read_entries(path)[-1:]
    entry.pop("ended")
    storage.write_atomically(path / goodput.GOODPUT, json.dumps(entry).encode() + b"\n")
    storage.remove(path / locks.LOCK)
    if lock is not None:
        storage.write_atomically(path / locks.LOCK, lock)
    now = time.time
    monkeypatch.setattr("time.time", lambda: now() + seconds)
    assert status.read(job(f"{URL}/killed")).state == state


def test_the_trainings_of_a_bucket(capsys):
    """Catches trainings below a directory of a bucket that are not found, and names of another
    directory with the same beginning.
    """
    for name in ("sweep/arm_1/base", "sweep/arm_2", "sweep2/arm", "sweep/arm_2/overfit"):
        path = write(name, 2, ["1/meta.json"])
        HostFailures(path, "1-ab").record(0, "one", 75, "lost")
    found = [("arm_1/base", f"{URL}/sweep/arm_1/base"), ("arm_2", f"{URL}/sweep/arm_2")]
    assert status.inside(f"{URL}/sweep") == status.inside(f"{URL}/sweep/") == found
    assert status.inside(f"{URL}/sweep/arm_2") == [("arm_2", f"{URL}/sweep/arm_2")]
    assert status.main([f"{URL}/sweep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = ["stage", "arm_1/base", "arm_2", "arm_1/base:", "arm_2:"]
    assert [line.split()[0] for line in lines] == rows
    assert "arm_2: host one failed once" in lines[-1]


def test_a_bucket_that_does_not_exist(capsys):
    """Catches an unreachable bucket shown as an empty one."""
    assert status.main(["gs://no-such-bucket/run"]) == 2
    assert "there is no bucket gs://no-such-bucket" in capsys.readouterr().err
