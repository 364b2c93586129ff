"""Evaluates one stage on prepared data: errors by noise level, samples compared with images.

    python -m imagen_jax.evaluate --checkpoint WORKDIR --data PREPARED --output DIR

Writes DIR/evaluation.json with every number and its provenance, DIR/rows.npz with each row's values
behind the means, DIR/loss.png with curves by log-SNR, and the measures' own files, such as samples
and contact sheets. With --follow it evaluates every checkpoint of a running workdir in DIR/<step>/
and appends a line for each to DIR/evaluations.jsonl. The measures are the modules of
imagen_jax/evals/measures/. A measure for which the data have too few rows is left out and named.
"""

import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from imagen_jax import cli, field, schema
from imagen_jax.evals.measures import NAMES
from imagen_jax.storage import check_local, only_process

RECORD = "evaluations.jsonl"
POLL_S = 10.0
log = logging.getLogger("imagen_jax.evaluate")


def define_flags() -> None:
    """The command line, see `cli.run`."""
    cli.define_compile_cache()
    flags.DEFINE_string(
        "checkpoint",
        None,
        "a workdir (its newest intact checkpoint), one checkpoint, an exported file, or"
        " embedded:NAME",
    )
    flags.DEFINE_string(
        "data", None, "directory made by imagen_jax.prepare_data with the checkpoint's text encoder"
    )
    flags.DEFINE_string("output", None, "directory for the results")
    names = ", ".join(NAMES)
    flags.DEFINE_list("measures", [], f"{names}; default: all that apply to the stage")
    flags.DEFINE_string(
        "which",
        "ema",
        "weights to evaluate: ema, params, or ema_1, ema_2 ... of optim.ema_tracks; an exported"
        " file holds one kind only",
    )
    flags.DEFINE_integer("rows", 256, "images of each split whose errors are measured")
    flags.DEFINE_integer(
        "samples", 0, "images of each split to draw samples for; 0: the number of --rows"
    )
    flags.DEFINE_integer(
        "gallery",
        20_000,
        "the largest number of images that samples are compared with; the seed chooses them if"
        " there are more",
    )
    flags.DEFINE_integer(
        "bins", 10, "bins of noise level for losses, which training draws equally often"
    )
    flags.DEFINE_integer("batch_size", 64, "rows at once; numbers differ by rounding only")
    flags.DEFINE_integer("seed", 0, f"of rows, noise and shuffling, in {schema.SEEDS}")
    for name, config_field in schema.SAMPLING.items():
        define_sampling_flag(name, config_field)
    flags.DEFINE_string(
        "lowres_from",
        "",
        "samples.npz of the previous stage: use its samples instead of true low-res images",
    )
    flags.DEFINE_bool(
        "follow",
        False,
        "evaluate each checkpoint of a running workdir as it appears, until the run is finished",
    )
    flags.DEFINE_float(
        "follow_minutes", 0.0, "with --follow, stop after this time; 0: no limit", lower_bound=0
    )


class FieldParser(flags.ArgumentParser):
    """Reads the value of a config field from the command line."""

    def __init__(self, config_field: field.Field):
        self._field = config_field
        self.syntactic_help = field.valid(config_field)

    def parse(self, argument: Any) -> Any:
        return field.parse(argument, self._field) if isinstance(argument, str) else argument

    def flag_type(self) -> str:
        return field.kind_name(self._field.kind)


def define_sampling_flag(name: str, config_field: field.Field) -> None:
    """The flag that replaces a field of the checkpoint's `sampling`."""
    text = f"{config_field.meaning} Default: sampling.{name} of the checkpoint"
    flags.DEFINE(FieldParser(config_field), schema.EVALUATE_FLAGS[name], None, text)


def main() -> int:
    args = flags.FLAGS
    cli.log_to_stderr()
    if not (args.checkpoint and args.data and args.output):
        raise ValueError("--checkpoint, --data and --output are all needed")
    for flag in ("checkpoint", "data", "lowres_from"):
        check_local(f"--{flag}", args[flag].value)
    cli.check_directory("output", args.output)
    if args.lowres_from and not Path(args.lowres_from).is_file():
        raise ValueError(f"--lowres_from {args.lowres_from} does not exist; give a samples.npz")
    if args.follow_minutes and not args.follow:
        raise ValueError("--follow_minutes needs --follow")
    schema.check_seed(args.seed, "--seed")
    from imagen_jax.cascade import resolve

    checkpoint, output = Path(resolve(args.checkpoint)), Path(args.output)
    if not (args.follow or checkpoint.exists()):
        raise ValueError(f"--checkpoint {checkpoint} does not exist")
    if args.follow and checkpoint.is_file():
        raise ValueError(f"--follow waits for the checkpoints of a workdir; {checkpoint} is a file")
    cli.make_directory("output", args.output)
    cli.set_up_jax()
    cli.check_platform()
    numbers = {
        name: args[name].value
        for name in ("rows", "samples", "gallery", "bins", "batch_size", "seed", "lowres_from")
    }
    numbers["samples"] = numbers["samples"] or numbers["rows"]
    overrides = {name: args[flag].value for name, flag in schema.EVALUATE_FLAGS.items()}
    evaluator = Evaluator(
        args.data,
        args.which,
        args.measures,
        numbers,
        {k: v for k, v in overrides.items() if v is not None},
    )
    with only_process(output, "using"):
        if args.follow:
            evaluator.check_continues(output / RECORD)
            follow(evaluator.run, checkpoint, output, args.follow_minutes)
        else:
            evaluator.run(checkpoint, output)
    return 0


