"""The state that a training begins with.

That is a checkpoint of the run, or the first state of a new run, which is random, from other
weights, or a copy of another run's state.
"""

import collections
import contextlib
import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from imagen_jax import cascade, encoder_identity
from imagen_jax.object_storage import AnyPath
from imagen_jax.stage import RNG
from imagen_jax.storage import as_path, check_object, exists, write_json
from imagen_jax.training import resume, state
from imagen_jax.training.run import Run
from imagen_jax.training.start_flags import Start
from imagen_jax.weights import checkpoint, leaves, step_directories
from imagen_jax.weights.checkpoint import Checkpoints
from imagen_jax.weights.fast_checkpoints import FastCheckpoints
from imagen_jax.weights.retention import Retention

log = logging.getLogger("imagen_jax.train")

FILE = "origin.json"  # of a workdir whose run did not start from random weights


@dataclasses.dataclass(frozen=True)
class Begun:
    """What a training begins or continues with.

    state: on the mesh. done: its number of steps. unlogged: metrics that are in no row yet.
    skipped: skipped steps that still count for `train.max_skips`. origin: of the weights, to store
    in checkpoints.
    """

    state: state.TrainState
    done: int
    unlogged: Sequence[Mapping[str, Any]]
    skipped: Sequence[int]
    origin: Mapping[str, Any]


def begin(
    run: Run,
    checkpoints: Checkpoints,
    fast: FastCheckpoints | None,
    start: Start,
    workdir: AnyPath,
) -> Begun | None:
    """Restores the newest intact checkpoint, or makes the first state. All processes call it.

    None if the run has all its steps. Raises ValueError if this command would continue another run,
    or if weights or state do not fit.
    """
    newest, newest_fast = checkpoints.latest_good(), fast.newest() if fast else None
    if newest is None and newest_fast is None:
        log.info("initialising the state")
        first, done, origin = first_state(run, start, workdir)
        return Begun(first, done, [], [], origin)
    from_fast = newest_fast is not None and (newest is None or newest_fast > newest)
    done, source = (newest_fast, fast) if from_fast else (newest, checkpoints)
    saved, total = source.meta(done), run.config["train"]["steps"]
    kept = _check_resume(run, saved, workdir, start)
    if done >= total:
        reached = "%s has %d steps already, train.steps is %d: nothing to do"
        log.info(reached, workdir, done, total)
        return None
    restored = run.restore(source, done, saved)
    log.info("resuming from step %d%s", done, ", a fast checkpoint" if from_fast else "")
    return Begun(restored, done, *kept)


def _check_resume(
    run: Run, saved: Mapping[str, Any], workdir: AnyPath, start: Start
) -> tuple[list[dict[str, Any]], list[int], dict[str, Any]]:
    """What a run continues with, from a checkpoint's meta.

    Returns (metrics not yet written to a row, skipped steps that still count, origin of the
    weights).

    Raises ValueError if this command would continue another run.
    """
    # Not in older checkpoints, which used this one, nor in those of a run without data.mixture.
    # The skipped steps are only in those of a run that has skipped some.
    saved = {"rng": RNG, "mixture_hashes": [], "skipped_steps": []} | saved
    fields = dict.fromkeys(run.meta, object) | {"unlogged": list, "skipped_steps": list}
    check_object(f"the newest checkpoint of {workdir}", saved, fields, "give a new --workdir")
    for line in resume.check({name: saved[name] for name in run.meta}, run.meta):
        log.info("changed since the checkpoint: %s", line)
    origin = {name: saved[name] for name in ("init_from", "fork") if name in saved}
    start.check_origin(origin, workdir)
    return saved["unlogged"], saved["skipped_steps"], origin


def check_source(start: Start, checkpoints: Checkpoints) -> None:
    """Raises ValueError if a new run would start from a checkpoint that does not exist.

    checkpoints: of the run; one that has some does not need its source any more.
    """
    if step_directories.steps(checkpoints.directory):
        return
    if start.fork:
        _source_of_fork(start.fork)
    elif start.init_from and not start.init_from.startswith("embedded:"):
        directory, step = checkpoint.split_step(as_path("--init_from", start.init_from))
        if step is None and not exists(directory):
            raise ValueError(f"--init_from {start.init_from} does not exist: check the path")


def _source_of_fork(fork: str) -> tuple[AnyPath, Checkpoints, int]:
    """(workdir, its checkpoints, step) of a fork's parent."""
    directory, step = checkpoint.split_step(as_path("--fork", fork))
    parent = Checkpoints(checkpoint.step_parent(directory), Retention(1))
    if step is None and (step := parent.latest_good()) is None:
        raise ValueError(f"--fork {fork} holds no checkpoint: give WORKDIR@STEP of a training")
    return directory, parent, step


