"""A sweep compares its data with all arms before it starts one."""

import pytest

from launch import sweep
from tests.data import synthetic

ABLATION = f"""
from configs import base_64

def get_config(arg=""):
    config = base_64.get_config("tiny").unlock()
    config.text.dim = {synthetic.DIM}
    config.data.update(path="prepared", text_length={synthetic.TEXT_LENGTH})
    return config.lock()

def sweep(arg=""):
    yield {{"name": "right"}}
    yield {{"name": "wide", "config.text.dim": 99}}
    yield {{
        "name": "named", "config.text.dim": 0, "config.text.encoders": ("t5",),
        "config.text.dims": (4,), "config.text.lengths": (8,), "config.text.pooled_dims": (0,),
        "config.text.drops": (0.0,),
    }}
    yield {{"name": "large", "config.data.buckets": ((4000, 4000), (8, 16))}}
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "ablation.py").write_text(ABLATION)
    return [f"--config={tmp_path / 'ablation.py'}", f"--workdir={tmp_path / 'runs'}"]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_every_arm_is_compared_with_the_data(command, tmp_path, monkeypatch, capsys, dry):
    """Catches a sweep whose third arm fails after two trainings because the data lack its text."""
    ran = []
    monkeypatch.setattr(sweep, "execute", ran.append)
    data = synthetic.write_prepared(tmp_path / "data", shapes=[(64, 64)])
    assert sweep.main([*command, f"--config.data.path={data}", *dry]) == 2
    lines = capsys.readouterr().err.splitlines()
    *problems, last = [line for line in lines if not line.startswith("sizes of")]
    assert [problem.split(":")[0] for problem in problems] == ["arm wide", "arm named", "arm large"]
    assert "the config asks for 99" in problems[0] and "asks for t5" in problems[1]
    assert "do not cover the size of their bucket" in problems[2]
    assert "3 of 4 arms do not fit the data" in last
    assert not ran and not (tmp_path / "runs").exists()


def test_data_that_are_elsewhere_are_not_compared(command, capsys):
    """Catches a dry run that needs the data."""
    assert sweep.main([*command, "--config.data.path=/nowhere", "--dry-run"]) == 0
    assert "to run" in capsys.readouterr().out
