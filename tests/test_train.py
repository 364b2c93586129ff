"""The trainer as a user runs it, in processes of their own: killed at bad moments, resumed, asked
to stop, given bad data or settings.
"""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from imagen_jax import cli, exit_codes, schema, train
from imagen_jax.distributed.watch import Watch
from imagen_jax.locks import only_process
from imagen_jax.run_log import VALIDATION, read_metrics
from imagen_jax.training.run import Run
from imagen_jax.training.start_flags import Start
from imagen_jax.weights.checkpoint import load_params
from tests import tiny, xla
from tests.data import synthetic

# IMAGEN_JAX_KILLS=10 kills ten times, as long as it takes; the suite kills at three chosen moments.
KILLS = int(os.environ.get("IMAGEN_JAX_KILLS", "3"))
STEPS = 10 * KILLS  # a kill after some steps waits for up to eight more
ENV = os.environ | {"XLA_FLAGS": xla.flags(), "PYTHONPATH": str(tiny.ROOT)}
PROGRAM = (sys.executable, "-m", "imagen_jax.train")
VALIDATED = ("--config.train.validate_every=8", "--config.train.validate_rows=3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic.write_prepared(
        tmp_path_factory.mktemp("prepared") / "data", images=24, size=32
    )


def command(data: Path, workdir: Path, *more: str, program: Sequence[str] = PROGRAM) -> list[str]:
    """Everything on that can disturb a resume: accumulation, crops, data workers,
    frequent saves.
    """
    return [
        *program,
        f"--config={tiny.ROOT}/configs/sr_1024.py:tiny",
        f"--workdir={workdir}",
        f"--config.data.path={data}",
        f"--config.text.dim={synthetic.DIM}",
        f"--config.train.steps={STEPS}",
        "--config.train.save_every=5",
        "--config.data.workers=1",
        "--config.optim.accumulation=2",
        "--config.optim.ema_tracks=(0.5,)",
        "--config.mesh.data=1",
        *tiny.ONE_LEVEL,
        *more,
    ]