def first_state(
    run: Run, start: Start, workdir: AnyPath
) -> tuple[state.TrainState, int, dict[str, Any]]:
    """(state, number of steps done, origin to store in checkpoints) of a new run.

    Writes the origin to workdir/origin.json. All processes call it.

    Raises ValueError if weights or state do not fit the model or the text encoder of the data.
    """
    if start.fork:
        first, done, origin = _forked(run, start.fork)
    else:
        done = 0
        first, origin = _initial(run, start)
    if origin and jax.process_index() == 0:
        write_json(workdir / FILE, origin)
    return first, done, origin


def _initial(run: Run, start: Start) -> tuple[state.TrainState, dict[str, Any]]:
    """The state of a run that starts with step 0, and its origin."""
    program = run.program
    initial = state.create_state(
        program.stage, program.optimizer, run.config["seed"], program.shardings
    )
    if not start.init_from:
        return initial, {}
    params, meta = checkpoint.load_params(cascade.resolve(start.init_from))
    _check_encoder(run, meta, start.init_from)
    origin = {name: meta[name] for name in ("step", "which", "sha256")}
    origin |= {"path": start.init_from}
    if start.init_part:
        params, parts = _merge(initial.params, params, start.init_part)
        origin |= {"part": start.init_part, **parts}
    return state.with_params(initial, params, program.shardings), {"init_from": origin}


def _merge(
    initial: leaves.Tree, loaded: leaves.Tree, pattern: str
) -> tuple[leaves.Tree, dict[str, list[str]]]:
    """(the model's parameters, those that match `pattern` replaced by loaded ones; lists of paths).

    The lists are "taken", "skipped" (loaded and not used) and "initialised".

    Raises ValueError if nothing matches, or something that matches does not fit.
    """
    model, found = leaves.flatten(initial), leaves.flatten(loaded)
    matching = [name for name in found if re.search(pattern, name)]
    if not matching:
        raise ValueError(
            f"--init_part {pattern!r} matches none of the {len(found)} weights, such as"
            f" {next(iter(found))}"
        )
    wrong = [name for name in matching if name in model and found[name].shape != model[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"--init_part {pattern!r} takes {len(wrong)} weights that do not fit the model, {name}"
            f" first: it is {found[name].shape}, the model has {model[name].shape}; give a pattern"
            " without them"
        )
    taken = [name for name in matching if name in model]
    if not taken:
        raise ValueError(
            f"--init_part {pattern!r} matches {len(matching)} weights that the model does not have,"
            f" such as {matching[0]}"
        )
    lists = {
        "taken": taken,
        "skipped": sorted(found.keys() - set(taken)),
        "initialised": sorted(model.keys() - set(taken)),
    }
    _log_parts(lists)
    merged = {name: found[name] if name in set(taken) else leaf for name, leaf in model.items()}
    return leaves.unflatten(merged), lists


def _log_parts(lists: Mapping[str, Sequence[str]]) -> None:
    """Logs the number of weights of each list, by the first two parts of their paths."""
    for kind, names in lists.items():
        groups = collections.Counter("/".join(name.split("/")[:2]) for name in names)
        counts = ", ".join(f"{group} ({count})" for group, count in groups.items())
        log.info("%s: %d weights%s", kind, len(names), f": {counts}" if counts else "")


def _forked(run: Run, fork: str) -> tuple[state.TrainState, int, dict[str, Any]]:
    """(state, its step, origin) of a run that continues another one."""
    directory, parent, step = _source_of_fork(fork)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(step_directories.marked(parent.directory / str(step)))
        meta = parent.meta(step)
        _check_encoder(run, meta, fork)
        try:
            forked = run.restore(parent, step, meta)
        except ValueError as error:
            if isinstance(error, checkpoint.CheckpointError):
                raise
            raise ValueError(
                f"--fork needs the same model, optimizer and EMAs: {error}; start from its weights"
                " with --init_from"
            ) from error
    log.info("forked from step %d of %s", step, directory)
    origin = {"path": fork, "step": step, "run": meta["config"]["name"]}
    origin["examples"] = examples_seen(step, meta["config"]["data"]["batch_size"], meta)
    origin |= {"origin": {name: meta[name] for name in ("init_from", "fork") if name in meta}}
    return forked, step, {"fork": origin}


def examples_seen(step: int, batch_size: int, origin: Mapping[str, Any]) -> int:
    """The number of images that a state has been trained on.

    A fork may have another batch size than its parent.

    origin: that of its run, as in checkpoints.
    """
    fork = origin.get("fork", {})
    forked = fork.get("step", 0)
    # Origins of earlier versions lack it.
    before = fork.get("examples", forked * batch_size)
    return before + (step - forked) * batch_size


def _check_encoder(run: Run, meta: Mapping[str, Any], given: str) -> None:
    """Raises ValueError if weights were trained with another text encoder than the data's."""
    theirs, ours = map(encoder_identity.from_record, (meta["encoder"], run.meta["encoder"]))
    texts, who = run.program.stage.texts, f"{given} and the data"
    remedy = "use weights that were trained with the data's text encoder"
    encoder_identity.check_same(texts, theirs, ours, who, remedy)
