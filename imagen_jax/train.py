r"""Trains one stage of the cascade from a config.

    python -m imagen_jax.train --config configs/base_64.py:demo --config.data.path=PREPARED \
        --workdir WORKDIR

Running the same command again resumes from the newest intact checkpoint. On CPUs the losses are
then bit-identical to those of an uninterrupted run. SIGTERM saves and exits. For a multi-host run,
start the same command on each host, with the same WORKDIR on a shared file system (see
imagen_jax/distributed/startup.py); a signal to one process stops all after the same step.
imagen_jax/exit_codes.py lists the exit codes.
"""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from imagen_jax import cli, field, goodput, output_paths, wandb_log
from imagen_jax.distributed import agreement, device_faults, host_failures, shared_files
from imagen_jax.distributed.watch import Watch
from imagen_jax.locks import only_process
from imagen_jax.object_storage import AnyPath, check_bucket, in_bucket
from imagen_jax.storage import absolute, as_path, check_local, check_utf8, write_json
from imagen_jax.training.start_flags import Start

log = logging.getLogger("imagen_jax.train")


def define_flags() -> None:
    """The command line, see `cli.run`."""
    cli.define_compile_cache()
    config_flags.DEFINE_config_file(
        "config", None, "config file, with fields as --config.optim.lr=3e-4", lock_config=True
    )
    flags.DEFINE_string("workdir", None, "directory of the run: checkpoints, metrics.jsonl, images")
    flags.DEFINE_integer(
        "overfit",
        0,
        "self-test: train for this number of steps on one batch, without checkpoints; fails unless"
        " the loss falls below a quarter of its first value",
        lower_bound=0,
    )
    flags.DEFINE_string(
        "profile", "", "FIRST:COUNT, writes a profiler trace of these steps to workdir/profile"
    )
    flags.DEFINE_float(
        "minutes",
        0.0,
        "save and stop after this time, as after SIGTERM; it includes the compilation; 0: no limit",
        lower_bound=0,
    )
    cli.define_processes()
    flags.DEFINE_string(
        "init_from",
        "",
        "start a new run from these weights: a workdir, a checkpoint, an exported file, or"
        " embedded:NAME",
    )
    flags.DEFINE_string(
        "init_part",
        "",
        "regular expression: take only the weights of --init_from whose paths it matches, such as"
        " '^(down_|mid/)', and initialise the others",
    )
    flags.DEFINE_string(
        "fork",
        "",
        "WORKDIR@STEP, or WORKDIR for its newest step: start a new run from the whole state of"
        " another one, with optimizer and EMAs; any field of the config may differ",
    )


def main() -> int:
    from imagen_jax.data import sets

    args = flags.FLAGS
    cli.log_to_stderr()
    if args.config is None or args.workdir is None:
        raise ValueError("--config FILE and --workdir DIR are both needed")
    config, workdir = (
        cli.stage_config(args.config),
        output_paths.output_directory("workdir", args.workdir),
    )
    for one in sets.data_sets(config["data"]):
        flag = f"--config.data.{'path' if config['data']['path'] else 'mixture'}"
        path = as_path(flag, one.path)
        check_bucket(flag, path)
        if not in_bucket(path):
            check_utf8(flag, one.path)
    check_local("--config.train.fast_dir", config["train"]["fast_dir"])
    if config["train"]["fast_every"]:
        fast_dir = os.path.expanduser(config["train"]["fast_dir"])
        output_paths.make_directory("config.train.fast_dir", fast_dir)
    wandb_log.check(config["train"]["wandb"])
    profile = read_profile(args.profile, config["train"]["steps"])
    start = Start(args.init_from, args.init_part, args.fork)
    if args.overfit and (args.profile or args.minutes or start != Start()):
        raise ValueError(
            "--overfit does not take --profile, --minutes, --init_from or --fork: omit them"
        )
    if args.overfit:
        config, workdir = self_test(config, args.overfit), workdir / "overfit"
    with cli.processes() as watch:
        began = time.monotonic() - goodput.process_age()
        return train(config, workdir, profile, args.minutes, start, watch, args.overfit, began)


def read_profile(text: str, steps: int) -> tuple[int, int]:
    """(first, count) of FIRST:COUNT; no steps for an empty text.

    steps: number of steps of the whole run.
    """
    first, _, count = (text or "0:0").partition(":")
    if not (first.isdecimal() and count.isdecimal()):
        raise ValueError(f"--profile {text} is not FIRST:COUNT, such as 20:5")
    if text and (int(first) >= steps or not int(count)):
        raise ValueError(f"--profile {text} traces none of the {steps} steps of the run")
    return int(first), int(count)


