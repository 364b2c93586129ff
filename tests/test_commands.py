"""Commands in sequence: training with rows and grids, export, warm start, sampling, report."""

import json
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from imagen_jax import demo, sample, train
from imagen_jax.distributed.watch import Watch
from imagen_jax.picture_set import Requests
from imagen_jax.pictures import write_png
from imagen_jax.run_log import VARYING, read_metrics
from imagen_jax.training.run import Run
from imagen_jax.training.start_flags import Start
from imagen_jax.weights import checkpoint, exports
from tests import tiny, tiny_cascade
from tests.data import synthetic

PLAIN = dict(profile=(0, 0), minutes=0.0, start=Start(), watch=Watch(100.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic.write_prepared(
        tmp_path_factory.mktemp("prepared") / "data", images=24, size=32
    )


def config(data: Path, steps: int, **changes) -> dict:
    made = tiny.config(data__path=str(data), **tiny.ONE_LEVEL_UNET, **changes)
    made["train"] |= dict(steps=steps, log_every=4, save_every=100, sample_every=4, sample_rows=2)
    return made


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    assert train.train(config(data, 12), workdir, **PLAIN) == 0
    return workdir


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The workdir of a run that stops between two rows; named with a number like a checkpoint."""
    workdir = tmp_path_factory.mktemp("stopped") / "7"
    assert train.train(config(data, 6), workdir, **PLAIN) == 0
    return workdir


def logged(workdir: Path) -> dict[int, dict]:
    return {
        row["step"]: {name: value for name, value in row.items() if not name.startswith(VARYING)}
        for row in read_metrics(workdir)
    }


@pytest.mark.slow
def test_rows_are_those_of_an_undisturbed_run(data, straight, stopped):
    """Catches rows lost at a stop, a first row after a resume that averages too few steps, and a
    profile that ends the run.
    """
    assert list(logged(stopped)) == [4, 6]
    assert (
        train.train(config(data, 12), stopped, **PLAIN | {"profile": (5, 2)}) == 0
    )  # step 5 was before the stop
    assert list((stopped / "profile").rglob("*.xplane.pb"))
    assert list(logged(stopped)) == [4, 8, 12]
    assert logged(stopped) == logged(straight)
    batch = config(data, 12)["data"]["batch_size"]
    assert [row["examples"] for row in logged(stopped).values()] == [
        4 * batch,
        8 * batch,
        12 * batch,
    ]
    times = [row["time/unix_s"] for row in read_metrics(stopped)]
    assert times == sorted(times) and abs(times[-1] - time.time()) < 600
    with pytest.raises(ValueError, match="did not start from --init_from embedded:base_16"):
        train.train(config(data, 20), stopped, **PLAIN | {"start": Start("embedded:base_16")})
    assert (
        train.train(config(data, 9), stopped, **PLAIN) == 0
    )  # it has more steps than that: nothing to do
    assert logged(stopped) == logged(straight)


@pytest.mark.slow
def test_the_loop_makes_no_hidden_transfers(data, tmp_path, monkeypatch):
    """Catches a loop without the transfer guard: a copy at every step goes unnoticed."""
    monkeypatch.setattr(Run, "place", lambda run, batch: {n: batch[n] for n in run.program.batch})
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train.train(config(data, 1), tmp_path / "run", **PLAIN)


@pytest.mark.slow
def test_grids_follow_training(straight):
    """Catches a grid that is never drawn, or that does not change."""
    grids = [path.read_bytes() for path in sorted((straight / "images" / "ema").glob("*.png"))]
    assert len(grids) == 3 and len(set(grids)) == 3


@pytest.mark.slow
def test_a_warm_start_has_the_weights_and_says_so(data, straight, tmp_path):
    """Catches weights that are read and dropped, and a record without the warm start."""
    params, meta = checkpoint.load_params(straight)
    exports.export_params(params, meta, tmp_path / "base.safetensors")
    assert config(data, 1)["optim"]["warmup"] == 1  # so the first step has a rate of zero
    assert (
        train.train(
            config(data, 1),
            tmp_path / "warm",
            **PLAIN | {"start": Start(str(tmp_path / "base.safetensors"))},
        )
        == 0
    )
    exported, _ = checkpoint.load_params(tmp_path / "base.safetensors")
    warm, warm_meta = checkpoint.load_params(tmp_path / "warm")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            np.asarray(a, np.float32), np.asarray(b, np.float32)
        ),
        exported,
        warm,
    )
    assert warm_meta["init_from"]["step"] == 12 and warm_meta["init_from"]["path"] == str(
        tmp_path / "base.safetensors"
    )


@pytest.fixture(scope="module")
def cascade_config():
    made = json.loads(tiny._load("cascade", "demo"))
    for name in ("base", "sr_1", "sr_2"):
        made[name]["sampling"]["steps"] = 2
    return made | {"batch_size": 2}


@pytest.mark.slow
def test_a_picture_is_drawn_again_from_its_record(cascade_config, tmp_path, monkeypatch):
    """Catches a record that lacks an input of the picture, and other weights accepted."""
    out, again = tmp_path / "out", tmp_path / "again"
    assert (
        sample.sample(
            cascade_config, Requests(["a red apple", "a cat"], 1, 3), ["base", "sr_1"], "", out
        )
        == 0
    )
    record = json.loads((out / "0001_a_cat.json").read_text())
    redraw = lambda record, output: sample.sample(
        record["config"],
        Requests([record["prompt"]], 1, record["seed"]),
        record["stages"],
        record["image"],
        output,
        record,
    )
    assert redraw(record, again) == 0
    for kind in ("", "_16"):
        assert (again / f"0000_a_cat{kind}.png").read_bytes() == (
            out / f"0001_a_cat{kind}.png"
        ).read_bytes()
    assert (out / "0000_a_red_apple.png").read_bytes() != (out / "0001_a_cat.png").read_bytes()
    record["checkpoints"][1]["sha256"] = "0" * 64
    with pytest.raises(ValueError, match="embedded:sr_64 does not hold the weights of the picture"):
        redraw(record, again)


@pytest.mark.slow
def test_an_image_of_the_user_is_up_sampled(cascade_config, tmp_path):
    """Catches an --image that is ignored, and a record that does not identify it."""
    small = {"checkpoint": str(tiny_cascade.write(tmp_path)["sr_1"])}
    config = cascade_config | {"sr_1": cascade_config["sr_1"] | small}
    for name, value in {"dark": 0, "light": 255}.items():
        write_png(tmp_path / f"{name}.png", np.full((20, 30, 3), value, np.uint8))
        assert (
            sample.sample(
                config,
                Requests(["a cat"], 1, 3),
                ["sr_1"],
                str(tmp_path / f"{name}.png"),
                tmp_path / name,
            )
            == 0
        )
    assert (tmp_path / "dark" / "0000_a_cat.png").read_bytes() != (
        tmp_path / "light" / "0000_a_cat.png"
    ).read_bytes()
    record = json.loads((tmp_path / "dark" / "0000_a_cat.json").read_text())
    write_png(tmp_path / "dark.png", np.full((20, 30, 3), 9, np.uint8))
    with pytest.raises(ValueError, match="dark.png is not the image that was up-sampled"):
        sample.sample(
            record["config"],
            Requests(["a cat"], 1, 3),
            ["sr_1"],
            record["image"],
            tmp_path / "x",
            record,
        )


def test_a_cascade_ends_before_its_first_empty_stage(cascade_config):
    """Catches a missing stage that is skipped: its successor would get the wrong input."""
    from imagen_jax.cascade import load_cascade

    cut = cascade_config | {"sr_1": cascade_config["sr_1"] | {"checkpoint": ""}}
    assert [loaded.stage.image_size for loaded in load_cascade(cut)] == [16]
    with pytest.raises(ValueError, match="stage sr_1 has no checkpoint"):
        load_cascade(cut, ["sr_1", "sr_2"])
    with pytest.raises(
        ValueError, match="embedded:sr_64 is a super-resolution stage, but base needs a base"
    ):
        load_cascade(cascade_config | {"base": cascade_config["sr_1"]}, ["base"])


def test_the_report_shows_this_calls_pictures(tmp_path, monkeypatch):
    """Catches pictures of an earlier call that shift the columns of the contact sheet."""

    def fake(name, *arguments):
        for i, prompt in enumerate(
            Path(arguments[arguments.index("--prompts") + 1]).read_text().split()
        ):
            for size in (16, 64):
                write_png(
                    arguments[arguments.index("--output") + 1] / f"{i:04d}_{prompt}_{size}.png",
                    np.full((size, size, 3), 10, np.uint8),
                )

    monkeypatch.setattr(demo, "run_command", fake)
    for prompts in (["cat", "dog", "cow"], ["apple", "pear"]):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        demo.sample("--config=x", tmp_path / "prompts.txt", tmp_path / "embedded")
    assert len(list((tmp_path / "embedded").iterdir())) == 4
    sheet = demo.cascade_sheet(
        ["apple", "pear"], {"embedded": tmp_path / "embedded"}, tmp_path / "sheet.png"
    )
    assert sheet.exists()


def test_the_report_names_a_stage_that_logged_no_step(tmp_path):
    """Catches an empty plot without explanation, and a stage missing from the table."""
    rows = {
        "base": '{"step": 50, "loss": 1.0}\n{"step": 100, "loss": 0.5}\n',
        "sr_1": '{"step": 50, "loss": 1.0}\n',
        "sr_2": "",
    }
    for name, text in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    workdirs = {name: tmp_path / name for name in rows}
    assert "<td>sr_2</td><td>none logged</td>" in demo.training_table(workdirs)
    assert demo.loss_curves(workdirs, tmp_path / "curves.png").stat().st_size > 0


def test_the_demo_shows_kid_or_why_there_is_none():
    """Catches a number without its error, one of the other split, and a report that fails without
    the package."""
    score = {"mean": 0.25, "se": 0.0625, "n": 96, "n_reference": 500}
    measured = {
        "embedded": {"kid": {"network": {}, "heldout": score, "train": score | {"mean": -0.5}}}
    }
    cells = ["embedded", "heldout", "96", "500", "0.2500 ± 0.0625", "train", "-0.5000 ± 0.0625"]
    assert all(f"<td>{cell}</td>" in demo.kid_table(measured) for cell in cells)
    left_out = {"provenance": {"left_out": {"kid": "it needs the package <p>"}}}
    assert "it needs the package &lt;p&gt;" in demo.kid_table(measured | {"fresh": left_out})


@pytest.mark.parametrize("steps", [[7, 7], [7, 8]])
def test_a_time_limit_before_the_first_step_is_told(monkeypatch, caplog, steps):
    """Catches a run of no step that ends without a reason, and one that blames the start later."""
    now = iter([0.0, 30.0 if steps[0] != steps[1] else 90.0, 90.0])
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    stop = train.stop_requests(1.0)
    assert [stop(steps[0]), stop(steps[1])] == [steps == [7, 7], True]
    assert ("--minutes 1 passed before the first step" in caplog.text) == (steps == [7, 7])
