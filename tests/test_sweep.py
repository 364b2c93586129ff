"""Sweeps: their processes, resuming, and the paired comparison of arms."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from imagen_jax import schema
from launch import comparison, sweep
from launch.ablation import FINISHED, Arm, Task
from tests import tiny

ABLATION = """
from configs import base_64

def get_config(arg=""):
    config = base_64.get_config("tiny")
    config.data.update(path="prepared")
    return config

def sweep(arg=""):
    yield {"name": "slow", "config.sampling.w": 1.0}
    yield {"name": "guided", "config.sampling.w": 3.0}
    yield {"name": "fast", "config.optim.lr": 1e-3, "config.model.text_attention": (True, True)}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ablation.py"
    path.write_text(ABLATION)
    return path


def planned(file, tmp_path, *options):
    argv = ["--config", f"{file}:x", "--workdir", str(tmp_path / "runs"), *options]
    return sweep.plan(sweep.parse(argv)[0])[1]


def evaluation(loss, rows=None):
    """The evaluation of one arm and seed, given by its mean or its rows."""
    rows = {} if rows is None else {"loss.heldout.overall.mean": np.asarray(rows, float)}
    mean = float(np.mean(rows["loss.heldout.overall.mean"])) if rows else loss
    return {"measures": {"loss": {"heldout": {"overall": {"mean": mean}}}}, "rows": rows}


def compared(evaluations):
    arms = [Arm(name, {}) for name in evaluations]
    seeds = range(len(evaluations[arms[0].name]))
    return comparison.compare(arms, seeds, evaluations)["columns"][0]["arms"]


def test_every_arm_and_seed_is_trained_once_with_its_own_settings(file, tmp_path):
    """Catches sampling arms that train again, lost fields, and seeds that differ between arms."""
    steps = planned(file, tmp_path, "--seeds", "0,7", "--config.data.path=/data")
    assert [step.label for step in steps if step.label.endswith("seed 7")] == [
        "train slow, seed 7",
        "evaluate slow, seed 7",
        "evaluate guided, seed 7",
        "train fast, seed 7",
        "evaluate fast, seed 7",
    ]
    train = steps[3 + 5].command
    assert train[1:3] == ("-m", "imagen_jax.train")
    assert set(train[5:]) == {
        "--config.data.path=/data",
        "--config.optim.lr=0.001",
        "--config.model.text_attention=(True, True)",
        "--config.seed=7",
    }
    guided, slow = steps[2].command, steps[1].command
    assert "--w=3.0" in guided and "--data=/data" in guided
    measured = lambda step: [
        option
        for option in step.command[3:]
        if not option.startswith(("--checkpoint=", "--output="))
    ]
    assert measured(steps[1]) == measured(
        steps[1 + 5]
    )  # the same rows with the same noise for both seeds
    assert [option for option in guided if "checkpoint" in option] == [
        option for option in slow if "checkpoint" in option
    ]
    assert guided[5] != slow[5]


def test_a_given_model_is_only_evaluated(file, tmp_path):
    """Catches --checkpoint that trains, or accepts arms that differ in their training."""
    with pytest.raises(ValueError, match="trained differently"):
        planned(file, tmp_path, "--checkpoint", "model")
    file.write_text(ABLATION.rsplit("    yield", 1)[0])
    assert {step.command[2] for step in planned(file, tmp_path, "--checkpoint", "model")} == {
        "imagen_jax.evaluate"
    }