def train(
    config: Mapping[str, Any],
    workdir: AnyPath,
    profile: tuple[int, int],
    minutes: float,
    start: Start,
    watch: Watch,
    overfit: int = 0,
    began: float | None = None,
) -> int:
    """Trains to step config["train"]["steps"], or until a signal or the time limit.

    Returns the exit code. All processes run the same code in the same order. Only process 0 writes
    the metrics.

    config: a complete config (`schema.complete` with new=True). profile: (first, count) of the
    traced steps. minutes: the time limit, 0 for none. start: what a new run starts
    from. overfit: trains for this number of steps on one batch instead, without checkpoints, and
    returns the `verdict`; config is then that of `self_test`. began: when the command began, by
    time.monotonic(); None for now.
    """
    import jax

    from imagen_jax import run_log
    from imagen_jax.training import resume
    from imagen_jax.training.metrics import TrainingMetrics
    from imagen_jax.training.replicas import Replicas
    from imagen_jax.training.run import Run
    from imagen_jax.training.sample_grids import SampleGrid
    from imagen_jax.training.start import begin, check_source
    from imagen_jax.training.trace import Requests, Trace
    from imagen_jax.training.validation import Validation
    from imagen_jax.weights.checkpoint import CheckpointError, Checkpoints
    from imagen_jax.weights.fast_checkpoints import FastCheckpoints, run_name
    from imagen_jax.weights.retention import Retention

    settings, first = config["train"], jax.process_index() == 0
    total, validate_every = overfit or settings["steps"], settings["validate_every"]

    # Check that a resume continues the run, that mesh, data and program fit each other, and that
    # all processes have the same settings.
    checkpoints = Checkpoints(workdir / "checkpoints", Retention.of(settings))
    if not overfit:
        agreement.check_in_first(lambda: resume.check_newest(checkpoints, config))
        agreement.check_in_first(lambda: check_source(start, checkpoints))
    run = Run.create(config, overfit=bool(overfit))
    agreement.check(
        {f"config.{name}": json.dumps(value) for name, value in field.flat(config).items()}
        | {
            "prepared data": run.meta["manifest_hash"],
            **{f"--{name}": value for name, value in dataclasses.asdict(start).items()},
            "--workdir": str(absolute(workdir)),
        }
    )
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(only_process(workdir, "training in"))
        ledger = stack.enter_context(goodput.Ledger(workdir, first, began))
        requests = stack.enter_context(Requests(workdir, first))
        project = settings["wandb"] if first else ""
        wandb = stack.enter_context(wandb_log.WandbLog(workdir, project, config))
        shared_files.check_shared(workdir)
        stack.enter_context(recorded_failures(workdir, watch))
        stop = stop_requests(minutes)

        # State: restored from the newest intact checkpoint, or fresh.
        watch.at(0, "restoring")
        ledger.at(0, "restore")
        fast = None
        if settings["fast_every"] and not overfit:
            place = settings["fast_dir"], run_name(workdir)
            fast = stack.enter_context(FastCheckpoints(*place, run.program.abstract))
        begun = begin(run, checkpoints, fast, start, workdir)
        if begun is None:
            return 0
        state, done, origin = begun.state, begun.done, begun.origin
        if first:
            write_json(workdir / "config.json", config)

        # Steps: one per image size, compiled before the loop, so that its first steps take as long
        # as the others.
        watch.at(done, "compiling")
        ledger.at(done, "compile")
        steps = run.compile_steps()
        # Wait until all processes have compiled; otherwise collective operations of the first step
        # may time out.
        agreement.gather()

        # Loop.
        ledger.at(done, "other")
        data = run.batches(done, run.rows)
        stack.callback(data.close)
        program = run.program
        inputs = config, program.stage, program.mesh, run.evaluation_text
        grid = SampleGrid(*inputs) if settings["sample_every"] else None
        validation = Validation(*inputs) if validate_every else None
        replicas = Replicas(program.mesh, program.abstract, program.shardings)
        share = (
            "%.0f %% of the state's bytes are replicated; replicas are compared before every save"
        )
        log.info(share, 100 * replicas.compared)
        progress = stack.enter_context(
            run_log.Progress(config["name"], total, done, quiet=not first)
        )
        metrics = stack.enter_context(
            TrainingMetrics(run, workdir, done, begun.unlogged, begun.skipped, progress, origin)
        )
        del begun  # it holds the first state
        metrics.writer.begin(config, wandb)
        planned = profile if first else (0, 0)
        trace = stack.enter_context(Trace(workdir / "profile", *planned, requests))
        stack.enter_context(jax.transfer_guard("disallow"))
        stack.enter_context(checkpoints)

        measured: tuple[int, dict[str, float]] = done, {}  # by the last validation, after this step

        @contextlib.contextmanager
        def blocked(category: str) -> Iterator[None]:
            """Work between two steps, which is not time of a step."""
            with ledger.phase(done, category), metrics.clock.pause(), jax.transfer_guard("allow"):
                yield

        def save(target: Checkpoints | FastCheckpoints = checkpoints) -> None:
            """Saves a state after which the run goes on, and whose replicas agree."""
            watch.at(done, "saving")
            metrics.settle()
            with blocked("checkpoint"):
                replicas.check(state, done)
                if target is checkpoints:
                    try:
                        checkpoints.wait()
                    except CheckpointError as error:  # a full disk may have room again
                        log.error("%s; training continues and saves step %d now", error, done)
                meta = run.meta | origin | metrics.meta
                meta |= {"measures": measured[1] if measured[0] == done else {}}
                target.save(done, state, meta, before_commit=metrics.writer.flush)

        stack.enter_context(device_faults.named(lambda: done))
        ledger.at(done, "step")
        while done < total and not stop(done):
            trace.before(done)
            watch.at(done, "reading a batch")
            with ledger.phase(done, "data"), metrics.clock.waiting():
                images = next(data)
            bucket, batch = run.bucket_of(images), run.place(images)
            watch.at(done, "training")
            state, step_metrics = steps[bucket](state, batch)
            done += 1
            metrics.add(done, step_metrics, bucket, images)
            trace.after(done, metrics.settle)
            if grid and done % settings["sample_every"] == 0:
                watch.at(done, "drawing samples")
                metrics.settle()
                with blocked("evaluation"):
                    metrics.writer.image(done, "ema", grid.sample(state.ema))
            if validation and (done % validate_every == 0 or done == total):
                watch.at(done, "validating")
                metrics.settle()
                with blocked("evaluation"):
                    row = validation.run(state, done)
                    metrics.writer.validation(done, row)
                    measured = done, validation.measures(row)
            if done % settings["save_every"] == 0:
                save()
            elif fast and done % settings["fast_every"] == 0:
                save(fast)
        if overfit:
            metrics.settle()
            return verdict([row["loss"] for row in metrics.unlogged], overfit)
        save()
        ledger.at(done, "checkpoint")
        checkpoints.wait()
        if fast and done >= total:
            fast.clear()
        ledger.at(done, "other")
    log.info("%s: %d of %d steps done, saved in %s", config["name"], done, total, workdir)
    return 0


