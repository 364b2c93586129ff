"""Memory of the train step and the sampler, from shapes, shardings and compiler messages."""

import jax
import pytest

from imagen_jax import sharding
from imagen_jax.data.example_text import read_stored
from imagen_jax.models import remat
from imagen_jax.planning import whole_step
from imagen_jax.planning.blocks import find_blocks
from imagen_jax.training import sample_grids
from imagen_jax.training.step import TrainProgram
from tests import tiny
from tests.planning.programs import program

OUT_OF_MEMORY = (
    (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (28.41G) exceeds available HBM (15.75G)."
    ),
    (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 28.41G of 15.75G hbm."
        " Exceeded hbm capacity by 12.66G."
    ),
)


@pytest.mark.slow
def test_parts_of_memory():
    """Catches a part that is as large on every mesh, and activations that ignore rows, accumulation
    or remat.
    """
    whole, split = (
        whole_step.state_parts(program(sizes=(8, 1, 1, 1))),
        whole_step.state_parts(program()),
    )
    for part in ("parameters", "EMA", "optimizer", "gradients"):
        assert 0.25 <= split[part] / whole[part] < 0.4
    assert split["batch"] == whole["batch"] and split["activations"] == whole["activations"] > 0
    with_tracks = whole_step.state_parts(program(**{"optim.ema_tracks": [0.9, 0.5]}))
    assert with_tracks == split | {"EMA tracks": 2 * split["EMA"]}
    stored = {
        kind: whole_step.activation_bytes(program(**{"model.remat": kind})) for kind in remat.KINDS
    }
    assert stored["none"] > stored["matrix"] > stored["block"]
    assert whole_step.activation_bytes(program(sizes=(2, 2, 1, 2))) == pytest.approx(
        stored["none"], rel=0.05
    )
    big = {"data.batch_size": 16}
    halves = whole_step.activation_bytes(program(**big | {"optim.accumulation": 2}))
    assert (
        halves == pytest.approx(stored["none"], rel=0.01)
        and whole_step.activation_bytes(program(**big)) > 1.5 * stored["none"]
    )


@pytest.mark.parametrize("name", [pytest.param("base_64", marks=pytest.mark.slow), "sr_256"])
def test_the_sampler_is_the_one_that_training_runs(name, monkeypatch):
    """Catches the sampler of full images for a stage that trains on crops, a batch that is sharded
    like a training batch, and another number of rows than a sample grid has.
    """
    step, rows = program(name), 3
    monkeypatch.setattr(
        sample_grids,
        "evenly_spaced",
        lambda data, rows, _: tiny.batch(step.stage, rows) | {"index": [0] * rows},
    )
    config = tiny.config(name, train__sample_rows=rows, data__path="x")
    drawn = sample_grids.SampleGrid(config, step.stage, step.mesh, read_stored(()))
    fields = {
        field: jax.ShapeDtypeStruct(a.shape, a.dtype)
        for field, a in drawn._batch.items()
        if field not in ("image", "index")
    }
    assert (
        whole_step.lower_sampler(step, rows).as_text()
        == drawn._sample.lower(step.abstract.ema, fields).as_text()
    )


def test_full_images_have_the_stage_size():
    """Catches the memory of a crop's sampler reported for full images, which need more; and fewer
    images than the mesh has shards.
    """
    step = program("sr_1024", sizes=(2, 2, 1, 2))
    size = step.stage.image_size
    assert step.stage.train_size < size
    images, finite = whole_step.lower_whole_images(tiny.config("sr_1024"), step).out_info
    assert images.shape == (4, size, size, 3) and finite.shape == (4,)


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_memory_of_a_refused_program(message):
    """Catches the available memory read as the required memory, and other errors read as
    out-of-memory.
    """
    assert whole_step.needed_bytes(message) == int(28.41 * 2**30)
    assert whole_step.needed_bytes("INVALID_ARGUMENT: (28.41G) exceeds") is None


def test_the_bucket_with_the_most_pixels_is_planned():
    """Catches the memory of the square, or of the first bucket, for a run on larger images."""
    buckets = (4, 12), (8, 8), (8, 16)
    config = tiny.config("base_64", **tiny.ONE_LEVEL_UNET, data__buckets=buckets)
    square = tiny.config("base_64", **tiny.ONE_LEVEL_UNET)
    sizes = {"data": 1, "fsdp": 1, "model": 1, "spatial": 1}
    mesh = sharding.make_mesh(sizes, jax.devices()[:1])
    large, small = (TrainProgram.create(each, mesh) for each in (config, square))
    assert large.batch["image"].shape == (8, 8, 16, 3)
    assert whole_step.state_parts(large)["batch"] > whole_step.state_parts(small)["batch"]
    stored = [whole_step.activation_bytes(program) for program in (large, small)]
    assert 1.5 < stored[0] / stored[1] < 2.5
    args = {block.paths[0]: block.args for block in find_blocks(large.stage, 8)}
    assert args["stem"][0].shape == (8, 8, 16, 3)
