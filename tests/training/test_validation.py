"""Validation during training: its numbers, on any mesh and after a resume, and its warning."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import schema, sharding, train
from imagen_jax.data.example_text import read_stored
from imagen_jax.diffusion.density import UniformTime
from imagen_jax.distributed.watch import Watch
from imagen_jax.evals.evaluation import Evaluation, Probe
from imagen_jax.evals.measures import loss, x_error
from imagen_jax.evals.rows import Data, Settings
from imagen_jax.run_log import VALIDATION, read_metrics
from imagen_jax.stage import Stage, create_stage
from imagen_jax.text_inputs import text_inputs
from imagen_jax.training.start_flags import Start
from imagen_jax.training.state import TrainState
from imagen_jax.training.validation import Validation
from tests import tiny
from tests.data import synthetic

N = 10  # more than one batch of 8, so that the last batch is padded


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Image i is blue by i and has captions 2i and 2i + 1; none is held out."""
    root = tmp_path_factory.mktemp("prepared") / "data"
    return synthetic.write_prepared(root, images=N, size=32, heldout=0)


class Known(Stage):
    """Error = bias + 0.5 / 0.25 for a wrong / no text + 0.125 / 0.0625 for a wrong / grey low-res.

    inputs: those that it uses.
    """

    name, image_size, lowres_size, crop_size, reads_text = "known", 8, 4, 0, True
    density, sampling = UniformTime("cosine"), {}

    def __init__(self, *inputs):
        object.__setattr__(self, "inputs", inputs)

    def draw(self, key, b, size):
        return {"u": jax.random.uniform(key, (b,)), "lowres_level": jnp.zeros(b)}

    def batch_shapes(self, b, size):
        return dict.fromkeys(("image", "text", "text_mask", "lowres"))

    def x_error(self, params, batch, draws, logsnr):
        blue, low = batch["image"][:, 0, 0, 2], batch["lowres"][:, 0, 0, 2]
        text = batch["text"][:, 0, 0].astype(jnp.float32)
        null = (text == 0) & (batch["text_mask"].sum(1) == 1)
        foreign = jnp.where(text == 2 * blue, 0.0, jnp.where(null, 0.25, 0.5))
        error = jnp.broadcast_to(params["bias"], blue.shape)
        if "text" in self.inputs:
            error += foreign
        if "lowres" in self.inputs:
            error += jnp.where(low == blue, 0.0, jnp.where(low == 128, 0.0625, 0.125))
        return error

    def per_sample_loss(self, params, batch, draws):
        return 10 * params["bias"] + draws["u"]


def validation(data, stage, mesh=None, name="sr_256", **changes):
    config = tiny.config(name, data__path=str(data), train__validate_rows=N, **changes)
    reading = read_stored(text_inputs(config))
    return Validation(config, stage, mesh or sharding.batch_mesh(jax.devices()), reading)


def state(params, ema):
    return TrainState(jnp.int32(0), params, ema, (), jnp.int32(-1))


def biased(ema=1.0, params=2.0):
    return state({"bias": jnp.float32(params)}, {"bias": jnp.float32(ema)})


def test_the_numbers_are_those_of_both_weights_and_all_conditions(data, caplog):
    """Catches weights or conditions exchanged, a loss in another unit, a padding row counted, a
    wrong standard error, and a warning about inputs that are used.
    """
    with caplog.at_level(logging.WARNING):
        run = validation(data, Known("text", "lowres"))
        row = run.run(biased(), 5)
    assert [record.getMessage() for record in caplog.records] == [
        f"{data} has no held-out images; validating on training images"
    ]
    for which, bias in (("ema", 1.0), ("params", 2.0)):
        value = lambda name: row[f"train/{which}/{name}"]
        assert value("x_error") == value("x_error/logsnr_-14_-12") == bias
        assert abs(value("loss") - 10 * bias - 0.5) < 0.05 and value("loss_se") > 0
        # The caption of image 0, which one row gets, is the null text.
        assert value("x_error_rise/text_shuffled") == pytest.approx(0.475)
        assert value("x_error_rise/lowres_shuffled") == 0.125
        assert value("x_error_rise/lowres_null") == 0.0625
        null = np.array([0.0] + (N - 1) * [0.25])
        assert value("x_error_rise/text_null") == pytest.approx(null.mean())
        expected = null.std(ddof=1) / N**0.5
        assert value("x_error_rise/text_null_se") == pytest.approx(expected)
    assert len(row) == 2 * (2 + 2 + 14 + 4 * 2)
    assert run.run(biased(), 5) == row