@contextlib.contextmanager
def recorded_failures(workdir: AnyPath, watch: Watch) -> Iterator[None]:
    """Names hosts that failed in earlier attempts; records failures while the context lasts."""
    import jax

    if jax.process_index() == 0:
        for line in host_failures.advice(host_failures.read(workdir)):
            log.warning("%s", line)
    attempt = f"{int(time.time())}-{os.urandom(2).hex()}"
    watch.failures = host_failures.HostFailures(workdir, agreement.gather(attempt)[0])
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:  # with several, `watch` records it
            watch.failures.record_own(error)
        raise


def stop_requests(minutes: float) -> Callable[[int], bool]:
    """A function of the steps done: whether to stop, after SIGTERM, SIGINT or the time limit.

    In a multi-process run, all processes call it at every step, and it returns True in all of them
    after the same step: JAX announces the SIGTERM of one process to all and picks a step that no
    process has passed. SIGINT and the time limit are turned into a SIGTERM.
    """
    import jax
    from jax.experimental import multihost_utils

    requests, several = [], jax.process_count() > 1
    first: list[int] = []  # the steps done at the first call
    terminate = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    note = lambda received, _: requests.append(received)
    signal.signal(signal.SIGINT, terminate if several else note)
    if not several:
        signal.signal(signal.SIGTERM, note)  # with several, jax has its own handler
    end = time.monotonic() + 60 * minutes

    def stop(done: int) -> bool:
        first[:] = first or [done]
        if not requests and minutes > 0 and time.monotonic() > end:
            requests.append("minutes")
            if done == first[0]:
                why = "--minutes %g passed before the first step: it includes the start; give more"
                log.warning(why, minutes)
            if several:
                terminate()
        return multihost_utils.reached_preemption_sync_point(done) if several else bool(requests)

    return stop


def self_test(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The config of --overfit: warm-up over 1/20 of the steps; no output but the verdict.

    It stops at a step that is not finite: its only batch cannot be skipped.
    """
    never = steps + 1
    train_section = {"log_every": never, "save_every": never}
    train_section |= {"sample_every": 0, "validate_every": 0, "wandb": ""}
    train_section |= {"on_bad_step": "stop", "spike_factor": 0.0}
    return dict(config) | {
        "optim": dict(config["optim"]) | {"warmup": max(1, steps // 20)},
        "train": dict(config["train"]) | train_section,
    }


def verdict(losses: Sequence[float], steps: int) -> int:
    """The exit code of --overfit: 0 if the loss fell below a quarter of its first value, else 1.

    losses: of every step. The loss falls only if model, loss, optimizer and data work together
    correctly.
    """
    if len(losses) < steps:
        log.info("overfit: stopped after %d of %d steps", len(losses), steps)
        return 1
    last = losses[-max(1, steps // 10) :]
    before, after = losses[0], sum(last) / len(last)
    passed = after < before / 4
    outcome = "passed" if passed else "FAILED"
    log.info("overfit: loss %.4f at first, %.4f at the end: %s", before, after, outcome)
    return 0 if passed else 1


if __name__ == "__main__":
    cli.run(define_flags, main)
