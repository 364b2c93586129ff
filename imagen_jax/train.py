"""Trains one stage of the cascade, any of them, from a config.

    python -m imagen_jax.train --config configs/base_64.py:demo --config.data.path=PREPARED --workdir WORKDIR

The same command again resumes: the run goes on from its newest intact checkpoint as if it had never stopped. SIGTERM saves and exits.
"""

import collections
import dataclasses
import json
import logging
import signal
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

from absl import flags
from ml_collections import config_flags

from imagen_jax import cli
from imagen_jax.integrity import write_json

CONFIG = config_flags.DEFINE_config_file("config", None, "config file, with fields as --config.optim.lr=3e-4", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run: checkpoints, metrics.jsonl, images")
OVERFIT = flags.DEFINE_integer("overfit", 0, "self-test: train this many steps on one batch, saving nothing; fails unless the loss falls to a quarter")
PROFILE = flags.DEFINE_string("profile", "", "FIRST:COUNT, writes a profiler trace of these steps to workdir/profile")
MINUTES = flags.DEFINE_float("minutes", 0.0, "stop after this long, saving, as if by SIGTERM; 0: no limit")
INIT_FROM = flags.DEFINE_string("init_from", "", "start a new run from these weights: a workdir, a checkpoint, an exported file, or embedded:NAME")

IN_FLIGHT = 2  # steps the device may be behind the host: it never waits for work, and a signal is answered within this many steps
log = logging.getLogger("imagen_jax.train")


def main() -> int:
    cli.log_to_stderr()
    if CONFIG.value is None or WORKDIR.value is None:
        raise ValueError("--config FILE and --workdir DIR are both needed")
    if not CONFIG.value.data.path:
        raise ValueError("--config.data.path is empty: give the directory that imagen_jax.prepare_data made")
    cli.use_compile_cache()
    config = json.loads(CONFIG.value.to_json())
    if OVERFIT.value:
        return overfit(config, OVERFIT.value)
    return train(config, Path(WORKDIR.value), PROFILE.value, MINUTES.value, INIT_FROM.value)


def train(config: Mapping[str, Any], workdir: Path, profile: str = "", minutes: float = 0.0, init_from: str = "") -> int:
    """Trains until config["train"]["steps"], a signal or the time limit; 0 if all is saved. `init_from` is read if there is no checkpoint."""
    import jax

    from imagen_jax import checkpoint, metrics, resume
    from imagen_jax.data import pipeline

    run = Run.create(config)
    stop = stop_requests(minutes)
    first_profiled, profiled = (int(part) for part in profile.split(":")) if profile else (-1, 0)
    total, settings = config["train"]["steps"], config["train"]

    # Restore, or begin.
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=settings["keep"])
    newest = checkpoints.latest_good()
    if newest is None:
        state = run.fresh_state(init_from)
    else:
        state, saved = checkpoints.restore(newest, run.abstract)
        for line in resume.check({k: saved[k] for k in run.meta}, run.meta):
            log.info("changed since the checkpoint: %s", line)
        log.info("resuming from step %d", newest)
    done = newest or 0
    write_json(workdir / "config.json", config)

    # Compile, so that the loop's first step costs what the others do.
    started = time.monotonic()
    step = run.step.lower(run.abstract, run.abstract_batch()).compile()
    log.info("step compiled in %.0f s", time.monotonic() - started)

    # The loop. Metrics of a step are fetched IN_FLIGHT steps later, so the device always has work queued.
    data = pipeline.batches(config["data"], config["seed"], done, "train", jax.process_index(), jax.process_count())
    writer = metrics.MetricsWriter(workdir, done, enabled=jax.process_index() == 0)
    clock = metrics.StepClock(config["data"]["batch_size"], done)
    interval: list[dict[str, float]] = []
    pending: collections.deque = collections.deque()

    def record_oldest() -> None:
        step, device_metrics = pending.popleft()
        interval.append({name: value.item() for name, value in jax.device_get(device_metrics).items()})
        if interval[-1]["bad_step"] >= 0:
            raise FloatingPointError(report_bad_step(run, workdir, int(interval[-1]["bad_step"])))
        progress.update(step, loss=interval[-1]["loss"])
        if step % settings["log_every"] == 0 or step == total:
            row = {name: sum(r[name] for r in interval) / len(interval) for name in interval[0] if name != "bad_step"}
            writer.scalars(step, row | run.rates(clock.read(step)))
            interval.clear()

    def settle() -> None:
        while pending:
            record_oldest()

    def save() -> None:
        with clock.pause():
            settle()  # nothing is saved before every step's metrics were seen to be finite
            try:
                checkpoints.wait()
            except checkpoint.CheckpointError as error:  # a full disk now need not end a run that may save later
                log.error("%s; training goes on, the next save is step %d", error, done)
            checkpoints.save(done, state, run.meta)

    with metrics.Progress(config["name"], total, done) as progress, jax.transfer_guard("disallow"):
        while done < total and not stop():
            if done == first_profiled:
                jax.profiler.start_trace(str(workdir / "profile"))
            state, step_metrics = step(state, run.place(next(data)))
            done += 1
            pending.append((done, step_metrics))
            if len(pending) > IN_FLIGHT:
                record_oldest()
            if done == first_profiled + profiled and profiled:
                settle()
                jax.profiler.stop_trace()
            if settings["sample_every"] and done % settings["sample_every"] == 0:
                with clock.pause(), jax.transfer_guard("allow"):
                    settle()
                    writer.image(done, "ema", run.sample_grid(state.ema))
            if done % settings["save_every"] == 0:
                save()
        save()
        checkpoints.wait()
    data.close()
    writer.close()
    log.info("%s: %d of %d steps done, saved in %s", config["name"], done, total, workdir)
    return 0


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config becomes before the first step: stage, mesh, shardings, compiled functions."""

    config: Mapping[str, Any]
    meta: Mapping[str, Any]
    stage: Any
    mesh: Any
    abstract: Any
    shardings: Any
    step: Callable
    flops_per_image: float
    peak_flops: float

    @classmethod
    def create(cls, config: Mapping[str, Any]) -> "Run":
        """Checks config against data and devices, before anything is allocated. Raises ValueError."""
        import jax

        from imagen_jax import chips, optim, sharding, state, step
        from imagen_jax.data.records import Prepared
        from imagen_jax.stage import create_stage

        mesh = sharding.make_mesh(config["mesh"])
        data = Prepared(config["data"]["path"])
        if config["text"]["dim"]:
            data.check_text(config["text"]["dim"], config["data"]["text_length"])
        stage = create_stage(config, mesh)
        steps = config["train"]["steps"]
        optimizer = optim.make_optimizer(config["optim"], steps)
        rules, min_elements = config["mesh"]["rules"], config["mesh"]["fsdp_min_elements"]
        abstract, shardings = state.abstract_state(stage, optimizer, mesh, rules, min_elements)
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        train_step = jax.jit(
            step.make_step(stage, optimizer, optim.learning_rate(config["optim"], steps), config["optim"], config["seed"]),
            donate_argnums=0,
            in_shardings=(shardings, sharding.batch_sharding(mesh)),
            out_shardings=(shardings, replicated),
        )
        peak, source = chips.peak_flops(mesh.devices.flat[0])
        run = cls(
            config=config,
            meta={"config": config, "encoder": data.encoder, "manifest_hash": data.hash},
            stage=stage,
            mesh=mesh,
            abstract=abstract,
            shardings=shardings,
            step=train_step,
            flops_per_image=3 * step.forward_flops(stage),
            peak_flops=peak * mesh.size,
        )
        describe(run, source)
        return run

    def fresh_state(self, init_from: str = "") -> Any:
        """State before the first step; with `init_from`, parameters and EMA are the weights stored there, which must fit."""
        from imagen_jax import cascade, checkpoint, optim, state

        optimizer = optim.make_optimizer(self.config["optim"], self.config["train"]["steps"])
        fresh = state.create_state(self.stage, optimizer, self.config["seed"], self.shardings)
        if not init_from:
            return fresh
        params, meta = checkpoint.load_params(cascade.resolve(init_from))
        cascade.check_encoder(meta["encoder"], self.meta["encoder"], f"{init_from} and the data")
        return state.with_params(fresh, params, self.shardings)

    def abstract_batch(self) -> Mapping[str, Any]:
        """Shapes and shardings of the arrays that `place` makes."""
        import jax

        from imagen_jax.sharding import batch_sharding

        shapes = self.stage.batch_shapes(self.config["data"]["batch_size"])
        return {k: jax.ShapeDtypeStruct(*v, sharding=batch_sharding(self.mesh)) for k, v in shapes.items()}

    def place(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the step reads of a host batch, on the mesh."""
        from imagen_jax.sharding import place_batch

        return place_batch({name: batch[name] for name in self.stage.batch_shapes(0)}, self.mesh)

    def rates(self, times: Mapping[str, float]) -> dict[str, float]:
        """Times of an interval, and the share of the devices' peak that the model's own FLOPs are (recomputation not counted)."""
        if not times:
            return {}
        flops = self.flops_per_image * times["time/images_per_s"]
        return {**times, "time/model_tflops_per_s": flops / 1e12, "time/mfu": flops / self.peak_flops}

    def sample_grid(self, ema: Any) -> Any:
        """Samples for the first held-out rows (training rows if none are held out): the image, its low-res input, the EMA's sample."""
        import jax
        import numpy as np

        from imagen_jax import cascade, pictures
        from imagen_jax.data import pipeline
        from imagen_jax.data.records import Prepared
        from imagen_jax.stage import to_uint8

        counts = Prepared(self.config["data"]["path"]).manifest["counts"]["images"]
        split = "heldout" if counts.get("heldout", 0) else "train"
        rows = np.linspace(0, counts[split] - 1, min(self.config["train"]["sample_rows"], counts[split])).astype(int).tolist()
        batch = pipeline.eval_rows(self.config["data"], rows, split)
        keys = cascade.sample_keys(range(len(rows)), 0)
        fields = {name: batch[name] for name in ("text", "text_mask", "lowres") if name in batch}
        draw = jax.jit(lambda ema, keys, batch: to_uint8(self.stage.sample(ema, keys, batch, self.stage.sampling, self.stage.train_size)))
        samples = np.asarray(jax.device_get(draw(ema, keys, fields)))
        columns = [batch["image"]] + ([batch["lowres"]] if "lowres" in batch else []) + [samples]
        return pictures.grid([[column[i] for i in range(len(rows))] for column in columns], max(64, self.stage.train_size))