def test_a_given_model_samples_as_the_ablation_says(file, tmp_path):
    """Catches --checkpoint that ignores get_config's sampling settings.

    Also catches settings that replace the arm's or the command line's, or are passed without
    --checkpoint.
    """
    file.write_text(
        ABLATION.rsplit("    yield", 1)[0].replace(
            'path="prepared")', 'path="prepared")\n    config.sampling.update(steps=7, gamma=0.5)'
        )
    )
    slow, guided = planned(file, tmp_path, "--checkpoint", "model", "--config.sampling.gamma=0.75")
    assert {
        "--steps=7",
        "--sampler=ancestral",
        "--gamma=0.75",
        "--grid=t",
        "--w_interval=[-20.0, 20.0]",
        "--w=1.0",
    } <= set(slow.command)
    assert "--w=3.0" in guided.command and len(schema.SAMPLING) == sum(
        option.split("=")[0][2:] in schema.EVALUATE_FLAGS.values() for option in guided.command
    )
    assert not any(
        option.startswith("--steps") for step in planned(file, tmp_path) for option in step.command
    )


@pytest.mark.parametrize(
    "recorded, command, finished",
    [
        (["--w=3.0"], ["--w=3.0"], True),
        (["--w=3.0"], ["--w=3", "--steps=4", "--grid=t", "--w_interval=(-20, 20)"], True),
        (["--w=3.0"], ["--w=3.0", "--steps=5"], False),
        (["--w=3.0"], ["--w=3.0", "--grid=karras"], False),
        (["--w=3.0", "--steps=4"], ["--w=3.0"], False),
        (["--w=3.0"], ["--w=3.0", "--rows=8"], False),
    ],
)
def test_options_that_restate_what_was_used_change_nothing(tmp_path, recorded, command, finished):
    """Catches a sweep that starts over because a newer option restates the old default.

    Also catches a finished step that ignored the config's settings.
    """
    used = dict(
        method="ddim", steps=4, gamma=0.2, w=3.0, threshold="static", percentile=99.5, aug_level=0.0
    )  # older than grid and w_interval
    (tmp_path / "evaluation.json").write_text(json.dumps({"provenance": {"sampling": used}}))
    program = ["-m", "imagen_jax.evaluate", "--data=d"]
    (tmp_path / FINISHED).write_text(json.dumps(program + recorded))
    step = Task("evaluate x", ("python", *program, *command), tmp_path)
    if finished:
        assert step.finished
    else:
        with pytest.raises(ValueError, match="written by another command"):
            step.finished  # noqa: B018


