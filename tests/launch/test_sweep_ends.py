"""The table of a sweep that is interrupted, or in which a process fails."""

import json

import pytest

from launch import sweep
from launch.ablation import FINISHED
from tests.test_sweep import ABLATION, evaluation


@pytest.mark.parametrize(
    "last, error, arms, told",
    [
        ("train fast, seed 0", KeyboardInterrupt(), ["slow", "guided"], "2 of 3 arms, 1 of 2 "),
        ("train fast, seed 1", ValueError("oom"), ["slow", "guided", "fast"], "3 of 3 arms, 1 of "),
        ("train slow, seed 0", ValueError("oom"), [], ""),
    ],
)
def test_the_table_of_a_sweep_that_ends_early(
    tmp_path, monkeypatch, capsys, last, error, arms, told
):
    """Catches finished arms that are not shown, arms that lack one of the seeds shown, results of
    another command, and a partial sweep.json that looks complete.
    """

    def execute(step):
        if step.label == last:
            raise error
        step.directory.mkdir(parents=True)
        if not step.trains:
            measures = json.dumps(evaluation(0.25)["measures"])
            (step.directory / "evaluation.json").write_text(measures)
        (step.directory / FINISHED).write_text(json.dumps(step.command[1:]))

    monkeypatch.setattr(sweep, "execute", execute)
    (tmp_path / "ablation.py").write_text(ABLATION)
    files = (f"--config={tmp_path / 'ablation.py'}", f"--workdir={tmp_path / 'runs'}")
    command = [*files, "--seeds=0,1"]
    assert sweep.main(command) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if " 0.2500 " in line] == arms
    assert ("PARTIAL" in out) == bool(arms) and told in out
    assert not arms or "run the same command again to continue" in out
    assert not (tmp_path / "runs" / "sweep.json").exists()
    assert sweep.main([*command, "--rows=3"]) == 2
    assert "PARTIAL" not in capsys.readouterr().out
