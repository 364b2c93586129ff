"""Training runs with batches that were spoiled after decoding."""

import json
import shutil

import jax
import numpy as np
import pytest

from imagen_jax import cli, exit_codes, schema, sharding, train
from imagen_jax.distributed.watch import Watch
from imagen_jax.run_log import BAD_STEPS, VARYING, read_metrics
from imagen_jax.training.run import Run
from imagen_jax.training.start import first_state
from imagen_jax.training.start_flags import Start
from imagen_jax.weights.checkpoint import Checkpoints
from imagen_jax.weights.retention import Retention
from tests import poison, processes, tiny
from tests.data import synthetic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS, ROWS = 12, 8
SKIP = dict(train__on_bad_step="skip")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    return synthetic.write_prepared(root / "data", images=20, size=32)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs of this process use one of its devices; they compile sooner."""
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: make(sizes, jax.devices()[:1]))


def config_of(data, **changes):
    """Rows of two steps and checkpoints every three: some checkpoints are between two rows."""
    content = tiny.config(
        **tiny.ONE_LEVEL_UNET,
        data__path=str(data),
        data__workers=0,
        mesh__data=1,
        data__batch_size=ROWS,
        optim__accumulation=2,
        optim__ema_tracks=(0.5,),
        train__steps=STEPS,
        train__log_every=2,
        train__save_every=3,
        train__keep=20,
    )
    for field, value in changes.items():
        section, _, name = field.partition("__")
        content[section][name] = value
    return schema.complete(content, new=True)


def run(config, workdir, **start):
    """The exit code of a run, or of its resume. start: fields of `Start`."""
    train_it = lambda: train.train(config, workdir, (0, 0), 0.0, Start(**start), Watch(100.0))
    return cli.guard(train_it)


def saved(workdir):
    steps = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in steps if name.isdigit())


def rows_of(workdir, *without):
    """metrics.jsonl without times and memory."""
    kept = lambda name: not name.startswith(VARYING) and name not in without
    return [
        {name: value for name, value in row.items() if kept(name)} for row in read_metrics(workdir)
    ]


def state_of(config, workdir):
    """The newest state of a run."""
    abstract = Run.create(config).program.abstract
    return Checkpoints(workdir / "checkpoints", Retention(20)).restore(
        saved(workdir)[-1], abstract
    )[0]


def state_without(config, left_out, workdir):
    """The state after all steps, of which those in `left_out` were never run."""
    run = Run.create(config)
    (step,), (state, _, _) = run.compile_steps().values(), first_state(run, Start(), workdir)
    for n, batch in zip(range(STEPS), run.batches(0)):
        if n in left_out:
            state = state.replace(step=state.step + 1)
        else:
            state, _ = step(state, run.place(batch))
    return state


def resumed(config, straight, workdir, step):
    """The exit code of a copy of a run that goes on from its checkpoint of this step."""
    shutil.copytree(straight, workdir)
    for later in saved(workdir):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))
    return run(config, workdir)


def equal_states(state, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(expected))


def test_bad_batches_are_skipped(data, tmp_path, monkeypatch):
    """Catches a NaN or an overflow that reaches any part of the state, a row or the count of steps;
    ids of another step; rows of bad_steps.jsonl that a resume loses or doubles.
    """
    config, straight = config_of(data, **SKIP), tmp_path / "straight"
    poison.apply({2: "text", 3: "black", 7: "black"}, monkeypatch.setattr)
    assert run(config, straight) == 0
    bad = read_metrics(straight, BAD_STEPS)
    assert [(row["step"], row["reason"], row["action"]) for row in bad] == [
        (step, "not finite", "skipped") for step in (3, 4, 8)
    ]
    assert np.isnan(bad[0]["loss"]) and np.isfinite(bad[1]["loss"])
    assert np.isinf(bad[1]["norm/grad"])
    batches = [batch for batch, _ in zip(Run.create(config).batches(0), range(STEPS))]
    for row in bad:
        batch = batches[row["step"] - 1]
        assert row["images"] == batch["index"].tolist()
        assert row["captions"] == batch["caption_id"].tolist()
    rows = rows_of(straight)
    assert [row["health/skipped"] for row in rows] == [0, 2, 0, 1, 0, 0]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    equal_states(state_of(config, straight), state_without(config, {2, 3, 7}, tmp_path))
    for step in (3, 6):
        workdir = tmp_path / str(step)
        assert resumed(config, straight, workdir, step) == 0
        assert rows_of(workdir) == rows
        assert (workdir / BAD_STEPS).read_bytes() == (straight / BAD_STEPS).read_bytes()
        equal_states(state_of(config, workdir), state_of(config, straight))


def test_stop_saves_nothing_afterwards(data, tmp_path, monkeypatch, capsys):
    """Catches a run that goes on by default, and a report of another batch."""
    config = config_of(data)
    poison.apply({7: "text"}, monkeypatch.setattr)
    assert run(config, tmp_path / "run") == exit_codes.NOT_FINITE
    assert "update of step 7 is not finite" in capsys.readouterr().err
    assert saved(tmp_path / "run") == [3, 6]
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    batch = next(Run.create(config).batches(7))
    assert report["step"] == 7 and report["images"] == batch["index"].tolist()
    assert not (tmp_path / "run" / BAD_STEPS).exists()


def test_too_many_skips_stop_the_run(data, tmp_path, monkeypatch, capsys):
    """Catches a limit that a resume resets, and a state that is saved after it was exceeded; a
    resume that may not raise the limit.
    """
    config, straight = config_of(data, **SKIP, train__max_skips=2), tmp_path / "straight"
    poison.apply({1: "text", 4: "text", 7: "text"}, monkeypatch.setattr)
    again = lambda workdir: resumed(config, straight, workdir, 6)
    for workdir, start in (
        (straight, lambda workdir: run(config, workdir)),
        (tmp_path / "r", again),
    ):
        assert start(workdir) == exit_codes.NOT_FINITE
        assert (
            "3 of the last 1000 steps were skipped, the last one step 8" in capsys.readouterr().err
        )
        assert saved(workdir) == [3, 6]
        assert [row["step"] for row in read_metrics(workdir, BAD_STEPS)] == [2, 5, 8]
        assert not (workdir / "nonfinite.json").exists()
    assert run(config_of(data, **SKIP, train__max_skips=3), straight) == 0
    assert [row["step"] for row in read_metrics(straight, BAD_STEPS)] == [2, 5, 8]


def test_spikes_are_logged_or_skipped(data, tmp_path, monkeypatch):
    """Catches a window that a resume loses, a spike that is skipped unasked or applied against the
    rule, and a run that cannot take up or drop the rule.
    """
    monkeypatch.setattr("imagen_jax.training.bad_steps.LEAST", 4)
    poison.apply({5: "white", 8: "white"}, monkeypatch.setattr)
    plain = config_of(data)
    rule = dict(train__spike_factor=20.0)
    log, skip = config_of(data, **rule), config_of(data, **rule, train__on_spike="skip")
    assert [run(config, tmp_path / n) for n, config in (("p", plain), ("l", log), ("s", skip))] == [
        0, 0, 0
    ]  # fmt: skip
    for name, action in (("l", "logged"), ("s", "skipped")):
        bad = read_metrics(tmp_path / name, BAD_STEPS)
        assert [(row["step"], row["reason"], row["action"]) for row in bad] == [
            (step, "spike", action) for step in (6, 9)
        ]
        assert all(row["norm/grad"] > 20.0 * row["norm/grad_median"] > 0 for row in bad)
        assert len(bad[0]["images"]) == ROWS
    logged = state_of(log, tmp_path / "l")
    assert logged.grad_norms.shape == (128,)
    equal_states(logged.replace(grad_norms=()), state_of(plain, tmp_path / "p"))
    assert rows_of(tmp_path / "l") == rows_of(tmp_path / "p")
    skipped = state_of(skip, tmp_path / "s")
    equal_states(skipped.params, state_without(plain, {5, 8}, tmp_path).params)
    assert max(row["norm/grad_max"] for row in rows_of(tmp_path / "s")) > 1e4
    assert resumed(skip, tmp_path / "s", tmp_path / "again", 6) == 0
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "s")
    assert (tmp_path / "again" / BAD_STEPS).read_bytes() == (
        tmp_path / "s" / BAD_STEPS
    ).read_bytes()
    equal_states(state_of(skip, tmp_path / "again"), skipped)
    # The rule is dropped, or taken up with an empty window, by a resume.
    assert resumed(plain, tmp_path / "l", tmp_path / "dropped", 6) == 0
    equal_states(state_of(plain, tmp_path / "dropped"), state_of(plain, tmp_path / "p"))
    assert resumed(log, tmp_path / "p", tmp_path / "taken", 3) == 0
    taken = state_of(log, tmp_path / "taken")
    assert np.isfinite(taken.grad_norms).sum() == STEPS - 3
    equal_states(taken.params, logged.params)
    fork = tmp_path / "fork"
    assert run(log, fork, fork=f"{tmp_path / 'p'}@6") == 0
    assert np.isfinite(state_of(log, fork).grad_norms).sum() == STEPS - 6


def test_processes_gather_the_ids(data, tmp_path, monkeypatch):
    """Catches ids of one process alone, rows that several processes write, and processes that skip
    or stop apart.
    """
    options = [
        f"--config={tiny.ROOT}/configs/sr_1024.py:tiny",
        f"--config.data.path={data}",
        f"--config.text.dim={synthetic.DIM}",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=2",
        "--config.mesh.fsdp_min_elements=64",
        "--config.train.on_bad_step=skip",
        "--config.train.spike_factor=1000.0",
        "--config.train.max_skips=2",
        *tiny.ONE_LEVEL,
    ]
    monkeypatch.setenv("POISON", "1:text,3:black,6:text")
    found = []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        command = lambda i, to=workdir: ["-m", "tests.poison", f"--workdir={to}", *options]
        team = processes.start(command, workdir, count, 4)
        processes.finish(team, workdir, exit_codes.NOT_FINITE)
        assert saved(workdir) == [4]
        log = processes.log_of(workdir, count - 1).read_text()
        assert "3 of the last 1000 steps were skipped, the last one step 7" in log
        found.append(read_metrics(workdir, BAD_STEPS))
    one, two = found
    assert [row["step"] for row in one] == [row["step"] for row in two] == [2, 4, 7]
    for name in ("images", "captions", "seed"):
        assert [row[name] for row in one] == [row[name] for row in two]
        assert name == "seed" or all(len(row[name]) == 8 for row in two)
