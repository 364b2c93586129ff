"""Sweeps with --where: trainings are jobs, none twice, and are compared once all are finished."""

import subprocess
from pathlib import Path

import pytest

from launch import sweep

ABLATION = """
from configs import base_64

def get_config(arg=""):
    return base_64.get_config("tiny")

def sweep(arg=""):
    yield {"name": "slow", "config.optim.lr": 1e-4}
    yield {"name": "fast", "config.optim.lr": 1e-3}
    yield {"name": "fast_guided", "config.optim.lr": 1e-3, "config.sampling.w": 3.0}
"""


@pytest.fixture
def command(tmp_path, tool, monkeypatch):
    """The sweep's options; sbatch and squeue are stand-ins that record scripts and names."""
    (tmp_path / "ablation.py").write_text(ABLATION)
    tool(
        "sbatch",
        f"import sys; open({str(tmp_path / 'submitted')!r}, 'a').write(sys.argv[-1] + '\\n');"
        " print(1)",
    )
    tool(
        "squeue",
        f"import pathlib; p = pathlib.Path({str(tmp_path / 'queue')!r}); print(p.read_text() if"
        " p.exists() else '')",
    )
    return [
        "--config",
        str(tmp_path / "ablation.py"),
        "--workdir",
        str(tmp_path / "runs"),
        "--config.data.path=/data",
        "--where=slurm",
        "--topology=h100:1x8",
    ]


def submitted(tmp_path: Path) -> list[str]:
    """The workdirs whose scripts were submitted since the last call."""
    path = tmp_path / "submitted"
    result = (
        [
            str(Path(line).parent.parent.relative_to(tmp_path / "runs"))
            for line in path.read_text().splitlines()
        ]
        if path.exists()
        else []
    )
    path.write_text("")
    return result


def finish(tmp_path: Path, arm: str) -> None:
    """Leaves the files of a finished training of eight steps."""
    directory = tmp_path / "runs" / arm / "seed_0" / "train"
    (directory / "checkpoints" / "8").mkdir(parents=True)
    (directory / "checkpoints" / "8" / "SHA256SUMS").touch()
    (directory / "metrics.jsonl").write_text('{"step": 8, "loss": 1.0}\n')


def test_each_training_is_one_job_until_all_are_finished(command, tmp_path, monkeypatch, capsys):
    """Catches a finished or queued training that is submitted again, and arms that share a job.

    Also catches an evaluation that starts before the last training has ended, or never.
    """
    evaluated = []
    monkeypatch.setattr(sweep, "execute", lambda step: evaluated.append(step.label))
    assert sweep.main(command) == 0
    assert submitted(tmp_path) == ["slow/seed_0/train", "fast/seed_0/train"]
    script = (tmp_path / "runs/fast/seed_0/train/launch/job.sbatch").read_text()
    assert (
        "--config.optim.lr=0.001" in script
        and "--config.seed=0" in script
        and "sampling" not in script
    )
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (tmp_path / "queue").write_text(
        "PENDING"
        f" {next(line for line in script.splitlines() if '--comment=' in line).partition('=')[2]}\n"
    )
    finish(tmp_path, "slow")
    assert sweep.main(command) == 0
    assert submitted(tmp_path) == [] and evaluated == []
    assert "already waiting (slurm)" in capsys.readouterr().out
    finish(tmp_path, "fast")
    (tmp_path / "queue").write_text("")
    monkeypatch.setattr(
        sweep.comparison,
        "read_evaluations",
        lambda *_: {
            name: [{"measures": {}, "rows": {}}] for name in ("slow", "fast", "fast_guided")
        },
    )
    assert sweep.main(command) == 0
    assert submitted(tmp_path) == [] and evaluated == [
        f"evaluate {arm}, seed 0" for arm in ("slow", "fast", "fast_guided")
    ]


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_dry_run_submits_nothing(command, tmp_path, capsys, flag):
    """Catches --dry-run that submits a job or does not show it."""
    assert sweep.main([*command, flag]) == 0
    out = capsys.readouterr().out
    assert submitted(tmp_path) == [] and not (tmp_path / "runs").exists()
    assert out.count("#!/bin/bash") == 2 and "evaluate fast_guided, seed 0: to run" in out


def test_mistakes_are_found_before_the_first_job(command, tmp_path, capsys):
    """Catches an arm's invalid value that is found after the first job was submitted."""
    (tmp_path / "ablation.py").write_text(ABLATION.replace("1e-3", "'fast'"))
    assert sweep.main(command) == 2
    assert "fast" in capsys.readouterr().err and submitted(tmp_path) == []
