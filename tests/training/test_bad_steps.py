"""Steps that are not finite, spikes and the loss by quartile: the device's part and the record."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import exit_codes, run_log
from imagen_jax.distributed import agreement
from imagen_jax.run_log import BAD_STEPS
from imagen_jax.stage import create_stage
from imagen_jax.training import bad_steps, optim
from imagen_jax.training.bad_step_log import SPAN, BadSteps, ids_of
from imagen_jax.training.bad_steps import LEAST, WINDOW, Rules
from imagen_jax.training.metrics import of_skipped, row_of
from imagen_jax.training.state import initial_state
from imagen_jax.training.step import by_quartile, make_update
from imagen_jax.weights.leaves import flatten
from tests import quadratic, tiny

SKIP = dict(train__on_bad_step="skip")


def equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def updates_of(**changes):
    """(jitted update of `make_update`, first state) of the quadratic objective."""
    config, objective, optimizer, _ = quadratic.objective_and_step(**changes)
    rules = Rules.of(config["train"])
    rate = optim.learning_rate(config["optim"], config["train"]["steps"])
    update = jax.jit(make_update(optimizer, rate, config["optim"], rules))
    tracks = len(config["optim"]["ema_tracks"])
    return update, initial_state(objective, optimizer, 0, tracks, rules.has_window)


def gradient(norm):
    """A gradient of this norm."""
    return {"stem": {"kernel": jnp.zeros(quadratic.D).at[1].set(norm)}}


def test_a_skipped_step_changes_the_step_counter_alone():
    """Catches NaNs that reach the state, a flag that stays, and counters of the optimizer or the
    EMA, and with them the learning rate, that count the skipped step.
    """
    update, first = updates_of(optim__decay="cosine", optim__ema_tracks=(0.5,), **SKIP)
    state, metrics = update(first, jnp.float32(1.0), gradient(1.0))
    assert not metrics["skipped"]
    bad, metrics = update(state, jnp.float32(jnp.nan), gradient(1.0))
    assert metrics["skipped"] and int(bad.bad_step) == -1
    equal(bad, state.replace(step=state.step + 1))
    after, metrics = update(bad, jnp.float32(1.0), gradient(1.0))
    never, expected = update(state, jnp.float32(1.0), gradient(1.0))
    equal(after, never.replace(step=never.step + 1))
    assert metrics["optim/lr"] == expected["optim/lr"]


@pytest.mark.parametrize("loss, norm", [(np.inf, 1.0), (1.0, 1e30), (1.0, np.nan)])
def test_loss_and_gradient_are_both_checked(loss, norm):
    """Catches a check of the loss alone: a gradient overflows while the loss is finite."""
    update, state = updates_of(**SKIP)
    after, metrics = update(state, jnp.float32(loss), gradient(norm))
    assert metrics["skipped"]
    equal(after, state.replace(step=state.step + 1))


def test_without_spikes_the_state_has_no_window():
    """Catches a leaf in the checkpoints of runs that do not ask for it."""
    _, plain = updates_of()
    _, window = updates_of(train__spike_factor=3.0)
    assert flatten(window).keys() - flatten(plain).keys() == {"grad_norms"}
    assert {name.split("/")[0] for name in flatten(plain)} == {
        "step", "params", "ema", "opt_state", "bad_step"
    }  # fmt: skip


def test_the_median_of_a_partly_filled_window():
    """Catches a median that counts entries that are not there, an early decision, and a window that
    takes infinite norms or keeps the wrong end.
    """
    norms = np.random.default_rng(0).exponential(size=WINDOW + 20).astype(np.float32)
    window, push = bad_steps.empty_window(), jax.jit(bad_steps.push)
    median = jax.jit(bad_steps.median)
    for n, norm in enumerate(norms):
        expected = np.median(norms[max(0, n - WINDOW) : n]) if n >= LEAST else np.inf
        assert median(window) == pytest.approx(expected, rel=1e-6), n
        window = push(push(push(window, norm), jnp.float32(jnp.inf)), jnp.float32(jnp.nan))


@pytest.mark.parametrize("on_spike", ["log", "skip"])
def test_spikes_are_found_in_their_own_step(on_spike):
    """Catches a spike that is applied, one that is compared with itself, a norm after clipping, and
    a lasting rise after which every step is a spike.
    """
    update, state = updates_of(train__spike_factor=3.0, train__on_spike=on_spike, optim__clip=0.5)
    norms = [1.0] * LEAST + [2.9, 3.1] + [10.0] * WINDOW
    for n, norm in enumerate(norms):
        expected = n >= LEAST and norm > 3.0 * np.median(norms[max(0, n - WINDOW) : n])
        after, metrics = update(state, jnp.float32(1.0), gradient(norm))
        assert bool(metrics["spike"]) == expected, n
        if expected and on_spike == "skip":
            window = bad_steps.push(state.grad_norms, jnp.float32(norm))
            equal(after, state.replace(step=state.step + 1, grad_norms=window))
        else:
            assert (after.params["stem"]["kernel"] != state.params["stem"]["kernel"]).any()
        state = after
    assert not metrics["spike"]


def test_a_step_that_is_not_finite_is_no_spike():
    """Catches a NaN that `on_spike` answers, and a run that stops for good in silence."""
    update, state = updates_of(train__spike_factor=3.0, train__on_spike="skip")
    state = state.replace(grad_norms=jnp.ones(WINDOW))
    after, metrics = update(state, jnp.float32(jnp.nan), gradient(100.0))
    assert int(after.bad_step) == 0 and not metrics["spike"]


def test_a_factor_that_makes_most_steps_spikes_is_refused():
    """Catches a factor given as a share, such as 0.5."""
    train = tiny.config(train__spike_factor=0.5)["train"]
    with pytest.raises(ValueError, match="train.spike_factor is 0.5; it must exceed 1"):
        Rules.of(train)


def test_losses_by_quartile():
    """Catches quartiles in the order of t, edges of another density, and sums of all samples."""
    changes = dict(diffusion__density="logit_normal", diffusion__density_mean=1.0)
    stage = create_stage(tiny.config(**changes))
    u = np.linspace(0.001, 0.999, 64, dtype=np.float32)
    found = np.asarray(jax.jit(stage.noise_quartile)({"u": jnp.asarray(u)}))
    np.testing.assert_array_equal(found, 3 - np.floor(4 * u).astype(int))
    levels = np.asarray(stage.density(jnp.asarray(u)))
    assert levels[found == 0].max() < levels[found == 3].min()
    losses = np.random.default_rng(0).random(64).astype(np.float32)
    sums, counts = by_quartile(*(jnp.asarray(a.reshape(2, 32)) for a in (losses, found)))
    np.testing.assert_allclose(sums, [losses[found == i].sum() for i in range(4)], rtol=1e-5)
    np.testing.assert_array_equal(counts, [16, 16, 16, 16])


def test_a_row_is_made_of_applied_steps():
    """Catches a NaN in a row, a mean of means over unequal counts, a quartile without samples that
    has a value, and a row that is missing when all steps were skipped.
    """
    entry = lambda loss, norm, sums, counts: {
        "loss": loss, "norm/grad": norm, "loss_by_quartile": [sums, counts]
    }  # fmt: skip
    first = entry(1.0, 2.0, [3.0, 0.0, 1.0, 0.0], [2.0, 0.0, 1.0, 0.0])
    second = entry(2.0, 1.0, [1.0, 0.0, 1.0, 0.0], [4.0, 0.0, 3.0, 0.0])
    bad, spike = of_skipped(entry(np.nan, np.inf, [], [])), of_skipped(entry(5.0, 9.0, [], []))
    assert json.loads(json.dumps([bad, spike])) == [
        {"health/skipped": 1}, {"health/skipped": 1, "norm/grad": 9.0}
    ]  # fmt: skip
    means = {"loss": 1.5, "norm/grad": 1.5}
    quartiles = {"loss/logsnr_q1": 4 / 6, "loss/logsnr_q3": 0.5}
    skipped = {"health/skipped": 0}
    assert row_of([first, second], False) == means | {"norm/grad_max": 2.0} | quartiles
    assert row_of([first, second], True) == means | {"norm/grad_max": 2.0} | quartiles | skipped
    assert row_of([bad, first, spike, second], True) == means | quartiles | {
        "norm/grad_max": 9.0, "health/skipped": 2
    }  # fmt: skip
    assert row_of([bad, bad], True) == {"health/skipped": 2}
    older = {"loss": 3.0, "norm/grad": 1.0}  # of a checkpoint from before quartiles
    assert row_of([older], False) == older | {"norm/grad_max": 1.0}


def record(tmp_path, done=0, skipped=(), rows=(0, 1), **changes):
    config = tiny.config(train__on_bad_step="skip", seed=5, **changes)
    return BadSteps(config, rows, tmp_path, run_log.MetricsWriter(tmp_path, done), skipped)


def values(**changes):
    return {"bad_step": -1, "loss": 0.5, "norm/grad": 2.0} | changes


IDS = {"index": [4, 7], "caption_id": [8, 9]}


def test_the_record_of_a_bad_step(tmp_path):
    """Catches a row that misses the ids or the median, one for a good step, and metrics of the
    decision that reach metrics.jsonl.
    """
    log = record(tmp_path)
    good = values(skipped=False, spike=False, **{"norm/grad_median": 1.0})
    assert not log.see(1, good, IDS) and good.keys() == {"loss", "norm/grad"}
    nan = values(skipped=True, loss=float("nan"), **{"norm/grad": float("inf")})
    assert log.see(2, nan, IDS)
    assert not log.see(3, values(spike=True, **{"norm/grad_median": 0.1}), IDS | {"set": [1, 0]})
    first, second = run_log.read_metrics(tmp_path, BAD_STEPS)
    assert np.isnan(first.pop("loss")) and np.isinf(first.pop("norm/grad"))
    ids = {"seed": 5, "images": [4, 7], "captions": [8, 9]}
    assert first == {"step": 2, "reason": "not finite", "action": "skipped"} | ids
    assert second == {"step": 3, "reason": "spike", "action": "logged", "loss": 0.5} | ids | {
        "norm/grad": 2.0, "norm/grad_median": 0.1, "sets": [1, 0]
    }  # fmt: skip
    assert log.skipped == [2]
    record(tmp_path, done=2)  # a resume from step 2
    assert [row["step"] for row in run_log.read_metrics(tmp_path, BAD_STEPS)] == [2]


def test_the_ids_of_all_processes_in_the_order_of_the_batch(tmp_path, monkeypatch):
    """Catches ids in the order of processes, and rows twice that two processes hold."""
    others = json.dumps([[2, 0], {"index": [12, 10], "caption_id": [22, 20]}])
    monkeypatch.setattr(agreement, "gather", lambda text: [text, others, others])
    batch = {"index": np.array([11, 13]), "caption_id": np.array([21, 23]), "image": np.zeros(2)}
    record(tmp_path, rows=(1, 3)).see(1, values(skipped=True), ids_of(batch))
    (row,) = run_log.read_metrics(tmp_path, BAD_STEPS)
    assert row["images"] == [10, 11, 12, 13] and row["captions"] == [20, 21, 22, 23]


def test_too_many_skips_end_the_run(tmp_path):
    """Catches a limit that is off by one, counts spikes that were only logged, forgets the skips
    before a resume, or counts those of more than SPAN steps ago.
    """
    log = record(tmp_path, skipped=[1, 2], train__max_skips=3)
    log.see(3, values(spike=True), IDS)
    log.see(SPAN, values(skipped=True), IDS)
    assert log.see(SPAN + 1, values(skipped=True), IDS)  # step 1 no longer counts
    assert log.see(SPAN + 2, values(skipped=True), IDS)
    with pytest.raises(FloatingPointError, match="4 of the last 1000.*bad_steps.jsonl") as error:
        log.see(SPAN + 3, values(skipped=True), IDS)
    assert exit_codes.of(error.value) == exit_codes.NOT_FINITE and "\n" not in str(error.value)
    assert run_log.read_metrics(tmp_path, BAD_STEPS)[-1]["step"] == SPAN + 3


def test_a_run_that_stops_reports_the_batch_in_flight(tmp_path):
    """Catches a report of the batch of another step, and one that misses the set of an image."""
    log = record(tmp_path)
    with pytest.raises(FloatingPointError, match="of step 6 is not finite"):
        log.see(7, values(bad_step=6), IDS | {"set": [0, 1]})
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report == {
        "step": 6, "seed": 5, "images": [4, 7], "captions": [8, 9], "sets": [0, 1]
    }  # fmt: skip
    assert not (tmp_path / BAD_STEPS).exists()
