"""The copy of a log in Weights & Biases: with a stand-in, and offline with the package itself."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import types

import numpy as np
import pytest

from imagen_jax import wandb_log
from imagen_jax.run_log import MetricsWriter, read_metrics
from imagen_jax.wandb_log import WandbLog, run_id
from tests import tiny

CONFIG = {"name": "base", "optim": {"betas": (0.9, 0.99)}}
PICTURE = np.zeros((4, 6, 3), np.uint8)


class Run:
    """A run of the stand-in."""

    def __init__(self, init, fails):
        self.init, self.fails, self.logged, self.axes, self.finished = init, fails, [], {}, None

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, row):
        if len(self.logged) == self.fails:
            raise ConnectionError("the service\nhas ended")
        self.logged.append(row)

    def finish(self, exit_code):
        self.finished = exit_code


@pytest.fixture
def runs(monkeypatch):
    """The runs that the stand-in has begun; `runs.fails`: log fails after this number of rows."""

    class Runs(list):
        fails = None

    made = Runs()

    def init(**options):
        if made.fails == "init":
            raise RuntimeError("no API key")
        made.append(Run(options, made.fails))
        return made[-1]

    fake = types.ModuleType("wandb")
    fake.init, fake.Settings, fake.Image = (
        init,
        lambda **options: options,
        lambda image: image.shape,
    )
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return made


def write(workdir, start_step, steps, error=None):
    with WandbLog(workdir, "team/imagen", CONFIG) as log:
        writer = MetricsWriter(workdir, start_step)
        writer.begin(CONFIG, log)
        for step in steps:
            writer.scalars(step, {"loss": step / 8})
        writer.validation(steps[-1], {"heldout/ema/loss": 0.5})
        writer.image(steps[-1], "ema", PICTURE)
        writer.close()
        if error:
            raise error


def test_a_resumed_run_is_continued_and_nothing_is_dropped(tmp_path, runs):
    """Catches a run of W&B per process, a config that is lost, rows that W&B drops because an
    earlier process has logged later steps, and the wrong end of a failed training.
    """
    write(tmp_path, 0, [1, 2, 3])
    with pytest.raises(OSError):
        write(tmp_path, 2, [3, 4], OSError())
    first, second = runs
    assert first.init["id"] == second.init["id"] == run_id(tmp_path)
    assert first.init["resume"] == "allow" and first.init["dir"] == str(tmp_path)
    assert (first.init["entity"], first.init["project"]) == ("team", "imagen")
    assert first.init["config"]["optim"]["betas"] == [0.9, 0.99]
    assert second.axes == {"step": None, "*": "step"}
    assert second.logged == [
        {"step": 3, "loss": 0.375},
        {"step": 4, "loss": 0.5},
        {"step": 4, "heldout/ema/loss": 0.5},
        {"step": 4, "ema": (4, 6, 3)},
    ]
    assert (first.finished, second.finished) == (0, 1)
    assert run_id(tmp_path / "other") != run_id(tmp_path)


@pytest.mark.parametrize("fails", ["init", 0, 1])
def test_no_failure_ends_the_training(tmp_path, runs, caplog, fails):
    """Catches an error of W&B in the loop, and a warning for each row after it."""
    runs.fails = fails
    write(tmp_path, 0, [1, 2, 3])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert caplog.text.count("the training goes on without it") == 1
    assert ("no API key" if fails == "init" else "the service has ended") in caplog.text


def test_without_a_project_nothing_is_begun(tmp_path, runs):
    """Catches a run of W&B for those who have not asked for it, or one per process."""
    with WandbLog(tmp_path, "", CONFIG) as log:
        log.row({"step": 1})
        log.image(1, "ema", PICTURE)
    assert not runs and not list(tmp_path.iterdir())


def test_settings_are_checked_first(monkeypatch):
    """Catches a missing package, or a bad name, that is found after the compilation."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wandb_log.check("")
    with pytest.raises(ValueError, match=r"needs the extra `wandb`: pip install -e '.\[wandb\]'"):
        wandb_log.check("imagen")
    for text in ("a/b/c", "/a", "a b"):
        with pytest.raises(ValueError, match="give PROJECT or ENTITY/PROJECT"):
            wandb_log.check(text)


def test_the_command_checks_them_before_it_begins(tmp_path):
    """Catches a check that comes after the data are read, or never."""
    options = ["--config=configs/base_64.py:tiny", "--config.data.path=no_data", "--workdir=run"]
    (tmp_path / "configs").symlink_to(tiny.ROOT / "configs")
    done = subprocess.run(
        [sys.executable, "-m", "imagen_jax.train", *options, "--config.train.wandb=a/b/c"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tiny.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert tiny.said(done.stderr) == [
        "error: train.wandb is 'a/b/c'; give PROJECT or ENTITY/PROJECT"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


def log_records(content):
    """The records of a file in the log format of LevelDB, after a header of 7 bytes."""
    at, part = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block is too short for a record
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield part
            part = b""


def records(workdir):
    """{run: (rows, config)} of the files that W&B has written, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        rows, config = [], {}
        for data in log_records(path.read_bytes()):
            record = Record.FromString(data)
            items = record.history.item
            row = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            rows += [row] if row else []
            for item in (*record.run.config.update, *record.config.update):
                config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        found.append((path.stem, rows, config))
    return found


@pytest.mark.slow
def test_offline(tmp_path, monkeypatch):
    """Catches calls that the package does not have, and rows that it does not write."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, 0, [1, 2, 3])
    write(tmp_path, 2, [3, 4])
    first, second = records(tmp_path)
    assert first[0] == second[0] == f"run-{run_id(tmp_path)}"
    assert [(row["step"], row.get("loss")) for row in first[1]] == [
        (1, 0.125),
        (2, 0.25),
        (3, 0.375),
        (3, None),
        (3, None),
    ]
    assert [row["step"] for row in second[1]] == [3, 4, 4, 4]
    assert first[1][3]["heldout/ema/loss"] == 0.5 and "ema" in str(first[1][4])
    assert first[2]["optim"] == {"betas": [0.9, 0.99]}
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))
