"""Runs on several prepared directories: setup, resume, validation and sample grids."""

import logging
import math
import tempfile

import jax
import numpy as np
import pytest

from imagen_jax import schema, sharding, train
from imagen_jax.data import pipeline
from imagen_jax.data.example_text import read_stored
from imagen_jax.distributed.watch import Watch
from imagen_jax.text_inputs import text_inputs
from imagen_jax.training import resume, validation
from imagen_jax.training.run import Run
from imagen_jax.training.sample_grids import SampleGrid
from imagen_jax.training.start_flags import Start
from imagen_jax.training.validation import Validation
from imagen_jax.weights.checkpoint import Checkpoints
from imagen_jax.weights.retention import Retention
from tests import tiny
from tests.data import synthetic
from tests.training.test_validation import Known, N, biased

SIZE = 32


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three sets: with held-out images, without, and with captions of another text encoder."""
    root = tmp_path_factory.mktemp("sets")
    write = synthetic.write_prepared
    return (
        write(root / "one", images=4, size=SIZE, heldout=6),
        write(root / "two", images=8, size=SIZE, heldout=0),
        write(root / "other", images=2, size=SIZE, encoder={"weights_sha256": "ab"}),
        write(root / "three", images=8, size=SIZE, heldout=3),
    )


def config(*mixture, name="sr_256", **changes):
    made = tiny.config(name, **changes)
    made["data"]["mixture"] = [[str(path), weight] for path, weight in mixture]
    return schema.complete(made, new=True)


def reading(made):
    return read_stored(text_inputs(made))


def test_a_run_on_a_mixture(paths, tmp_path, monkeypatch, caplog):
    """Catches features of two encoders in one run, an identity that does not name the data, and
    buckets whose images are not counted before training.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one, two, other, _ = paths
    with pytest.raises(
        ValueError, match=f"{one} and {other} in data.mixture do not share"
    ) as error:
        Run.create(config((one, 1.0), (other, 1.0)))
    assert "\n" not in str(error.value)
    made = config((one, 1.0), (two, 3.0))
    made["data"] |= {"view": "random_crop", "view_scale": [0.5, 1.0], "image_size": 16}
    with caplog.at_level(logging.INFO):
        run = Run.create(made)
    told = [record.getMessage() for record in caplog.records]
    assert told[:3] == [
        f"25 % of the examples from {one}: 4 training images, 6 held out, 8 captions (features in"
        " bfloat16)",
        f"75 % of the examples from {two}: 8 training images, 0 held out, 16 captions (features in"
        " bfloat16)",
        "view of the images: random_crop of 0.5 to 1, not mirrored",
    ]
    assert run.meta["manifest_hash"] == pipeline.identity(made["data"])["manifest_hash"]
    assert len(run.meta["mixture_hashes"]) == 2 and "bucket" not in caplog.text
    batches = run.batches(0)
    assert set(next(batches)["set"].tolist()) == {0, 1}
    batches.close()


def test_a_resume_may_move_the_sets_of_a_mixture(paths):
    """Catches a mixture with other weights or another order that resumes, and a moved directory
    that is refused.
    """
    meta = lambda *mixture: {"config": config(*mixture), "manifest_hash": "a"}
    saved = meta(("one", 1.0), ("two", 3.0))
    (line,) = resume.check(saved, meta(("new/one", 1.0), ("two", 3.0)))
    assert line.startswith("data.mixture: (('one', 1.0), ('two', 3.0)) -> (('new/one', 1.0)")
    for changed in (
        [("one", 1.0), ("two", 2.0)],
        [("two", 3.0), ("one", 1.0)],
        [("one", 1.0)],
        [],
    ):
        with pytest.raises(ValueError, match="data.mixture"):
            resume.check(saved, meta(*changed))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_resume_is_refused_before_the_setup(tmp_path, monkeypatch, damaged):
    """Catches minutes of compilation before a resume with other weights is refused, and a damaged
    checkpoint that is an error before an older one is tried.
    """

    class Begun(Exception):
        pass

    def create(*args, **more):
        raise Begun

    monkeypatch.setattr(Run, "create", create)
    begin = lambda *mixture: train.train(
        config(*mixture), tmp_path, (0, 0), 0.0, Start(), Watch(100.0)
    )
    with pytest.raises(Begun):  # no checkpoint
        begin(("one", 1.0), ("two", 2.0))
    with Checkpoints(tmp_path / "checkpoints", Retention(1)) as checkpoints:
        checkpoints.save(3, {"a": np.ones(2)}, {"config": config(("one", 1.0), ("two", 3.0))})
    if damaged:
        (tmp_path / "checkpoints/3/meta.json").write_text("{")
    with pytest.raises(Begun):
        begin(("moved/one", 1.0), ("two", 3.0))
    with pytest.raises(Begun if damaged else ValueError) as error:
        begin(("one", 1.0), ("two", 2.0))
    assert damaged or "other settings" in str(error.value)