def start(
    data: Path, workdir: Path, *more: str, program: Sequence[str] = PROGRAM
) -> subprocess.Popen:
    log = open(workdir.with_suffix(".log"), "a")
    return subprocess.Popen(
        command(data, workdir, *more, program=program),
        env=ENV,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def run(data: Path, workdir: Path, *more: str, program: Sequence[str] = PROGRAM) -> tuple[int, str]:
    """(exit code, what was printed)."""
    code = start(data, workdir, *more, program=program).wait(timeout=400)
    return code, workdir.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def straight_run(data, tmp_path_factory):
    """The workdir of a run that nothing stops. Its first save fails and it validates, which must
    change nothing: `test_sigterm_saves_and_exits` compares it with a run that has done neither.
    """
    workdir = tmp_path_factory.mktemp("straight") / "run"
    code, log = run(data, workdir, *VALIDATED, program=(sys.executable, "-c", tiny.FULL_ONCE))
    assert code == 0, log
    return workdir


@pytest.fixture(scope="module")
def straight(straight_run):
    """The losses of `straight_run`, by step."""
    return losses(straight_run)


def losses(workdir: Path) -> dict[int, float]:
    rows = read_metrics(workdir)
    assert len({row["step"] for row in rows}) == len(rows), "rows of the same step twice"
    return {row["step"]: row["loss"] for row in rows}


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> bool:
    """Whether the condition came true before the process ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


def kill_at(moment: str, data: Path, workdir: Path, rng: random.Random) -> None:
    """Starts the run and kills its whole process group at a moment: in compilation, inside a save,
    or after some steps.
    """
    process = start(data, workdir, *VALIDATED)
    seen = lambda text: text in workdir.with_suffix(".log").read_text()[before:]
    before = len(workdir.with_suffix(".log").read_text())
    done = len(read_metrics(workdir))
    conditions = {
        "compile": lambda: seen("% sharded"),
        "save": lambda: any((workdir / "checkpoints").glob("*.writing*")),
        "steps": lambda n=done + rng.randint(1, 8): len(read_metrics(workdir)) >= n,
    }
    assert wait_for(conditions[moment], process), f"the run ended before the moment: {moment}"
    time.sleep(rng.random() * 0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"the run ended before it was killed: {moment}"


@pytest.mark.slow
def test_killed_runs_resume_bit_for_bit(data, straight, straight_run, tmp_path):
    """Catches any state outside the checkpoint, a half-written checkpoint that is used, rows
    written twice, data that starts over.
    """
    rng, workdir = random.Random(0), tmp_path / "run"
    moments = (
        ["compile", "save", "steps"]
        + ["save", "save"] * (KILLS >= 5)
        + ["steps"] * max(0, KILLS - 5)
    )
    for moment in moments[:KILLS]:
        kill_at(moment, data, workdir, rng)
    code, log = run(data, workdir, *VALIDATED)
    assert code == 0, log
    assert losses(workdir) == straight
    assert read_metrics(workdir, VALIDATION) == read_metrics(straight_run, VALIDATION)
    for which in ("ema", "ema_1"):
        jax.tree.map(
            np.testing.assert_array_equal,
            *(load_params(run, which)[0] for run in (workdir, straight_run)),
        )


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_the_losses_of_a_straight_run(data, straight, tmp_path):
    """Catches a signal that loses the steps since the last save, or one that is answered with a
    failure; a second trainer in the same workdir; losses that depend on when a run is to end.
    """
    got = stop_by_sigterm(data, tmp_path / "run")
    steps = range(1, min(len(got), STEPS) + 1)
    assert [got[step] for step in steps] == [straight[step] for step in steps]


def stop_by_sigterm(data, workdir) -> dict[int, float]:
    """The losses of a run that ends by SIGTERM after three steps or more."""
    process = start(
        data, workdir, "--config.train.save_every=100000", "--config.train.steps=100000"
    )
    assert wait_for(lambda: len(read_metrics(workdir)) >= 3, process)
    with pytest.raises(ValueError, match="another process is training in"):
        with only_process(workdir, "training in"):  # as a second trainer begins
            pytest.fail("two processes write one run's metrics and checkpoints")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    saved = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(saved) == 1 and saved[0] >= 3
    got = losses(workdir)
    assert list(got) == list(range(1, saved[0] + 1))
    return got


@pytest.mark.slow
def test_resume_on_another_mesh_and_refusal_of_other_settings(data, straight, tmp_path):
    """Catches a checkpoint bound to its mesh, and a resume that silently mixes two experiments."""
    workdir = tmp_path / "run"
    assert run(data, workdir, "--config.train.steps=15")[0] == 0
    for change in ("optim.lr=0.5", "model.cond_dim=32"):
        code, log = run(data, workdir, f"--config.{change}")
        field = change.split("=")[0]
        refusal = f"with other settings; restore them, or use a new --workdir: {field}: "
        assert code == 2 and refusal in log and "Traceback" not in log
    more = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.fsdp_min_elements=64"]
    subprocess.run(
        command(data, workdir, *more),
        env=ENV | {"XLA_FLAGS": xla.flags(devices=4)},
        check=True,
        timeout=400,
        capture_output=True,
    )
    got = losses(workdir)
    np.testing.assert_allclose(
        [got[n] for n in range(1, STEPS + 1)], [straight[n] for n in range(1, STEPS + 1)], rtol=1e-5
    )


@pytest.mark.slow
def test_validations_come_every_few_steps_and_at_the_last(straight_run):
    """Catches a validation that is missing or double, and time of it in the time of a step."""
    rows = read_metrics(straight_run, VALIDATION)
    assert [row["step"] for row in rows] == [*range(8, STEPS, 8), STEPS]
    assert all(row["heldout/ema/x_error"] > 0 for row in rows)
    log = straight_run.with_suffix(".log").read_text()
    validated = [float(s) for s in re.findall(r"validation of step \d+ on 3 rows: ([\d.]+) s", log)]
    assert len(validated) == len(rows)
    steps = [row.get("time/step_s", 0) for row in read_metrics(straight_run)]
    assert max(steps[8:11]) < validated[0]  # the first one compiles for seconds


@pytest.mark.slow
def test_failed_save_does_not_end_the_run(straight, straight_run):
    """Catches a full disk that costs the run, and one that nobody is told of."""
    log = straight_run.with_suffix(".log").read_text()
    assert "checkpoint 5 was not saved" in log and "No space left" in log
    assert list(straight) == list(range(1, STEPS + 1))
    assert (straight_run / "checkpoints" / str(STEPS)).is_dir()
    assert not (straight_run / "checkpoints" / "5").exists()


@pytest.mark.slow
def test_non_finite_loss_stops_the_run(data, tmp_path, capsys):
    """Catches a run that goes on, or saves, after a NaN; the report names step, seed and images."""
    workdir = tmp_path / "run"
    config = tiny.config("sr_1024", **tiny.ONE_LEVEL_FIELDS, data__path=str(data))
    config["optim"] |= dict(lr=1e38, clip=1e38, ema_tracks=(0.5,))
    config["train"] |= dict(steps=STEPS, save_every=1)
    train_it = lambda: train.train(
        schema.complete(config, new=True), workdir, (0, 0), 0.0, Start(), Watch(100.0)
    )
    assert cli.guard(train_it) == exit_codes.NOT_FINITE
    assert "not finite" in capsys.readouterr().err
    report = json.loads((workdir / "nonfinite.json").read_text())
    assert report["seed"] == 0 and len(report["images"]) == 8
    saved = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved and all(step <= report["step"] for step in saved)
    for which in ("params", "ema", "ema_1"):
        params, _ = load_params(workdir / "checkpoints" / str(max(saved)), which)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)), (
            f"{which} of the newest checkpoint are not finite"
        )


@pytest.mark.slow
@pytest.mark.long
def test_overfit_passes_and_can_fail(data, tmp_path):
    """Catches a self-test that passes whatever happens: with a learning rate of nothing it must
    fail.
    """
    workdir = tmp_path / "run"
    assert run(data, workdir, "--overfit=5", "--config.optim.lr=0.0")[0] == 1
    base = [
        f"--config={tiny.ROOT}/configs/base_64.py:tiny",
        f"--config.data.path={data}",
        f"--config.text.dim={synthetic.DIM}",
        "--config.mesh.data=1",
    ]
    able = [*PROGRAM, *base, f"--workdir={workdir}", "--overfit=150", "--config.optim.lr=1e-2"]
    done = subprocess.run(able, env=ENV, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and "passed" in done.stderr + done.stdout, done.stderr


@pytest.mark.parametrize(
    "last, code", [([0.2] * 10, 0), ([0.3] * 10, 1), ([0.0] * 9 + [2.6], 1), ([math.nan] * 10, 1)]
)
def test_the_verdict_of_overfit(last, code):
    """Catches a verdict of the last step alone, of all steps, or one that a NaN passes: the mean of
    the last tenth must be below a quarter of the first loss.
    """
    assert train.verdict([1.0] * 90 + last, 100) == code
    assert train.verdict([1.0, 0.0], 3) == 1, "stopped before its last step"


def test_overfit_has_one_batch_and_saves_nothing(data):
    """Catches a self-test that goes on to the next batch, names the images of another batch after a
    NaN, or reaches a row, a grid or a checkpoint.
    """
    config = tiny.config(
        "sr_1024", data__path=str(data), optim__warmup=10_000, train__validate_every=2
    )
    made = train.self_test(schema.complete(config, new=True), 40)
    assert made["optim"]["warmup"] == 2 and made["train"]["steps"] == config["train"]["steps"]
    assert min(made["train"][name] for name in ("log_every", "save_every")) > 40
    assert made["train"]["sample_every"] == made["train"]["validate_every"] == 0
    run = Run.create(made, overfit=True)
    batches, later = run.batches(0), run.batches(5)
    first, second = next(batches)["index"], next(batches)["index"]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, next(later)["index"])
    plain = Run.create(made).batches(1)
    assert (next(plain)["index"] != first).any()
    for reader in (batches, later, plain):
        reader.close()


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("data__path", "/nowhere", "nowhere does not exist"),
        ("text__dim", 7, "width 8"),
        ("data__batch_size", 0, "data.batch_size is 0; it must be an integer in"),
        ("seed", 2**32, "seed is 4294967296; it must be an integer in"),
        ("data__batch_size", 7, "accumulation=2"),
        ("data__caption", "best", "data.caption is 'best'"),
        ("diffusion__prediction", "eta", "diffusion.prediction is 'eta'"),
        ("sampling__threshold", "dynamc", "sampling.threshold is 'dynamc'"),
        ("optim__lr", -1.0, "optim.lr is -1.0"),
        ("train__steps", 0, "train.steps is 0"),
        ("train__log_every", 0, "train.log_every is 0"),
        ("train__save_every", 0, "train.save_every is 0"),
        ("data__batch_size", 4, "a batch of 4 does not divide over data x fsdp = 8"),
        ("optim__clip", 0.0, "optim.clip is 0.0"),
    ],
)
def test_wrong_settings_are_found_first(data, field, value, message):
    """Catches a setting that is looked at only after state was allocated and the step compiled."""
    config = tiny.config(
        "sr_1024", **{"data__path": str(data), "optim__accumulation": 2, field: value}
    )
    with pytest.raises(ValueError, match=message) as error:
        Run.create(schema.complete(config, new=True))
    assert "\n" not in str(error.value)