def describe(run: Run, peak_source: str) -> None:
    """Logs what is about to be trained, and where each part of the state lives."""
    import jax

    from imagen_jax.sharding import bytes_table

    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.abstract.params))
    shape = {axis: size for axis, size in run.mesh.shape.items() if size > 1} or "one device"
    log.info("%s: %s parameters on %s", run.config["name"], f"{parameters:,}", shape)
    log.info("%.4g GFLOP an image and step; peak %.4g TFLOP/s (%s)", run.flops_per_image / 1e9, run.peak_flops / 1e12, peak_source)
    for row in bytes_table(run.abstract, run.shardings):
        if row["bytes"] > 1024:
            share = row["sharded_bytes"] / row["bytes"]
            log.info("  %-10s %9.2f MiB, %9.2f MiB a device, %3.0f %% sharded", row["part"], row["bytes"] / 2**20, row["bytes_per_device"] / 2**20, 100 * share)


def stop_requests(minutes: float) -> Callable[[], bool]:
    """A function that says whether to stop: after SIGTERM or SIGINT, or when the time is over."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: asked.append(received))
    end = time.monotonic() + 60 * minutes
    return lambda: bool(asked) or (minutes > 0 and time.monotonic() > end)


def report_bad_step(run: Run, workdir: Path, bad: int) -> str:
    """Writes workdir/nonfinite.json with what is needed to look at the step again, and returns the message."""
    from imagen_jax.data import pipeline

    data = pipeline.batches(run.config["data"], run.config["seed"], bad)
    batch = next(data)
    data.close()
    record = {"step": bad, "seed": run.config["seed"], "images": batch["index"].tolist(), "captions": batch["caption_id"].tolist()}
    write_json(workdir / "nonfinite.json", record)
    return (
        f"loss or gradient of step {bad} is not finite; the update was skipped and nothing was saved after it. "
        f"Seed {record['seed']}, images {record['images'][:8]}...: all in {workdir / 'nonfinite.json'}"
    )


def overfit(config: Mapping[str, Any], steps: int) -> int:
    """Trains on the first batch only: model, loss, optimizer and data agree if the loss falls to a quarter of what it starts with."""
    import jax
    import numpy as np

    from imagen_jax import metrics
    from imagen_jax.data import pipeline

    config = dict(config) | {"optim": dict(config["optim"]) | {"warmup": max(1, steps // 20)}}
    run = Run.create(config)
    data: Iterator = pipeline.batches(config["data"], config["seed"], 0)
    batch, state, losses = run.place(next(data)), run.fresh_state(), []
    data.close()
    with metrics.Progress("overfit", steps) as progress:
        for i in range(steps):
            state, step_metrics = run.step(state, batch)
            losses.append(float(jax.device_get(step_metrics["loss"])))
            progress.update(i + 1, loss=losses[-1])
    tenth = max(1, steps // 10)
    first, last = losses[0], float(np.mean(losses[-tenth:]))
    log.info("overfit: loss %.4f at first, %.4f at the end: %s", first, last, "passed" if last < first / 4 else "FAILED")
    return 0 if last < first / 4 else 1


if __name__ == "__main__":
    cli.run(main)