def test_validation_has_the_numbers_of_each_set_and_their_mean(paths, caplog):
    """Catches a mean by rows, sets exchanged, the error of a sum, and numbers of a set without
    held-out rows.
    """
    one, two, _, three = paths
    made = config((one, 1.0), (two, 5.0), (three, 3.0))
    made["train"]["validate_rows"] = N
    mesh = sharding.batch_mesh(jax.devices()[:1])
    with caplog.at_level(logging.WARNING):
        run = Validation(made, Known(), mesh, reading(made))
        row = run.run(biased(), 0)
    warned = [record.getMessage() for record in caplog.records]
    assert f"{two} has no held-out images; validating without it" in warned
    names = {name.split("/")[0] for name in row}
    assert names == {"heldout", "one", "three"}
    loss = {name: row[f"{name}/heldout/ema/loss"] for name in ("one", "three")}
    assert loss["one"] != loss["three"]
    assert row["heldout/ema/loss"] == pytest.approx(0.25 * loss["one"] + 0.75 * loss["three"])
    errors = [row[f"{name}/heldout/ema/loss_se"] for name in ("one", "three")]
    wanted = math.hypot(0.25 * errors[0], 0.75 * errors[1])
    assert row["heldout/ema/loss_se"] == pytest.approx(wanted)
    alone = tiny.config("sr_256", data__path=str(three), train__validate_rows=N)
    single = Validation(alone, Known(), mesh, reading(alone)).run(biased(), 0)
    assert {name: row[f"three/{name}"] for name in single} == single


def test_training_rows_validate_a_mixture_without_held_out_rows(paths, caplog):
    """Catches a run that fails, or mixes training rows into held-out numbers, in silence."""
    two = paths[1]
    made = config((two, 1.0))
    split, rows = validation.read_sets(made["data"], 3, reading(made))
    assert split == "train" and list(rows) == ["two"] and len(rows["two"]) == 3
    assert f"{two} has no held-out images; validating on training images" in caplog.text


def test_a_number_that_a_set_lacks_has_no_mean():
    """Catches a mean over the sets that happen to have a number."""
    measured = {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0}}
    row = validation.joined(measured, {"a": 1.0, "b": 1.0, "c": 9.0})
    assert row == {"x": 2.0, "a/x": 1.0, "a/y": 2.0, "b/x": 3.0}
    assert validation.joined({"": {"x": 1.0}}, {"": 1.0}) == {"x": 1.0}


def test_a_sample_grid_shows_all_sets(paths, monkeypatch):
    """Catches a grid of the first set, and one with more rows than the field says."""
    one, two, _, three = paths
    made = config((one, 1.0), (two, 5.0), (three, 3.0), train__sample_rows=5)
    monkeypatch.setattr("imagen_jax.training.sample_grids.sample_program", lambda *args: args[2])
    stage = Known()
    object.__setattr__(stage, "crop_size", 0)
    grid = SampleGrid(made, stage, sharding.batch_mesh(jax.devices()[:1]), reading(made))
    # Held-out images are blue by 100 and their row, others by their row.
    assert grid._batch["image"][:, 0, 0, 2].tolist() == [100, 0, 7, 100, 102]
    assert grid._sample == 5
    np.testing.assert_array_equal(grid._batch["index"], [0, 0, 7, 0, 2])