class Evaluator:
    """Evaluates checkpoints one after another; rows and compiled programs are kept while the config
    stays the same.
    """

    def __init__(
        self,
        data: str,
        which: str,
        names: list[str],
        numbers: Mapping[str, Any],
        sampling: Mapping[str, Any],
    ):
        """data: a prepared directory. which: weights of the checkpoint, such as ema.
        names: of measures; [] for all that apply. numbers: fields of `rows.Settings`.
        sampling: values that replace those of the checkpoint's config.

        Raises ValueError for an unknown measure.
        """
        from imagen_jax.evals.measures import measure

        measure.check_known(names)
        self._data, self._which, self._names = data, which, names
        self._numbers, self._sampling = numbers, sampling
        self._config: Mapping[str, Any] | None = None

    def run(self, checkpoint: Path, output: Path) -> dict[str, Any]:
        """Evaluates one checkpoint, writes all files to `output`, evaluation.json last, and returns
        its content.
        """
        from imagen_jax.evals import report
        from imagen_jax.evals.evaluation import Evaluation
        from imagen_jax.evals.measures import measure
        from imagen_jax.storage import write_arrays, write_atomically, write_json
        from imagen_jax.weights.checkpoint import load_params

        params, meta = load_params(checkpoint, self._which)
        meta = meta | {"config": schema.complete(meta["config"], f"config of {checkpoint}")}
        self._prepare(meta)
        e = Evaluation(self._probe, self._rows, params)
        log.info("%s, step %s: %s", meta["config"]["name"], meta["step"], ", ".join(self._chosen))
        for name, reason in self._left_out.items():
            log.warning("%s is left out: %s", name, reason)
        results = {name: chosen.measure(e) for name, chosen in self._chosen.items()}
        source = {"path": str(checkpoint), "which": meta["which"], "sha256": meta["sha256"]}
        provenance = {"checkpoint": source} | self._provenance(meta)
        stage = {"stage": meta["config"]["name"], "step": meta["step"]}
        result = stage | results | {"provenance": provenance}
        output.mkdir(parents=True, exist_ok=True)
        if curves := measure.curves(results):
            write_atomically(output / "loss.png", report.plot(curves))
        sampling = json.dumps(self._probe.settings.sampling)
        origin = {"checkpoint_sha256": meta["sha256"], "sampling": sampling}
        measure.write(self._chosen, e, output, origin)
        write_arrays(output / "rows.npz", measure.row_values(self._chosen, e))
        write_json(output / "evaluation.json", result)
        omitted = [(name, f"left out: {reason}") for name, reason in self._left_out.items()]
        table = report.table([*measure.lines(results), *omitted])
        print(f"{result['stage']}, step {result['step']}", table, sep="\n")
        print(f"all in {output / 'evaluation.json'}")
        return result

    def check_continues(self, record: Path) -> None:
        """Raises ValueError if an evaluations.jsonl was made with other settings or data."""
        from imagen_jax.data.records import Prepared

        lines = record.read_bytes().split(b"\n")[:-1] if record.is_file() else []
        for line in lines[-1:]:
            then = json.loads(line)["provenance"]
            trained = schema.complete_sampling(then["config"]["sampling"], f"{record}")
            now = self._numbers | {"data": Prepared(self._data).hash, "which": self._which}
            now |= {"sampling": trained | self._sampling}
            was = {name: then[name] for name in self._numbers if name in then}
            was |= {"data": then["data"]["manifest_hash"], "which": then["checkpoint"]["which"]}
            was |= {"sampling": schema.complete_sampling(then["sampling"], f"{record}")}
            changed = [
                f"{name}: {was.get(name, 'not recorded')}, now {now[name]}"
                for name in now
                if name not in was or was[name] != now[name]
            ]
            if changed:
                raise ValueError(
                    f"{record} was made with other settings; give another --output:"
                    f" {'; '.join(changed)}"
                )

    def _prepare(self, meta: Mapping[str, Any]) -> None:
        """Makes stage, rows and compiled functions for a checkpoint's config, and chooses measures.

        Raises ValueError if they do not fit together, before anything is computed.
        """
        from imagen_jax.cascade import check_encoder
        from imagen_jax.evals.evaluation import Probe
        from imagen_jax.evals.measures import measure
        from imagen_jax.evals.rows import Data, Settings
        from imagen_jax.stage import check_sampling, create_stage

        if meta["config"] == self._config:
            return
        config = meta["config"]
        stage = create_stage(config)
        settings = Settings(**self._numbers, sampling={**stage.sampling, **self._sampling})
        check_sampling(settings.sampling)
        chosen = measure.choose(self._names, stage, settings)
        self._rows = Data(dict(config["data"]) | {"path": self._data}, settings)
        if stage.text_dim:
            check_encoder(
                self._rows.prepared.encoder, meta["encoder"], f"{self._data} and the checkpoint"
            )
        if "heldout" not in self._rows.counts:
            log.warning("%s has no held-out images: training images are measured", self._data)
        if self._rows.prepared.hash != meta["manifest_hash"]:
            log.warning("%s is not the data that this checkpoint was trained on", self._data)
        if settings.lowres_from:
            log.info("low-res images are the samples of %s", self._rows.origin)
        self._chosen, self._left_out = measure.allowed(chosen, stage, self._rows)
        self._probe, self._config = Probe(stage, settings), config

    def _provenance(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Everything else that the numbers depend on."""
        import jax

        from imagen_jax import __version__

        versions = {
            name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "grain")
        }
        settings, rows = self._probe.settings, self._rows
        return {
            "config": meta["config"],
            "encoder": meta["encoder"],
            "data": {
                "manifest_hash": rows.prepared.hash,
                "trained_on": meta["manifest_hash"],
                "images": rows.counts,
            },
            **{
                name: getattr(settings, name)
                for name in (
                    "rows",
                    "samples",
                    "gallery",
                    "bins",
                    "batch_size",
                    "seed",
                    "lowres_from",
                )
            },
            "sampling": dict(settings.sampling),
            "lowres_samples": rows.origin,
            "left_out": self._left_out,
            "versions": {
                "imagen_jax": __version__,
                "python": platform.python_version(),
                **versions,
            },
            "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        }


def follow(
    run: Callable[[Path, Path], dict[str, Any]],
    workdir: Path,
    output: Path,
    minutes: float,
    poll_s: float = POLL_S,
) -> None:
    """Calls `run` for each intact checkpoint of `workdir` without a line in
    output/evaluations.jsonl, oldest first, and appends the line.

    Returns after the last step of the training, or after `minutes` (0: no limit). The workdir may
    still be empty, and the trainer may delete old checkpoints meanwhile. A damaged checkpoint is
    reported once and skipped.
    """
    from imagen_jax.weights.checkpoint import CheckpointError, Checkpoints

    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)  # only to list
    output.mkdir(parents=True, exist_ok=True)
    done, damaged = evaluated_steps(output / RECORD), set()
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    while True:
        steps = checkpoints.steps()
        waiting = [step for step in steps if step not in done | damaged]
        if waiting:
            step, directory = waiting[0], checkpoints.directory / str(waiting[0])
            try:
                result = run(directory, output / str(step))
            except (CheckpointError, FileNotFoundError) as error:
                if directory.exists():  # else the trainer has deleted it meanwhile
                    log.warning("checkpoint %d is skipped: %s", step, error)
                damaged.add(step)
                continue
            append(output / RECORD, result)
            done.add(step)
        elif steps and steps[-1] >= last_step(workdir):
            return
        if time.monotonic() >= end:
            log.info("followed for %g minutes, %d checkpoints evaluated", minutes, len(done))
            return
        if not waiting:
            time.sleep(poll_s)


def last_step(workdir: Path) -> float:
    """The last step of a run; infinite while it has written no config."""
    config = workdir / "config.json"
    return json.loads(config.read_text())["train"]["steps"] if config.is_file() else float("inf")


def evaluated_steps(record: Path) -> set[int]:
    """The steps with a complete line in the record. A line that a kill cut short is removed."""
    from imagen_jax.storage import write_atomically

    content = record.read_bytes() if record.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        log.warning("%s: dropped an unfinished line", record)
        write_atomically(record, whole)
    return {json.loads(line)["step"] for line in whole.split(b"\n")[:-1]}


def append(record: Path, result: Mapping[str, Any]) -> None:
    """Appends one line and returns when it is on the disk."""
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    cli.run(define_flags, main)