@pytest.mark.parametrize("inputs, ignored", [((), ("text", "lowres")), (("text",), ("lowres",))])
def test_a_stage_that_ignores_an_input_is_named_after_the_warm_up(data, caplog, inputs, ignored):
    """Catches an effect where there is none, a warning for each input, each of the weights or
    before the first steps can have had an effect, and one that names the wrong input.
    """
    run = validation(data, Known(*inputs), optim__warmup=4)
    for step, lines in ((4, 0), (5, 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            row = run.run(biased(), step)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == lines and not any("\n" in line for line in said)
    for name in ignored:
        assert row[f"train/params/x_error_rise/{name}_shuffled"] == 0.0
        assert f"the stage ignores its {name} (" in said[0] and ": check that" in said[0]
    assert said[0].startswith("validation of step 5: ")
    assert said[0].count("the stage ignores its") == len(ignored)


def test_equal_captions_leave_the_null_control(tmp_path, caplog):
    """Catches a run that fails because held-out rows cannot be shuffled, or warns no more."""
    data = synthetic.write_prepared(tmp_path / "data", images=4, size=32)
    with caplog.at_level(logging.WARNING):
        row = validation(data, Known("lowres")).run(biased(), 5)
    assert "heldout/ema/x_error_rise/text_null" in row
    assert "heldout/ema/x_error_rise/text_shuffled" not in row
    said = [record.getMessage() for record in caplog.records]
    assert "3 rows cannot be shuffled" in said[0]
    assert "ignores its text (heldout/params/x_error_rise/text_null is 0" in said[1]


@pytest.mark.slow
def test_a_sharded_state_has_the_numbers_of_one_device_and_of_evaluate(data):
    """Catches rows or noise that depend on the mesh, a stage of another mesh, and rows, noise or
    bins that are not those of evaluate.
    """
    changes = tiny.ONE_LEVEL_UNET
    config = tiny.config("base_64", **changes, data__path=str(data))
    params = tiny.random_params(create_stage(config).init)
    sizes = {"data": 2, "fsdp": 4, "model": 1, "spatial": 1}
    rows = []
    for mesh in (sharding.make_mesh(sizes), sharding.batch_mesh(jax.devices()[:1])):
        shardings = sharding.tree_shardings(params, mesh, [(".*", "fsdp")], 64)
        placed = jax.device_put(params, shardings)
        assert mesh.size == 1 or any(not s.is_fully_replicated for s in jax.tree.leaves(shardings))
        run = validation(data, create_stage(config, mesh), mesh, "base_64", **changes)
        with jax.transfer_guard_device_to_device("disallow"):
            rows.append(run.run(state(placed, placed), 1))
    assert rows[0].keys() == rows[1].keys()
    for name, value in rows[1].items():
        np.testing.assert_allclose(rows[0][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    settings = Settings(
        rows=N, samples=1, gallery=1, bins=10, batch_size=8, seed=0, sampling=config["sampling"]
    )
    stage = create_stage(config)
    e = Evaluation(Probe(stage, settings), Data(config["data"], settings), params)
    for name, measure in {"loss": loss, "x_error": x_error}.items():
        overall = measure.measure(e)["train"]["overall"]
        assert rows[0][f"train/params/{name}"] == pytest.approx(overall["mean"], rel=1e-5)
        assert rows[0][f"train/params/{name}_se"] == pytest.approx(overall["se"], rel=1e-5)


@pytest.mark.slow
def test_a_resume_writes_each_validation_once_and_alike(data, tmp_path, monkeypatch):
    """Catches a validation that depends on anything but the state, a step validated twice or never
    after a kill between its validation and its save, and a last step without validation.
    """
    one_device = sharding.batch_mesh(jax.devices()[:1])  # compiles faster
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: one_device)
    config = tiny.config(
        "base_64",
        **tiny.ONE_LEVEL_UNET,
        data__path=str(data),
        train__validate_every=2,
        train__validate_rows=4,
        train__steps=5,
        train__save_every=3,
    )
    trained = lambda: train.train(
        schema.complete(config, new=True), tmp_path / "run", (0, 0), 0.0, Start(), Watch(100.0)
    )
    assert trained() == 0
    record = tmp_path / "run" / VALIDATION
    straight = record.read_bytes()
    rows = read_metrics(tmp_path / "run", VALIDATION)
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert len({row["train/ema/x_error"] for row in rows}) == 3
    assert all(row["train/ema/loss"] != row["train/params/loss"] for row in rows)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "5")
    assert trained() == 0
    assert record.read_bytes() == straight
