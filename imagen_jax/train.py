r"""Trains one stage of the cascade, any of them, from a config.

    python -m imagen_jax.train --config configs/base_64.py:demo --config.data.path=PREPARED \
        --workdir WORKDIR

The same command again resumes: the run goes on from its newest intact checkpoint as if it had never
stopped. SIGTERM saves and exits. On several hosts the same command runs on each, with the same
WORKDIR on a file system they share (see imagen_jax/distributed/startup.py); a signal to any of them
stops all after the same step. The exit code is 75 where nothing was wrong but with another process.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from imagen_jax import cli, distributed, schema
from imagen_jax.distributed import agreement
from imagen_jax.distributed.watch import Watch
from imagen_jax.storage import check_local, only_process, write_json

# steps the device may be behind the host: it never waits for work, and a signal is answered within
# this many steps
IN_FLIGHT = 2
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
        "self-test: train this many steps on one batch, saving nothing; fails unless the loss falls"
        " to a quarter",
        lower_bound=0,
    )
    flags.DEFINE_string(
        "profile", "", "FIRST:COUNT, writes a profiler trace of these steps to workdir/profile"
    )
    flags.DEFINE_float(
        "minutes", 0.0, "stop after this long, saving, as if by SIGTERM; 0: no limit"
    )
    flags.DEFINE_float(
        "host_timeout", 300.0, "seconds to wait at the start for the other processes", lower_bound=1
    )
    flags.DEFINE_float(
        "host_lost",
        100.0,
        "seconds without a sign of life until a process is given up; after half of them it is"
        " named",
        lower_bound=4,
    )
    flags.DEFINE_string(
        "init_from",
        "",
        "start a new run from these weights: a workdir, a checkpoint, an exported file, or"
        " embedded:NAME",
    )


def main() -> int:
    args = flags.FLAGS
    cli.log_to_stderr()
    if args.config is None or args.workdir is None:
        raise ValueError("--config FILE and --workdir DIR are both needed")
    config = cli.data_config(args.config)
    check_local("--config.data.path", config["data"]["path"])
    check_local("--init_from", args.init_from)
    cli.check_directory("workdir", args.workdir)
    profile = read_profile(args.profile)
    cli.set_up_jax()
    distributed.start(args.host_timeout, args.host_lost)
    cli.check_platform()
    with Watch(args.host_lost) as watch:
        if args.overfit:
            return overfit(config, args.overfit, watch)
        return train(config, Path(args.workdir), profile, args.minutes, args.init_from, watch)


def read_profile(text: str) -> tuple[int, int]:
    """(first, count) of FIRST:COUNT; no steps for an empty text."""
    first, _, count = (text or "0:0").partition(":")
    if not (first.isdigit() and count.isdigit()):
        raise ValueError(f"--profile {text} is not FIRST:COUNT, such as 20:5")
    return int(first), int(count)


def train(
    config: Mapping[str, Any],
    workdir: Path,
    profile: tuple[int, int],
    minutes: float,
    init_from: str,
    watch: Watch,
) -> int:
    """Trains until config["train"]["steps"], a signal or the time limit; 0 if all is saved.
    `init_from` is where a new run begins.
    """
    import jax

    run = Run.create(config)
    same = {
        "config": json.dumps(config),
        "prepared data": run.meta["manifest_hash"],
        "--init_from": init_from,
        "--workdir": str(workdir.absolute()),
    }
    agreement.check(same)
    with (
        only_process(workdir, "training in")
        if jax.process_index() == 0
        else contextlib.nullcontext()
    ):
        agreement.check_shared(workdir)
        return advance(run, workdir, profile, stop_requests(minutes), init_from, watch)


def advance(
    run: "Run",
    workdir: Path,
    profile: tuple[int, int],
    stop: Callable[[int], bool],
    init_from: str,
    watch: Watch,
) -> int:
    """`train` in a workdir that no other run writes to. With several processes, all do the same in
    the same order; process 0 alone writes the record.
    """
    import jax

    from imagen_jax import run_log
    from imagen_jax.data import pipeline
    from imagen_jax.stage import RNG
    from imagen_jax.training import replicas, resume
    from imagen_jax.training.sample_grids import SampleGrid
    from imagen_jax.weights import checkpoint

    config = run.config
    total, settings = config["train"]["steps"], config["train"]

    # Restore, or begin.
    watch.at(0, "restoring")
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=settings["keep"])
    newest = checkpoints.latest_good()
    if newest is None:
        state, begun, unlogged = *run.fresh_state(init_from), []
    else:
        saved = {"rng": RNG} | checkpoints.meta(
            newest
        )  # older ones were made with JAX's default, the same
        for line in resume.check({k: saved[k] for k in run.meta}, run.meta):
            log.info("changed since the checkpoint: %s", line)
        begun, unlogged = {k: saved[k] for k in ("init_from",) if k in saved}, saved["unlogged"]
        if init_from and begun.get("init_from", {}).get("path") != init_from:
            raise ValueError(
                f"{workdir} holds a run that did not start from {init_from}; give a new --workdir"
            )
        if newest >= total:
            log.info(
                "%s has %d steps already, train.steps is %d: nothing to do", workdir, newest, total
            )
            return 0
        state, _ = checkpoints.restore(newest, run.program.abstract)
        log.info("resuming from step %d", newest)
    done, first = newest or 0, jax.process_index() == 0
    if first:
        write_json(workdir / "config.json", config)

    # Compile, so that the loop's first step costs what the others do.
    watch.at(done, "compiling")
    started = time.monotonic()
    step = run.program.lower().compile()
    log.info("step compiled in %.0f s", time.monotonic() - started)
    # the first step waits for the slowest compilation, for which collective operations may be too
    # impatient
    agreement.gather()

    data = pipeline.batches(config["data"], config["seed"], done, "train", run.rows)
    grid = (
        SampleGrid(config, run.program.stage, run.program.mesh)
        if settings["sample_every"]
        else None
    )
    copies = replicas.Replicas(run.program.mesh, run.program.abstract, run.program.shardings)
    log.info(
        "%.0f %% of the state's bytes are on several devices, and compared before every save",
        100 * copies.compared,
    )

    def save() -> None:
        watch.at(done, "saving")
        # nothing is saved before every step's metrics were seen to be finite, and all copies to
        # agree
        record.settle()
        with record.clock.pause(), jax.transfer_guard("allow"):
            copies.check(state, done)
            try:
                checkpoints.wait()
            except (
                checkpoint.CheckpointError
            ) as error:  # a full disk now need not end a run that may save later
                log.error("%s; training goes on, the next save is step %d", error, done)
            checkpoints.save(done, state, run.meta | begun | {"unlogged": record.unlogged})

    with (
        run_log.Progress(config["name"], total, done, quiet=not first) as progress,
        Record(run, workdir, done, unlogged, progress) as record,
        Profile(workdir / "profile", *(profile if first else (0, 0))) as trace,
        jax.transfer_guard("disallow"),
        finishing(checkpoints),
    ):
        while done < total and not stop(done):
            trace.before(done)
            watch.at(done, "reading a batch")
            batch = run.place(next(data))
            watch.at(done, "training")
            state, step_metrics = step(state, batch)
            done += 1
            record.add(done, step_metrics)
            trace.after(done, record.settle)
            if grid and done % settings["sample_every"] == 0:
                watch.at(done, "drawing samples")
                record.settle()
                with record.clock.pause(), jax.transfer_guard("allow"):
                    record.writer.image(done, "ema", grid.draw(state.ema))
            if done % settings["save_every"] == 0:
                save()
        save()
        checkpoints.wait()
    data.close()
    log.info("%s: %d of %d steps done, saved in %s", config["name"], done, total, workdir)
    return 0


@contextlib.contextmanager
def finishing(checkpoints: Any) -> Iterator[None]:
    """Lets a save that is under way end before an error that all processes have at the same step
    ends them: a loss that is not finite, copies that differ.
    """
    from imagen_jax.training import replicas
    from imagen_jax.weights import checkpoint

    try:
        yield
    except (FloatingPointError, replicas.Drift):
        try:
            checkpoints.wait()
        except checkpoint.CheckpointError as error:
            log.error("%s", error)
        raise


class Record:
    """Metrics of the steps, fetched IN_FLIGHT steps late so that the device always has work queued;
    a row is the mean over `log_every`.

    `unlogged` are the steps since the last row. They are saved with a checkpoint, so that the first
    row after a resume is the one an undisturbed run writes; a run that stops between two rows
    writes what it has, and a resume replaces that.
    """

    def __init__(
        self, run: "Run", workdir: Path, done: int, unlogged: list[dict[str, float]], progress: Any
    ):
        import jax

        from imagen_jax import run_log

        self._run, self._workdir, self._progress = run, workdir, progress
        self._pending: collections.deque = collections.deque()
        self._seen, self._settling, self.unlogged = done, False, list(unlogged)
        self.writer = run_log.MetricsWriter(
            workdir, done - len(unlogged), enabled=jax.process_index() == 0
        )
        self.clock = run_log.StepClock(run.config["data"]["batch_size"], done)

    def add(self, step: int, device_metrics: Mapping[str, Any]) -> None:
        self._pending.append((step, device_metrics))
        if len(self._pending) > IN_FLIGHT:
            self._take()

    def settle(self) -> None:
        """Waits for every step so far. Raises FloatingPointError if one was not finite."""
        self._settling = True
        while self._pending:
            self._take()
        self._settling = False

    def _take(self) -> None:
        import jax

        step, device_metrics = self._pending.popleft()
        values = {name: value.item() for name, value in jax.device_get(device_metrics).items()}
        bad = int(values.pop("bad_step"))
        if bad >= 0:
            raise FloatingPointError(report_bad_step(self._run, self._workdir, bad))
        self._seen = step
        self.unlogged.append(values)
        self._progress.update(self._seen, loss=values["loss"])
        if self._seen % self._run.config["train"]["log_every"] == 0:
            self._write()
            self.unlogged = []

    def _write(self) -> None:
        means = {
            name: sum(values[name] for values in self.unlogged) / len(self.unlogged)
            for name in self.unlogged[0]
        }
        # When all steps in flight are fetched at once, the time between two of them is not the time
        # a step takes.
        timed = not self._settling or len(self.unlogged) > IN_FLIGHT
        self.writer.scalars(
            self._seen, means | (self._run.rates(self.clock.read(self._seen)) if timed else {})
        )

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        if self.unlogged:
            self._write()
        self.writer.close()


class Profile:
    """A profiler trace of `count` steps after step `first`, or of those that this process does of
    them.
    """

    def __init__(self, directory: Path, first: int, count: int):
        self._directory, self._first, self._last, self._on = directory, first, first + count, False

    def before(self, done: int) -> None:
        import jax

        if self._first <= done < self._last and not self._on:
            jax.profiler.start_trace(str(self._directory))
            self._on = True

    def after(self, done: int, settle: Callable[[], None]) -> None:
        if self._on and done >= self._last:
            settle()
            self._stop()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        import jax

        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            log.info("trace of steps from %d in %s", self._first, self._directory)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config becomes before the first step: stage, mesh, shardings, compiled functions."""

    config: Mapping[str, Any]
    meta: Mapping[str, Any]
    program: Any
    flops_per_image: float
    peak_flops: float

    @classmethod
    def create(cls, config: Mapping[str, Any]) -> "Run":
        """Checks config against data and devices, before anything is allocated. Raises
        ValueError.
        """
        from imagen_jax import sharding
        from imagen_jax.data.pipeline import open_prepared
        from imagen_jax.hardware import chips
        from imagen_jax.stage import RNG, create_stage
        from imagen_jax.training.step import TrainProgram, forward_flops

        config = schema.complete(config)  # also one that no command line has read
        cli.check_sizes(config)
        mesh = sharding.make_mesh(config["mesh"])
        data = open_prepared(config["data"])
        if config["text"]["dim"]:
            data.check_text(config["text"]["dim"])
        program = TrainProgram.create(config, mesh)
        peak, source = chips.peak_flops(program.mesh.devices.flat[0])
        run = cls(
            config=config,
            meta={
                "config": config,
                "encoder": data.encoder,
                "manifest_hash": data.hash,
                "rng": RNG,
            },
            program=program,
            flops_per_image=3 * forward_flops(create_stage(config)),
            peak_flops=peak * program.mesh.size,
        )
        describe(run, source)
        return run

    def fresh_state(self, init_from: str = "") -> tuple[Any, dict[str, Any]]:
        """State before the first step, and what is to be remembered of `init_from`: if given,
        parameters and EMA are those weights, which must fit.
        """
        from imagen_jax import cascade
        from imagen_jax.training import state
        from imagen_jax.weights import checkpoint

        program = self.program
        fresh = state.create_state(
            program.stage, program.optimizer, self.config["seed"], program.shardings
        )
        if not init_from:
            return fresh, {}
        params, meta = checkpoint.load_params(cascade.resolve(init_from))
        if program.stage.text_dim:
            cascade.check_encoder(
                meta["encoder"], self.meta["encoder"], f"{init_from} and the data"
            )
        begun = {name: meta[name] for name in ("step", "which", "sha256")} | {"path": init_from}
        return state.with_params(fresh, params, program.shardings), {"init_from": begun}

    @property
    def rows(self) -> list[int]:
        """Which rows of each global batch this process reads."""
        from imagen_jax.sharding import process_rows

        return process_rows(self.config["data"]["batch_size"], self.program.mesh)

    def place(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the step reads of a host batch, on the mesh."""
        from imagen_jax.sharding import place_batch

        return place_batch({name: batch[name] for name in self.program.batch}, self.program.mesh)

    def rates(self, times: Mapping[str, float]) -> dict[str, float]:
        """Times of an interval, and the share of the devices' peak that the model's own FLOPs are
        (recomputation not counted).
        """
        if not times:
            return {}
        flops = self.flops_per_image * times["time/images_per_s"]
        return {
            **times,
            "time/model_tflops_per_s": flops / 1e12,
            "time/mfu": flops / self.peak_flops,
        }


def describe(run: Run, peak_source: str) -> None:
    """Logs what is about to be trained, and where each part of the state lives."""
    import jax

    from imagen_jax.sharding import badly_split, bytes_table

    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.program.abstract.params))
    shape = {
        axis: size for axis, size in run.program.mesh.shape.items() if size > 1
    } or "one device"
    log.info("%s: %s parameters on %s", run.config["name"], f"{parameters:,}", shape)
    log.info(
        "%.4g GFLOP an image and step; peak %.4g TFLOP/s (%s)",
        run.flops_per_image / 1e9,
        run.peak_flops / 1e12,
        peak_source,
    )
    for row in bytes_table(run.program.abstract, run.program.shardings):
        if row["bytes"] > 1024:
            share = row["sharded_bytes"] / row["bytes"]
            log.info(
                "  %-10s %9.2f MiB, %9.2f MiB a device, %3.0f %% sharded",
                row["part"],
                row["bytes"] / 2**20,
                row["bytes_per_device"] / 2**20,
                100 * share,
            )
    settings = run.config["mesh"]
    for line in badly_split(
        run.program.abstract.params,
        run.program.mesh,
        settings["rules"],
        settings["fsdp_min_elements"],
    ):
        log.warning("not split: %s", line)


def stop_requests(minutes: float) -> Callable[[int], bool]:
    """A function of the steps done that says whether to stop: after SIGTERM or SIGINT, or when the
    time is over.

    With several processes it has to be asked by all at every step, and says yes to all at the same:
    jax tells each of a SIGTERM to one and settles on a step that none has passed. Everything else
    that stops a run is made a SIGTERM.
    """
    import jax
    from jax.experimental import multihost_utils

    asked, several = [], jax.process_count() > 1
    terminate = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    note = lambda received, _: asked.append(received)
    signal.signal(signal.SIGINT, terminate if several else note)
    if not several:
        signal.signal(signal.SIGTERM, note)  # with several, jax has its own handler of it
    end = time.monotonic() + 60 * minutes

    def stop(done: int) -> bool:
        if not asked and minutes > 0 and time.monotonic() > end:
            asked.append("minutes")
            if several:
                terminate()
        return multihost_utils.reached_preemption_sync_point(done) if several else bool(asked)

    return stop


def report_bad_step(run: Run, workdir: Path, bad: int) -> str:
    """Writes workdir/nonfinite.json with what is needed to look at the step again, and returns the
    message.
    """
    import jax

    from imagen_jax.data import pipeline

    data = pipeline.batches(run.config["data"], run.config["seed"], bad)
    batch = next(data)
    data.close()
    found = {
        "step": bad,
        "seed": run.config["seed"],
        "images": batch["index"].tolist(),
        "captions": batch["caption_id"].tolist(),
    }
    if jax.process_index() == 0:
        write_json(workdir / "nonfinite.json", found)
    return (
        f"loss, gradient or update of step {bad} is not finite; the update was skipped and nothing"
        f" was saved after it. Seed {found['seed']}, images {found['images'][:8]}...: all in"
        f" {workdir / 'nonfinite.json'}"
    )


def overfit(config: Mapping[str, Any], steps: int, watch: Watch) -> int:
    """Trains on the first batch only: model, loss, optimizer and data agree if the loss falls to a
    quarter of what it starts with.
    """
    import jax
    import numpy as np

    from imagen_jax import run_log
    from imagen_jax.data import pipeline

    config = dict(config) | {"optim": dict(config["optim"]) | {"warmup": max(1, steps // 20)}}
    run = Run.create(config)
    data: Iterator = pipeline.batches(config["data"], config["seed"], 0, "train", run.rows)
    batch, state, losses = run.place(next(data)), run.fresh_state()[0], []
    data.close()
    with run_log.Progress("overfit", steps, quiet=jax.process_index() > 0) as progress:
        for i in range(steps):
            watch.at(i, "training")
            state, step_metrics = run.program.step(state, batch)
            losses.append(float(jax.device_get(step_metrics["loss"])))
            progress.update(i + 1, loss=losses[-1])
    tenth = max(1, steps // 10)
    first, last = losses[0], float(np.mean(losses[-tenth:]))
    log.info(
        "overfit: loss %.4f at first, %.4f at the end: %s",
        first,
        last,
        "passed" if last < first / 4 else "FAILED",
    )
    return 0 if last < first / 4 else 1


if __name__ == "__main__":
    cli.run(define_flags, main)
