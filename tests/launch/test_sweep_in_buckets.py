"""Sweeps whose runs are in a bucket, on an emulator of Cloud Storage."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from imagen_jax import storage
from imagen_jax.checksums import CHECKSUMS
from launch import status, sweep
from launch.ablation import FINISHED
from tests import storage_emulator, tiny
from tests.data import synthetic
from tests.launch import test_sweep_data
from tests.test_sweep import ABLATION, evaluation

URL = f"gs://{storage_emulator.BUCKET}"
pytestmark = pytest.mark.usefixtures("real_buckets")


def option(command, name):
    return next(word.partition("=")[2] for word in command if word.startswith(f"--{name}="))


def finish_training(workdir, steps=8):
    """Leaves the files of a training of eight steps that has done `steps` of them."""
    config = {"train": {"steps": 8}, "data": {"batch_size": 2}}
    storage.write_json(workdir / "config.json", config)
    storage.write_atomically(workdir / "metrics.jsonl", b'{"step": %d, "loss": 1.0}\n' % steps)
    storage.write_atomically(workdir / "checkpoints" / str(steps) / CHECKSUMS, b"")


@pytest.fixture
def processes(monkeypatch):
    """Stands in for the processes of a sweep: their commands, and the labels of those to fail."""
    commands, failing = [], []

    def call(command):
        commands.append(list(command))
        if "imagen_jax.train" in command:
            stopped = failing and failing.pop()
            finish_training(storage.as_path("x", option(command, "workdir")), 3 if stopped else 8)
            return 0
        assert option(command, "checkpoint").startswith(URL)
        output = storage.as_path("x", option(command, "output"))
        result, content = evaluation(0.0, [0.25, 0.5]), io.BytesIO()
        np.savez(content, **result["rows"])
        storage.write_atomically(output / "rows.npz", content.getvalue())
        storage.write_json(output / "evaluation.json", result["measures"])
        return 0

    monkeypatch.setattr(sweep.cli, "call", call)
    return commands, failing


def test_an_interrupted_sweep_continues(tmp_path, capsys, processes):
    """Catches runs beside the bucket, marks that are not found again, a training that stopped
    early taken for a finished one, and rows that cannot be read.
    """
    (tmp_path / "ablation.py").write_text(ABLATION)
    commands, failing = processes
    command = [f"--config={tmp_path / 'ablation.py'}", f"--workdir={URL}/sweep/"]
    failing.append(True)
    assert sweep.main(command) == 2
    assert "train slow, seed 0 stopped before its last step" in capsys.readouterr().err
    assert sweep.main(command) == 0
    out = capsys.readouterr().out
    assert f"all in {URL}/sweep/sweep.json" in out and "0.3750" in out
    assert len(commands) == 6 and commands[0] == commands[1]
    assert option(commands[0], "workdir") == f"{URL}/sweep/slow/seed_0/train"
    assert sweep.main(command) == 0 and len(commands) == 6
    result = storage.read_json(storage.as_path("x", f"{URL}/sweep/sweep.json"))
    assert result["columns"][0]["arms"]["guided"]["se_rows"] == 0
    assert sweep.main([*command, "--rows=3"]) == 2
    assert "was written by another command" in capsys.readouterr().err
    assert status.main([f"{URL}/sweep"]) == 0
    assert capsys.readouterr().out.count("finished") == 2


def test_a_sweep_that_had_mounted_its_bucket_continues(tmp_path, capsys, processes):
    """Catches marks with the paths of a mount, which older versions wrote, taken for those of
    another command.
    """
    (tmp_path / "ablation.py").write_text(ABLATION)
    command = [f"--config={tmp_path / 'ablation.py'}", f"--workdir={URL}/mounted"]
    assert sweep.main(command) == 0
    for name in storage.file_names(storage.as_path("x", f"{URL}/mounted")):
        if name.endswith(FINISHED):
            path = storage.as_path("x", f"{URL}/mounted/{name}")
            storage.write_json(path, json.loads(path.read_text().replace("gs://", "/mnt/gs/")))
    assert sweep.main(command) == 0 and len(processes[0]) == 5


def test_jobs_write_to_the_bucket_and_are_evaluated_here(tmp_path, capsys, tool, processes):
    """Catches a mount that the evaluations of finished jobs do not need, and a job that is not
    known to be finished.
    """
    (tmp_path / "ablation.py").write_text(ABLATION)
    tool("sbatch", "print(1)")
    tool("squeue", "")
    where = ("--where=slurm", "--topology=h100:1x8")
    command = [f"--config={tmp_path / 'ablation.py'}", f"--workdir={URL}/jobs", *where]
    assert sweep.main(command) == 0
    assert "run this command again here to evaluate them" in capsys.readouterr().out
    scripts = [path.read_text() for path in (tmp_path / "home").rglob("job.sbatch")]
    for arm in ("slow", "fast"):
        workdir = f"--workdir={URL}/jobs/{arm}/seed_0/train"
        assert sum(workdir in script for script in scripts) == 1
    for arm in ("slow", "fast"):
        finish_training(storage.as_path("x", f"{URL}/jobs/{arm}/seed_0/train"))
    assert sweep.main(command) == 0
    assert {words[2] for words in processes[0]} == {"imagen_jax.evaluate"}
    assert f"all in {URL}/jobs/sweep.json" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["gs://b/data", "/mnt/gs/b/data"])
def test_nothing_needs_a_mount_unless_it_is_named(capsys, data):
    """Catches a local directory named after the bucket, a workdir or data that are mounted, and
    evaluations that use another shard cache than the trainings.
    """
    command = [
        f"--config={tiny.ROOT}/configs/ablations/noise_augmentation.py:demo",
        f"--workdir={URL}/sweep",
        f"--config.data.path={data}",
        "--config.data.shard_cache_gib=900",
    ]
    gke = ("--where=gke", "--image=i", "--topology=v5e:2x4", "--dry-run")
    assert sweep.main([*command, *gke]) == 0
    out = capsys.readouterr().out
    assert f"--workdir={URL}/sweep/" in out and f"--checkpoint={URL}/sweep/" in out
    assert "--config=configs/ablations/noise_augmentation.py:demo" in out
    is_mounted = data.startswith("/mnt")
    assert f"--config.data.path={data}" in out and f"--data={data}" in out
    assert ("bucketName: b\n" in out) == is_mounted
    assert f"bucketName: {storage_emulator.BUCKET}" not in out and "seed 0: a job\n" in out
    assert ("--shard_cache_gib=900" in out) == (not is_mounted)
    place = "on a machine where the bucket of the data is mounted below" if is_mounted else "here"
    assert f"evaluations run {place}" in out


def test_data_in_a_bucket_are_compared_with_the_arms(tmp_path, capsys, processes):
    """Catches data in a bucket that are refused, or not read before the first training."""
    (tmp_path / "ablation.py").write_text(test_sweep_data.ABLATION)
    data = synthetic.write_prepared(tmp_path / "data", shapes=[(64, 64)])
    for file in filter(Path.is_file, data.rglob("*")):
        target = storage.as_path("data", f"{URL}/data/{file.relative_to(data)}")
        storage.write_atomically(target, file.read_bytes())
    command = [
        f"--config={tmp_path / 'ablation.py'}",
        f"--workdir={tmp_path / 'runs'}",
        f"--config.data.path={URL}/data",
        f"--config.data.shard_cache_dir={tmp_path / 'cache'}",
    ]
    assert sweep.main(command) == 2 and not processes[0]
    error = capsys.readouterr().err
    assert "arm wide: " in error and "3 of 4 arms do not fit the data" in error


def test_a_bucket_that_does_not_exist(tmp_path, capsys, processes):
    """Catches a first training of hours whose bucket has a wrong name."""
    (tmp_path / "ablation.py").write_text(ABLATION)
    command = [f"--config={tmp_path / 'ablation.py'}", "--workdir=gs://no-such-bucket/s"]
    assert sweep.main(command) == 2 and not processes[0]
    assert "there is no bucket gs://no-such-bucket" in capsys.readouterr().err
    command = [command[0], f"--workdir={URL}/s", "--config.data.path=gs://no-such-data/d"]
    assert sweep.main(command) == 2 and not processes[0]
    assert "there is no bucket gs://no-such-data" in capsys.readouterr().err


def test_data_of_this_machine_is_not_promised_to_the_jobs(capsys):
    """Catches a sweep that skips the checks of launch."""
    command = [
        "--config",
        f"{tiny.ROOT}/configs/ablations/noise_augmentation.py:demo",
        f"--workdir={URL}/sweep",
        "--config.data.path=/data",
    ]
    assert (
        sweep.main([*command, "--where=gke", "--image=i", "--topology=v5e:2x4", "--dry-run"]) == 2
    )
    assert "--config.data.path=/data exists only on this machine" in capsys.readouterr().err
