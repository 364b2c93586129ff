"""A training under the local launcher whose workdir and data are in a bucket, killed twice."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imagen_jax import storage
from imagen_jax.distributed import host_failures
from imagen_jax.run_log import read_metrics
from launch import status
from launch.job import name_of
from tests import storage_emulator, tiny, xla
from tests.data import synthetic

STEPS = 24
WORKDIR = f"gs://{storage_emulator.BUCKET}/run"
DATA = f"gs://{storage_emulator.BUCKET}/data"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def server(no_network, monkeypatch):
    """The server, and the real paths of buckets."""
    monkeypatch.setattr(status, "as_path", storage.as_path)
    with storage_emulator.used(failing=0.02, delay=0.02):
        yield


def command(cache):
    return [
        *(sys.executable, "-m", "launch", "--where=local", f"--workdir={WORKDIR}"),
        *("--config=configs/base_64.py:tiny", f"--config.data.path={DATA}"),
        f"--config.data.shard_cache_dir={cache}",
        *(f"--config.text.dim={synthetic.DIM}", f"--config.train.steps={STEPS}"),
        *("--config.train.save_every=4", "--config.train.log_every=1"),
    ]


def child(launcher):
    """The id of the launcher's training."""
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return int(path.read_text().split()[0])


def test_a_killed_training_restarts_in_its_bucket(tmp_path, capsys):
    """Catches a launcher that looks for the run on the disk, a lock of a killed training that
    keeps the next one out, data in a bucket that are refused, and a host that nobody names.
    """
    data = synthetic.write_prepared(tmp_path / "data", images=40)
    for file in filter(Path.is_file, data.rglob("*")):
        target = storage.as_path("data", f"{DATA}/{file.relative_to(data)}")
        storage.write_atomically(target, file.read_bytes())
    shutil.rmtree(data)
    cache = tmp_path / "cache"
    env = os.environ | {"XLA_FLAGS": xla.flags(devices=1), "PYTHONPATH": str(tiny.ROOT)}
    workdir = storage.as_path("--workdir", WORKDIR)
    with subprocess.Popen(command(cache), cwd=tiny.ROOT, env=env) as launcher:
        for step in (4, 8):
            end = time.monotonic() + 150
            while not storage.exists(workdir / "checkpoints" / str(step) / "SHA256SUMS"):
                assert time.monotonic() < end and launcher.poll() is None
                time.sleep(0.1)
            os.kill(child(launcher), signal.SIGKILL)
        assert launcher.wait(timeout=300) == 0
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, STEPS + 1))
    assert [failure.code for failure in host_failures.read(workdir)] == [-9, -9]
    log = tmp_path / "home" / ".cache/imagen_jax/launch" / name_of(WORKDIR) / "output.log"
    assert "failed 2 times in this run" in log.read_text()
    assert status.main([WORKDIR]) == 0
    row, host = capsys.readouterr().out.splitlines()[1:]
    assert row.split()[:2] == ["run", "finished"] and host.endswith("remove it from the job")
    again = subprocess.run(command(cache), cwd=tiny.ROOT, env=env, capture_output=True, text=True)
    assert "already finished, not started again" in again.stdout
