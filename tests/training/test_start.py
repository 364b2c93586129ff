"""What a new run starts from: a part of other weights, or the whole state of another run."""

import json

import numpy as np
import pytest

from imagen_jax import train
from imagen_jax.distributed.watch import Watch
from imagen_jax.run_log import read_metrics
from imagen_jax.training.start_flags import Start
from imagen_jax.weights import checkpoint, leaves
from tests import tiny
from tests.data import synthetic

pytestmark = pytest.mark.slow
PLAIN = dict(profile=(0, 0), minutes=0.0, start=Start(), watch=Watch(100.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return synthetic.write_prepared(folder / "data", images=24, size=32)


def config(data, steps, **changes):
    made = tiny.config(data__path=str(data), **tiny.ONE_LEVEL_UNET, **changes)
    made["train"] |= dict(steps=steps, log_every=1, save_every=4, sample_every=0, keep=9)
    return made


def run(workdir, config, **flags):
    assert train.train(config, workdir, **PLAIN | {"start": Start(**flags)}) == 0
    return workdir


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory):
    return run(tmp_path_factory.mktemp("parent") / "run", config(data, 12))


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_metrics(workdir)}


def params(workdir, which="params"):
    return leaves.flatten(checkpoint.load_params(workdir, which)[0])


def test_a_fork_goes_on_where_its_parent_was(parent, data, tmp_path):
    """Catches an optimizer or EMA that starts anew, another batch, and a parent that is changed."""
    before = sorted(path.name for path in (parent / "checkpoints").iterdir())
    child = run(tmp_path / "child", config(data, 12), fork=f"{parent}@4")
    assert losses(child) == {step: loss for step, loss in losses(parent).items() if step > 4}
    for which in ("params", "ema"):
        ours, theirs = params(child, which), params(parent, which)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    meta = checkpoint.load_params(child)[1]
    seen = {"examples": 4 * config(data, 12)["data"]["batch_size"]}
    expected = {"path": f"{parent}@4", "step": 4, "run": "base_tiny", "origin": {}} | seen
    assert meta["fork"] == expected
    assert json.loads((child / "origin.json").read_text()) == {"fork": meta["fork"]}
    assert sorted(path.name for path in (parent / "checkpoints").iterdir()) == before


def test_a_fork_may_change_any_field_and_resumes(parent, data, tmp_path):
    """Catches a fork that is refused as a resume with other settings, or runs with the old ones."""
    child = config(data, 10, optim__lr=0.01)
    run(tmp_path / "child", child, fork=str(parent / "checkpoints") + "@8")
    child["train"]["steps"] = 12
    run(tmp_path / "child", child)  # a resume needs no --fork
    rows = read_metrics(tmp_path / "child")
    assert [row["step"] for row in rows] == [9, 10, 11, 12]
    assert {row["optim/lr"] for row in rows} == {np.float32(0.01)}
    with pytest.raises(ValueError, match=f"did not start from --fork {parent}@4"):
        run(tmp_path / "child", child, fork=f"{parent}@4")
    with pytest.raises(ValueError, match="did not start from --fork"):
        run(parent, config(data, 16), fork=f"{tmp_path / 'child'}@8")


def test_a_fork_of_another_model_is_refused(parent, data, tmp_path):
    """Catches a state of which a part is silently new."""
    with pytest.raises(ValueError, match="--fork needs the same model, optimizer and EMAs: .*leaf"):
        run(tmp_path / "child", config(data, 12, optim__ema_tracks=(0.5,)), fork=f"{parent}@4")
    assert not (tmp_path / "child" / "checkpoints").exists()


def test_a_fork_of_the_newest_step(parent, data, tmp_path):
    """Catches WORKDIR without a step that is refused, and a run that has nothing to do."""
    child = run(tmp_path / "child", config(data, 13), fork=str(parent))
    assert list(losses(child)) == [13]


def test_a_part_of_the_weights(parent, data, tmp_path, caplog):
    """Catches a pattern that takes everything or nothing, an EMA without the weights, and lists
    that do not name what was done.
    """
    caplog.set_level("INFO")
    new = config(data, 1)
    child = run(tmp_path / "child", new, init_from=str(parent), init_part="^down_")
    fresh = run(tmp_path / "fresh", new)
    assert new["optim"]["warmup"] == 1  # so the first step has a rate of zero
    ours, theirs, random = params(child), params(parent, "ema"), params(fresh)
    averaged = params(child, "ema")
    taken = [name for name in theirs if name.startswith("down_")]
    assert taken and len(taken) < len(theirs)
    for name in theirs:
        expected = theirs if name in taken else random
        np.testing.assert_array_equal(ours[name], expected[name])
        np.testing.assert_array_equal(averaged[name], expected[name])
    record = json.loads((child / "origin.json").read_text())["init_from"]
    assert record["taken"] == taken and record["part"] == "^down_"
    others = sorted(set(theirs) - set(taken))
    assert record["skipped"] == record["initialised"] == others
    assert f"taken: {len(taken)} weights: down_0/" in caplog.text


def test_parts_that_do_not_fit(parent, data, tmp_path):
    """Catches a part that is left out without a word."""
    wide = config(data, 1, model__channels=32)
    for pattern, message in {
        "nothing": "matches none of the",
        "^down_": r"takes \d+ weights that do not fit the model, down_0/.* the model has",
    }.items():
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "child", wide, init_from=str(parent), init_part=pattern)
    child = run(tmp_path / "child", config(data, 1), init_from=str(parent), init_part="^down_")
    with pytest.raises(ValueError, match="started with another --init_part"):
        run(child, config(data, 2), init_from=str(parent), init_part="^mid")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fork": "a", "init_from": "b"}, "--fork copies a whole state: omit --init_from"),
        ({"init_part": "x"}, "--init_part needs --init_from"),
        ({"init_from": "a", "init_part": "("}, "is not a regular expression"),
        ({"fork": "s3://a/b@4"}, "--fork s3://a/b@4 has the scheme s3://"),
    ],
)
def test_flags_that_exclude_each_other(flags, message):
    """Catches a flag without effect."""
    with pytest.raises(ValueError, match=message):
        Start(**flags)