@pytest.mark.parametrize(
    "old, new, options, message",
    [
        ("config.optim.lr", "config.optim.lr2", (), "optim.lr2, which the config does not have"),
        ("guided", "slow", (), "several arms have the name slow"),
        ("def sweep", "def arms", (), "has no sweep"),
        ('path="prepared"', 'path=""', (), "data.path is needed"),
        ("", "", ("--config.sampling.w=2",), "sampling.w: set by arm slow"),
        ("", "", ("--config.optim.rate=2",), "optim.rate, which the config does not have"),
        ("", "", ("--config.seed=2",), "--seeds"),
        ("", "", ("--seeds=0,4294967296",), "--seeds 4294967296 is not a valid seed"),
        ('optim.lr": 1e-3', 'optim.ema": 1.0', (), "optim.ema"),
        ('optim.lr": 1e-3', 'optim.accumulation": 3', (), "optim.accumulation=3"),
        ("", "", ("--checkpoint=model",), "--checkpoint is for ablations of sampling"),
        ("1e-3", "'fast'", (), "fast"),
        (
            'config.sampling.w": 3.0',
            'config.sampling.method": "heun"',
            (),
            "sampling.method is 'heun'",
        ),
        (
            'config.sampling.w": 3.0',
            'config.sampling.grid_rho": 5.0',
            (),
            "sampling.grid_rho = 5.0 has no effect with sampling.grid =",
        ),
        (  # the field has no default, but the arm would repeat another one
            'optim.lr": 1e-3',
            'train.sample_rows": 3',
            (),
            "arm fast of ",
        ),
        (
            'config.sampling.w": 3.0',
            'config.sampling.w_interval": (18.0, 19.0)',
            (),
            "contains none of the 4 log-SNRs",
        ),
        (  # the training does not have the grid of the arms
            '"config.',
            '"config.sampling.grid": "karras", "config.',
            ("--config.sampling.grid_rho=5.0",),
            "sampling.grid_rho = 5.0 has no effect",
        ),
        ("", "", ("--measures=nope",), "--measures nope is unknown"),
        ("def sweep", "COLUMNS = ('nope',)\n\ndef sweep", (), "'nope' is unknown; use a measure"),
        ("def sweep", "COLUMNS = ('loss')\n\ndef sweep", (), "must be a tuple of names"),
        (
            "def sweep",
            "COLUMNS = ('own detail',)\n\ndef sweep",
            ("--measures=loss",),
            "needs one of the measures detail: add it to --measures",
        ),
        (
            "def sweep",
            "COLUMNS = ('own detail',)\n\ndef sweep",
            (),
            "'own detail' of detail does not apply: base_tiny is a base stage",
        ),
        (
            'def sweep(arg=""):',
            'COLUMNS = ("loss",)\n\ndef sweep(arg=""):\n'
            '    yield {"name": "other", "config.diffusion.prediction": "v"}',
            (),
            "'loss' of loss cannot compare arms that differ in diffusion.prediction; choose",
        ),
        (
            "",
            "",
            ("--measures=loss,detail",),
            "--measures detail does not apply: base_tiny is a base stage",
        ),
        ("", "", ("--rows=-1",), "--rows -1 is less than 1"),
        ("", "", ("--samples=-1",), "--samples -1 is less than 1"),
        ("", "", ("--workdir=/dev/null",), "--workdir: cannot create /dev/null (Not a directory)"),
        ("", "", ("--workdir=/proc/foo",), "cannot create /proc/foo"),
        ("", "", ("--workdir=",), "--workdir is empty"),
        ("", "", ("--workdir=s3://b/s",), "--workdir s3://b/s has the scheme s3://"),
        ("", "", ("--topology=v5e:2x4",), "--topology needs --where"),
        ("", "", ("--spot",), "--spot needs --where"),
        ("", "", ("--env=A=1",), "--env needs --where"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(
    file, tmp_path, capsys, old, new, options, message
):
    """Catches an error found only by the last arm or the first evaluation.

    Also catches a shared field that replaces the field an arm is about.
    """
    file.write_text(ABLATION.replace(old, new) if old else ABLATION)
    for dry in ([], ["--dry-run"]):
        assert (
            sweep.main(["--config", str(file), "--workdir", str(tmp_path / "runs"), *options, *dry])
            == 2
        )
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_measures_of_a_given_model_are_those_of_its_stage(file, tmp_path, capsys):
    """Catches measures checked against the ablation's stage instead of the checkpoint's."""
    file.write_text(ABLATION.rsplit("    yield", 1)[0])
    command = [
        "--config",
        str(file),
        "--workdir",
        str(tmp_path / "runs"),
        "--checkpoint=model",
        "--dry-run",
    ]
    assert sweep.main([*command, "--measures=detail"]) == 0
    assert sweep.main([*command, "--measures=nope"]) == 2
    capsys.readouterr()
    assert sweep.main([*command, "--config.train.steps=9"]) == 2
    assert "train.steps changes nothing with --checkpoint" in capsys.readouterr().err


def test_checking_takes_no_device(file, tmp_path):
    """Catches a launcher that occupies the accelerator, which the trainings need."""
    source = (
        "import sys; from launch import sweep; assert not sweep.main(sys.argv[1:]); from jax._src"
        " import xla_bridge; print(len(xla_bridge._backends))"
    )
    command = [
        sys.executable,
        "-c",
        source,
        "--config",
        str(file),
        "--workdir",
        str(tmp_path / "runs"),
        "--dry-run",
    ]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0", done.stderr


def test_finished_steps_are_not_run_again(file, tmp_path, monkeypatch, capsys):
    """Catches a sweep that starts over, or that takes another command's results for its own."""
    ran = []

    def execute(step):
        ran.append(step.label)
        if step.label == "evaluate fast, seed 0" and ran.count(step.label) == 1:
            raise ValueError("out of memory")
        step.directory.mkdir(parents=True)
        if step.label.startswith("evaluate"):
            (step.directory / "evaluation.json").write_text(
                json.dumps(evaluation(0.25)["measures"])
            )
        (step.directory / FINISHED).write_text(json.dumps(step.command[1:]))

    monkeypatch.setattr(sweep, "execute", execute)
    command = ["--config", str(file), "--workdir", str(tmp_path / "runs")]
    assert sweep.main(command) == 2
    assert sweep.main(command) == 0
    assert ran == [
        "train slow, seed 0",
        "evaluate slow, seed 0",
        "evaluate guided, seed 0",
        "train fast, seed 0",
    ] + 2 * ["evaluate fast, seed 0"]
    assert json.loads((tmp_path / "runs" / "sweep.json").read_text())["reference"] == "slow"
    assert sweep.main([*command, "--rows", "3"]) == 2
    assert "written by another command" in capsys.readouterr().err


def test_differences_are_paired_by_seed():
    """Catches the standard error of unpaired values, and reference minus arm."""
    result = compared(
        {
            "a": [evaluation(1.0), evaluation(5.0), evaluation(9.0)],
            "b": [evaluation(1.5), evaluation(5.6), evaluation(9.7)],
        }
    )
    assert result["b"]["difference"] == pytest.approx(0.6)
    assert result["b"]["se_seeds"] == pytest.approx(0.1 / np.sqrt(3))
    assert result["b"]["se_rows"] is None
    assert result["a"]["mean"] == pytest.approx(5.0) and "difference" not in result["a"]


def test_differences_are_paired_by_row():
    """Catches the error of rows instead of differences, and a standard error over one seed."""
    rows = np.array([0.0, 10.0, 20.0, 30.0])
    result = compared(
        {"a": [evaluation(0, rows)], "b": [evaluation(0, rows + [1.0, 1.2, 0.8, 1.0])]}
    )
    assert result["b"]["difference"] == pytest.approx(1.0)
    assert result["b"]["se_rows"] == pytest.approx(np.std([1.0, 1.2, 0.8, 1.0], ddof=1) / 2)
    assert result["b"]["se_seeds"] is None


def test_the_same_seed_twice_is_refused(file, tmp_path, capsys):
    """Catches copies of one training that are averaged as if they were independent."""
    options = ["--config", str(file), "--workdir", str(tmp_path / "runs"), "--seeds", "0,1,0"]
    assert sweep.main(options) == 2
    assert "the same seed twice" in capsys.readouterr().err


def test_seeds_share_their_rows():
    """Catches rows of several seeds counted as independent images."""
    rows = np.array([0.0, 1.0, 2.0, 3.0])
    one, three = (
        compared({"a": [evaluation(0, 0 * rows)] * seeds, "b": [evaluation(0, rows)] * seeds})["b"]
        for seeds in (1, 3)
    )
    assert one["se_rows"] == three["se_rows"] == pytest.approx(np.std(rows, ddof=1) / 2)


def test_the_columns_are_those_that_the_file_chooses():
    """Catches a choice that is ignored, in another order, or without paired errors; and a default
    that shows the columns that must be chosen.
    """
    path = "sensitivity.text.shuffled.overall.mean"
    evaluations = {}
    for name, rises in {"a": [0.5, 1.0], "b": [0.5, 2.0]}.items():
        one = evaluation(0.25)
        mean = float(np.mean(rises))
        one["measures"]["sensitivity"] = {"text": {"shuffled": {"overall": {"mean": mean}}}}
        one["rows"][path] = np.array(rises)
        evaluations[name] = [one]
    places = lambda *names: {
        column["place"]: column["arms"]["b"]
        for column in comparison.compare(arms, [0], evaluations, names)["columns"]
    }
    arms = [Arm("a", {}), Arm("b", {"optim.lr": 1.0})]
    assert list(places()) == ["loss.heldout.overall.mean"]
    assert list(places("sensitivity")) == [path]
    chosen = places("loss rise, text shuffled", "loss")
    assert list(chosen) == [path, "loss.heldout.overall.mean"]
    assert chosen[path]["difference"] == 0.5
    assert chosen[path]["se_rows"] == pytest.approx(0.5)  # differences 0 and 1 of two rows


def test_losses_of_other_noise_are_not_compared():
    """Catches a difference between losses that do not measure the same quantity."""
    arms = [Arm("a", {}), Arm("b", {"diffusion.aug_max": 0.0})]
    assert (
        comparison.compare(arms, [0], {"a": [evaluation(1.0)], "b": [evaluation(0.5)]})["columns"]
        == []
    )


@pytest.mark.parametrize(
    "field, compared",
    [("prediction", True), ("schedule", True), ("aug_max", False), ("aug_schedule", False)],
)
def test_errors_of_x_hat_compare_arms_of_other_diffusion(field, compared):
    """Catches a missing column for arms that differ in the prediction.

    Also catches errors that are compared although the low-res images have different noise.
    """
    arms = [Arm("a", {}), Arm("b", {f"diffusion.{field}": "other"})]
    evaluations = {}
    for arm, value in zip(arms, (0.5, 0.25)):
        one = evaluation(1.0)
        one["measures"]["x_error"] = {"heldout": {"overall": {"mean": value}}}
        one["rows"]["x_error.heldout.overall.mean"] = np.array([value, value])
        evaluations[arm.name] = [one]
    columns = comparison.compare(arms, [0], evaluations)["columns"]
    assert [column["place"] for column in columns] == ["x_error.heldout.overall.mean"] * compared
    assert all(
        column["arms"]["b"]["difference"] == -0.25 and column["arms"]["b"]["se_rows"] == 0
        for column in columns
    )


def test_evaluations_are_read_with_their_rows(tmp_path):
    """Catches boolean hits that cannot be subtracted, and an error for missing rows."""
    for name, hits in {"a": [True, False], "b": [True, True], "c": None}.items():
        directory = tmp_path / name / "seed_4" / "evaluation"
        directory.mkdir(parents=True)
        rate = {"retrieval": {"heldout": {"right": {"top5": {"rate": float(np.mean(hits or 0))}}}}}
        (directory / "evaluation.json").write_text(json.dumps(rate))
        if hits:
            np.savez(
                directory / "rows.npz", **{"retrieval.heldout.right.top5.rate": np.array(hits)}
            )
    arms = [Arm(name, {}) for name in "abc"]
    result = comparison.compare(arms, [4], comparison.read_evaluations(tmp_path, arms, [4]))[
        "columns"
    ][0]["arms"]
    assert result["b"]["difference"] == 0.5
    # One of 2 rows is gained, and a row of each sign is added: sqrt((2/4 + 1/4 - (1/4)^2) / 4).
    assert result["b"]["se_rows"] == pytest.approx(0.4145781)
    assert result["c"]["se_rows"] is None


def test_arms_of_one_training_need_the_same_weights():
    """Catches a paired difference between checkpoints of different steps."""
    at_step = lambda step: {
        "measures": evaluation(1.0)["measures"]
        | {"step": step, "provenance": {"checkpoint": {"sha256": f"s{step}"}}},
        "rows": {},
    }
    arms = [Arm("ddim", {"sampling.method": "ddim"}), Arm("slow", {"sampling.steps": 9})]
    other = [arms[0], Arm("fast", {"optim.lr": 1e-3})]
    same = {arm.name: [at_step(4)] for arm in (*arms, other[1])}
    moved = same | {"slow": [at_step(8)], "fast": [at_step(8)]}
    comparison.check_same_weights(arms, same)
    comparison.check_same_weights(other, moved)  # two trainings have two checkpoints
    with pytest.raises(ValueError, match="ddim and slow evaluated different .* 4 and step 8"):
        comparison.compare(arms, [0], moved)


def test_table_shows_every_arm():
    """Catches a table that fails for an arm without a measure or for a single seed."""
    arms = [Arm("reference", {}), Arm("b", {"optim.lr": 1.0}), Arm("no_loss", {})]
    evaluations = {
        "reference": [evaluation(1.0)],
        "b": [evaluation(0.5)],
        "no_loss": [{"measures": {"retrieval": {}}, "rows": {}}],
    }
    lines = comparison.table(comparison.compare(arms, [0], evaluations)).splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["reference", "1.0000", "-", "-", "-"],
        ["b", "0.5000", "-0.5000", "-", "-"],
    ]


def test_small_numbers_have_digits():
    """Catches a difference of -0.000004 that is shown as -0.0000."""
    numbers = [0.0, 4.2e-6, -4.2e-6, 1e-3, 0.5, None]
    shown = [comparison.shown(number, "+") for number in numbers]
    assert shown == ["+0.0000", "+4.2e-06", "-4.2e-06", "+0.0010", "+0.5000", "-"]


def test_columns_that_measures_leave_out_are_dropped(file, tmp_path, capsys):
    """Catches a measure that cannot be left out without editing the file."""
    file.write_text(ABLATION.replace("def sweep", "COLUMNS = ('loss', 'retrieval')\n\ndef sweep"))
    argv = ["--config", str(file), "--workdir", str(tmp_path / "runs"), "--measures=loss"]
    assert sweep.main([*argv, "--dry-run"]) == 0
    ablation, _ = sweep.parse(argv)
    arms = sweep.plan(ablation)[0]
    assert [one.name for one in sweep.chosen_columns(ablation, arms, ["loss"])] == ["loss"]


def step(tmp_path, code):
    return Task("train x", (sys.executable, "-c", code), tmp_path)


def test_a_failed_process_is_not_finished(tmp_path):
    """Catches a dropped exit code, after which the table is made from incomplete results."""
    failing = step(tmp_path, "raise SystemExit(3)")
    with pytest.raises(ValueError, match="exit code 3"):
        sweep.execute(failing)
    assert not failing.finished


@pytest.mark.parametrize(
    "rows, saved, finished", [(8, 8, True), (5, 5, False), (8, 4, False), (4, 8, True)]
)
def test_a_training_that_stopped_early_is_not_finished(tmp_path, rows, saved, finished):
    """Catches exit code 0 of a stopped training taken for its end.

    Also catches lost rows of metrics taken for a stop.
    """
    (tmp_path / "config.json").write_text('{"train": {"steps": 8}}')
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": {rows}}}\n')
    (tmp_path / "checkpoints" / str(saved)).mkdir(parents=True)
    (tmp_path / "checkpoints" / str(saved) / "SHA256SUMS").touch()
    stopped = step(tmp_path, "")
    if finished:
        sweep.execute(stopped)
    else:
        with pytest.raises(ValueError, match="stopped before its last step"):
            sweep.execute(stopped)
    assert stopped.finished == finished


def test_a_signal_lets_the_process_save(tmp_path):
    """Catches SIGTERM that leaves the training running, or kills it before it has saved."""
    saving = (
        "import signal, time, sys; signal.signal(signal.SIGTERM, lambda *_: (open('saved',"
        " 'w').close(), sys.exit(0))); open('ready', 'w').close(); time.sleep(60)"
    )
    launcher = (
        "import pathlib; from launch import ablation, sweep;"
        f" sweep.execute(ablation.Task('x', ({sys.executable!r}, '-c', {saving!r}),"
        " pathlib.Path('.')))"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", launcher],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert (tmp_path / "saved").exists() and not (tmp_path / FINISHED).exists()
