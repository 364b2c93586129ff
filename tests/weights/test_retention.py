"""Which checkpoints stay, and how a command names one of them."""

import json
import math

import pytest

from imagen_jax.weights.checkpoint import CheckpointError, Checkpoints, load_params, opened
from imagen_jax.weights.retention import META, Retention, best_step
from tests.weights.states import make_state, save, shard

SETTINGS = dict(
    save_every=10, validate_every=5, keep=2, keep_every=0, keep_best=0, best_by="ema/x_error"
)


def write_measures(directory, values):
    """Step directories with these values of ema/x_error, and of ema/loss with the other sign."""
    for step, value in values.items():
        measured = {} if value is None else {"ema/x_error": value, "ema/loss": -value}
        document = {"format_version": 1, "step": step, "leaves": {}, "meta": {"measures": measured}}
        (directory / str(step)).mkdir()
        (directory / str(step) / META).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, [50, 60]),
        ({"keep_every": 20}, [20, 40, 50, 60]),
        ({"keep_best": 2}, [10, 30, 50, 60]),
        ({"keep": 1, "keep_best": 1, "best_by": "ema/loss"}, [40, 60]),
        ({"keep": 1, "keep_every": 30, "keep_best": 1}, [30, 60]),
        ({"keep": 9}, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_which_steps_stay(tmp_path, changed, kept):
    """Catches the worst kept instead of the best, a step without a measure that counts as best, and
    kinds that exclude each other.
    """
    steps = [10, 20, 30, 40, 50, 60]
    write_measures(tmp_path, dict(zip(steps, (0.2, None, 0.1, 0.4, 0.3, None), strict=True)))
    deleted = Retention.of(SETTINGS | changed).to_delete(steps, tmp_path)
    assert [step for step in steps if step not in deleted] == kept


def test_a_value_that_is_not_finite_is_not_the_best(tmp_path):
    """Catches NaN sorted before all numbers."""
    write_measures(tmp_path, {10: 0.5, 20: math.nan, 30: 0.7})
    retention = Retention.of(SETTINGS | {"keep": 1, "keep_best": 1})
    assert retention.to_delete([10, 20, 30], tmp_path) == [20]
    assert best_step(tmp_path) == 10


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep_every": 15}, "train.keep_every=15 is not a multiple of train.save_every=10"),
        ({"keep_best": 1, "validate_every": 0}, "train.keep_best needs a validation at every"),
        ({"keep_best": 1, "validate_every": 4}, "must be a multiple of train.validate_every=4"),
        ({"keep": 0}, "keep=0 would delete every checkpoint"),
    ],
)
def test_settings_without_effect_are_refused(changed, message):
    """Catches a permanent checkpoint, or a best one, that never comes."""
    with pytest.raises(ValueError, match=message):
        Retention.of(SETTINGS | changed)


def test_best_and_permanent_ones_survive_saves(tmp_path):
    """Catches retention that is computed and not applied, or forgotten after a restart."""
    directory = tmp_path / "run" / "checkpoints"
    retention = Retention(keep=1, keep_every=40, keep_best=1)
    for step, error in ((10, 0.3), (20, 0.1), (30, 0.2), (40, 0.5), (50, 0.4)):
        checkpoints = Checkpoints(directory, retention)  # a new one, as after a restart
        state, _ = shard(make_state(step))
        meta = {"measures": {"ema/x_error": error}, "config": {"train": {"best_by": "ema/x_error"}}}
        checkpoints.save(step, state, meta)
        checkpoints.wait()
    assert checkpoints.steps() == [20, 40, 50]
    run = tmp_path / "run"
    assert load_params(f"{run}@best")[1]["step"] == 20
    assert load_params(f"{run}@40")[1]["step"] == 40
    assert load_params(f"{directory}@40")[1]["step"] == 40
    assert load_params(run)[1]["step"] == 50
    with opened(f"{run}@best") as path:
        assert path == directory / "20"


def test_a_step_that_does_not_exist_is_named(tmp_path):
    """Catches another step taken instead, and a best one of a run without validations."""
    save(Checkpoints(tmp_path / "run" / "checkpoints", Retention(2)), 10)
    with pytest.raises(CheckpointError, match="run has no checkpoint of step 11; its steps are 10"):
        load_params(f"{tmp_path / 'run'}@11")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* has a validation measure"):
        load_params(f"{tmp_path / 'run'}@best")


def test_a_directory_with_such_a_name_is_itself(tmp_path):
    """Catches a workdir called run@2 taken for step 2 of run."""
    save(Checkpoints(tmp_path / "run@2" / "checkpoints", Retention(2)), 10)
    assert load_params(tmp_path / "run@2")[1]["step"] == 10
