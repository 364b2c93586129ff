"""Training on images of several sizes: one compiled step for each, chosen by the batch."""

import json
import shutil

import jax
import numpy as np
import pytest

from imagen_jax import schema, sharding, train
from imagen_jax.distributed.watch import Watch
from imagen_jax.run_log import read_metrics
from imagen_jax.stage import create_stage
from imagen_jax.training.run import Run
from imagen_jax.training.start_flags import Start
from imagen_jax.training.step import forward_flops
from imagen_jax.weights.checkpoint import load_params
from tests import tiny
from tests.data import synthetic

# The last one of a stage has no images.
BUCKETS = {"base_64": ((8, 8), (4, 12), (2, 30)), "sr_256": ((24, 8), (16, 16), (4, 40))}
ONE_LEVEL = {"base_64": tiny.ONE_LEVEL_UNET, "sr_256": tiny.ONE_LEVEL_FIELDS}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of two aspect ratios; none has that of a third bucket."""
    root = tmp_path_factory.mktemp("data") / "data"
    return synthetic.write_prepared(root, images=16, size=32, shapes=[(16, 48), (32, 32), (48, 16)])


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """One device compiles faster."""
    mesh = sharding.batch_mesh(jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda sizes: mesh)
        yield


@pytest.fixture(scope="module")
def run(data, one_device):
    return Run.create(config_of("base_64", data))


def config_of(name, data, **changes):
    changes = ONE_LEVEL[name] | {"data__path": str(data), "data__buckets": BUCKETS[name]} | changes
    config = tiny.config(name, train__steps=4, train__save_every=2, train__log_every=1, **changes)
    config["text"]["dim"] = synthetic.DIM
    return schema.complete(config, new=True)


def trained(config, workdir, **more):
    return train.train(config, workdir, (0, 0), 0.0, Start(), Watch(100.0), **more)


@pytest.fixture
def sizes(monkeypatch):
    """The size of the images of each step, as the trainer chooses its program."""
    noted, bucket_of = [], Run.bucket_of
    note = lambda run, batch: noted.append(bucket_of(run, batch)) or noted[-1]
    monkeypatch.setattr(Run, "bucket_of", note)
    return noted


@pytest.mark.slow
@pytest.mark.parametrize("name", BUCKETS)
def test_a_run_trains_on_both_sizes_and_resumes(name, data, tmp_path, caplog, sizes):
    """Catches a step compiled for one size, or for a bucket without images, height and width
    exchanged, a low-res image that keeps the square's size, and a resume with other batches.
    """
    caplog.set_level("INFO")
    assert trained(config_of(name, data), tmp_path) == 0
    assert len(sizes) == 4 and set(sizes) == set(BUCKETS[name][:2])
    for height, width in BUCKETS[name]:
        said = f"step compiled for images of {height}x{width} in" in caplog.text
        assert said == ((height, width) in sizes)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    whole, _ = load_params(str(tmp_path), "params")
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    assert trained(config_of(name, data), tmp_path) == 0
    assert sizes[4:] == sizes[2:4]
    assert [row["loss"] for row in read_metrics(tmp_path)] == [row["loss"] for row in rows]
    resumed, _ = load_params(str(tmp_path), "params")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


@pytest.mark.slow
def test_overfit_trains_on_the_first_bucket(data, tmp_path, sizes):
    """Catches a self-test that has no program for its only batch, or trains on other buckets."""
    config = config_of("base_64", data)
    trained(train.self_test(config, 4), tmp_path, overfit=4)
    assert len(sizes) == 4 and len(set(sizes)) == 1
    batches = Run.create(config).batches(0)
    assert next(batches)["image"].shape[1:3] == sizes[0]
    batches.close()


def test_images_too_small_for_validation_are_named_before_compiling(data):
    """Catches an error after minutes of compiling; the images are 16 pixels high, for 8 x 8."""
    config = config_of("base_64", data, data__image_size=24, data__buckets=((12, 36),))
    for name in ("sample_every", "validate_every"):
        off = {"sample_every": 0, "validate_every": 0}
        made = config | {"train": config["train"] | off | {name: 2}}
        with pytest.raises(
            ValueError, match="size is 24: prepare with .*, or set train.validate_every = 0 and"
        ) as error:
            Run.create(made)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="do not cover the size of their bucket"):
        Run.create(config | {"train": config["train"] | off})


def test_a_step_is_traced_for_each_size(run):
    """Catches noise, or a low-res image, of the square's size in the step of another size."""
    for size in BUCKETS["base_64"]:
        state, metrics = run.program.step.trace(
            run.program.abstract, run.program.batches[size]
        ).out_info
        assert run.program.batches[size]["image"].shape == (8, *size, 3)
        assert metrics["loss"].shape == () and state.step.shape == ()
    assert run.program.batch is run.program.batches[8, 8]


def test_the_rate_counts_the_flops_of_the_steps(data, run):
    """Catches an MFU by the FLOPs of the square, or of all buckets alike."""
    stage = create_stage(config_of("base_64", data))
    small, large = (3 * forward_flops(stage, size) for size in ((4, 12), (8, 8)))
    assert small < 0.9 * large
    times = {"time/images_per_s": 10.0}
    rates = run.rates(times, [(8, 8), (4, 12), (4, 12), (4, 12)])
    expected = 10.0 * (large + 3 * small) / 4
    assert rates["time/model_tflops_per_s"] == pytest.approx(expected / 1e12)
    assert rates["time/mfu"] == pytest.approx(expected / run.peak_flops)
    assert run.program.stage.largest_bucket == (8, 8)


def test_a_batch_of_another_size_is_named(run):
    """Catches a KeyError, or an image that the trainer resizes."""
    batch = {"image": np.zeros((8, 12, 4, 3), np.uint8)}
    with pytest.raises(ValueError, match="images of 12x4, .* compiled for 8x8, 4x12: make data.b"):
        run.bucket_of(batch)


def test_a_stage_without_buckets_has_the_shapes_of_the_square(data):
    """Catches a bucket of another size in a config that has none, also with crops."""
    for name, sides in {"base_64": (8, None), "sr_256": (16, 8), "sr_1024": (16, 8)}.items():
        config = tiny.config(name)
        stage = create_stage(schema.complete(config, new=True))
        side, low = sides
        assert stage.buckets == ((side, side),)
        shapes = stage.batch_shapes(2, (side, side))
        assert shapes["image"][0] == (2, side, side, 3)
        assert shapes.get("lowres", [None])[0] == (low and (2, low, low, 3))
        draws = jax.eval_shape(lambda: stage.draw(jax.random.key(0), 2, (side, side)))
        assert draws["eps"].shape == (2, side, side, 3)


def test_a_saved_config_keeps_its_buckets():
    """Catches lists, as JSON has them, that are no dictionary keys."""
    config = json.loads(json.dumps(tiny.config("base_64", data__buckets=((4, 12), (8, 8)))))
    assert create_stage(config).buckets == ((4, 12), (8, 8))
