"""Fast checkpoints: exact, verified, used only if every process holds the same save."""

import numpy as np
import pytest

from imagen_jax.weights import fast_checkpoints
from imagen_jax.weights.fast_checkpoints import FastCheckpoints
from tests.weights.states import assert_equal, flip_bit, make_state, shard

META = {"config": {"a": [1, 2]}, "unlogged": [{"loss": 0.1}]}


def written(directory, *steps, run="run"):
    _, abstract = shard(make_state(0), devices=4)
    with FastCheckpoints(directory, run, abstract) as fast:
        for step in steps:
            fast.save(step, shard(make_state(step), devices=4)[0], META)
            fast._writing.result()
    return fast, abstract


def test_the_newest_state_comes_back_exactly(tmp_path):
    """Catches shards put in the wrong place, a lost dtype, and more saves kept than two."""
    fast, abstract = written(tmp_path, 10, 20, 30)
    assert fast.newest() == 30
    state, meta = fast.restore(30, abstract)
    assert_equal(state, shard(make_state(30), devices=4)[0])
    assert meta == META
    own = tmp_path / "run" / "process_0"
    assert sorted(path.name for path in own.iterdir()) == ["20", "30"]


def test_a_run_that_has_ended_leaves_none(tmp_path):
    """Catches memory of the host that stays full after the run."""
    (tmp_path / "other").mkdir()
    written(tmp_path, 10, 20)[0].clear()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("name", ["shards.safetensors", "meta.json", "SHA256SUMS"])
def test_damage_falls_back_to_the_save_before(tmp_path, name, caplog):
    """Catches a save that was cut short, or changed since, and is restored."""
    fast, _ = written(tmp_path, 10, 20)
    flip_bit(tmp_path / "run" / "process_0" / "20" / name, np.random.default_rng(0))
    assert fast.newest() == 10
    assert "process_0/20 is not used" in caplog.text
    assert not (tmp_path / "run" / "process_0" / "20").exists()


def test_an_unfinished_save_does_not_count(tmp_path):
    """Catches a kill before SHA256SUMS."""
    fast, _ = written(tmp_path, 10, 20)
    (tmp_path / "run" / "process_0" / "20" / "SHA256SUMS").unlink()
    assert fast.newest() == 10


def test_another_run_or_mesh_has_none(tmp_path):
    """Catches the state of an earlier run in the same workdir, and shards of another mesh."""
    written(tmp_path, 10)
    _, abstract = shard(make_state(0), devices=4)
    assert FastCheckpoints(tmp_path, "other", abstract).newest() is None
    _, whole = shard(make_state(0), devices=1)
    assert FastCheckpoints(tmp_path, "run", whole).newest() is None


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([{"10": "a", "20": "b"}, {"10": "a", "20": "b"}], 20),
        ([{"10": "a", "20": "b"}, {"10": "a"}], 10),
        ([{"10": "a", "20": "b"}, {"20": "c", "10": "a"}], 10),
        ([{"10": "a"}, {}], None),
        ([{"10": "a"}, {"20": "b"}], None),
    ],
)
def test_all_processes_need_the_same_save(tmp_path, monkeypatch, others, expected):
    """Catches the newest step of one process, and saves of one step from two attempts mixed."""
    fast, _ = written(tmp_path)
    gathered = [fast_checkpoints.json.dumps(one) for one in others]
    monkeypatch.setattr(fast_checkpoints.agreement, "gather", lambda text: gathered)
    assert fast.newest() == expected


def test_a_busy_process_makes_all_leave_a_save_out(tmp_path, monkeypatch, caplog):
    """Catches saves that pile up in memory, or that some processes make and others do not."""
    fast, _ = written(tmp_path)
    monkeypatch.setattr(fast_checkpoints.agreement, "gather", lambda text: [text, "busy"])
    fast.save(10, shard(make_state(10))[0], META)
    assert "fast checkpoint 10 left out" in caplog.text and fast._writing is None


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    """Catches an error in the background that nobody sees, or that ends the run."""
    _, abstract = written(tmp_path, 10)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fast_checkpoints, "save_file", full)
    with FastCheckpoints(tmp_path, "run", abstract) as again:
        again.save(20, shard(make_state(20), devices=4)[0], META)
    assert "20 was not saved: [Errno 28]" in caplog.text
    assert again.newest() == 10
