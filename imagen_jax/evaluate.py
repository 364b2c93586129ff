"""Evaluates one stage on prepared data: denoising errors by noise level, and samples.

    python -m imagen_jax.evaluate --checkpoint WORKDIR --data PREPARED --output DIR

It writes

    DIR/evaluation.json   every number and its provenance
    DIR/rows.npz          the per-image values that each mean averages
    DIR/loss.png          errors as curves over log-SNR
    DIR/...               files of single measures, such as samples and contact sheets

With --follow it evaluates every checkpoint of a running workdir in DIR/<step>/ and appends one line
for each to DIR/evaluations.jsonl. The measures are the modules of imagen_jax/evals/measures/. A
measure that needs more images than the data have is skipped, and the output names it.
"""

import importlib.metadata
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from imagen_jax import cli, field, schema
from imagen_jax.evals import history
from imagen_jax.evals.measures import NAMES
from imagen_jax.storage import (
    check_local,
    check_object,
    check_utf8,
    only_process,
    read_object,
    write_arrays,
    write_atomically,
    write_json,
)

POLL_S = 10.0
log = logging.getLogger("imagen_jax.evaluate")


def define_flags() -> None:
    """Defines the command-line flags; `cli.run` calls it."""
    cli.define_compile_cache()
    flags.DEFINE_string(
        "checkpoint",
        None,
        "a workdir (its newest intact checkpoint), one checkpoint, an exported file, or"
        " embedded:NAME",
    )
    flags.DEFINE_string(
        "data",
        None,
        "output directory of imagen_jax.prepare_data, made with the checkpoint's text encoder",
    )
    flags.DEFINE_string("output", None, "directory for the results")
    names = ", ".join(NAMES)
    flags.DEFINE_list("measures", [], f"{names}; default: all that apply to the stage")
    flags.DEFINE_string(
        "which",
        "ema",
        "weights to evaluate: ema, params, or ema_1, ema_2 ... of optim.ema_tracks; an exported"
        " file contains only one of them",
    )
    flags.DEFINE_integer("rows", 256, "number of images per split for the errors")
    flags.DEFINE_integer("samples", 0, "number of samples per split; 0: as many as --rows")
    flags.DEFINE_integer(
        "gallery",
        20_000,
        "largest number of images to compare samples with; if there are more, --seed determines a"
        " random subset",
    )
    flags.DEFINE_integer(
        "bins", 10, "number of noise-level bins; training draws every bin equally often"
    )
    flags.DEFINE_integer("batch_size", 64, "images per batch; it changes results only by rounding")
    flags.DEFINE_integer("seed", 0, f"seed of rows, noise and shuffling, in {schema.SEEDS}")
    for name, config_field in schema.SAMPLING.items():
        define_sampling_flag(name, config_field)
    flags.DEFINE_string(
        "lowres_from",
        "",
        "samples.npz of the previous stage, used as low-res input instead of the true images",
    )
    flags.DEFINE_bool(
        "follow",
        False,
        "evaluate each checkpoint of a running workdir as it appears, until the training has ended",
    )
    flags.DEFINE_float(
        "follow_minutes",
        0.0,
        "with --follow: stop after this many minutes; 0: no limit",
        lower_bound=0,
    )


class FieldParser(flags.ArgumentParser):
    """Parses the value of a config field from a flag."""

    def __init__(self, config_field: field.Field):
        self._field = config_field
        self.syntactic_help = field.valid(config_field)

    def parse(self, argument: Any) -> Any:
        return field.parse(argument, self._field) if isinstance(argument, str) else argument

    def flag_type(self) -> str:
        return field.kind_name(self._field.kind)


def define_sampling_flag(name: str, config_field: field.Field) -> None:
    """Defines the flag that overrides a field of the checkpoint's `sampling`."""
    text = f"{config_field.meaning} Default: sampling.{name} of the checkpoint"
    flags.DEFINE(FieldParser(config_field), schema.EVALUATE_FLAGS[name], None, text)


def main() -> int:
    args = flags.FLAGS
    cli.log_to_stderr()
    if not (args.checkpoint and args.data and args.output):
        raise ValueError("--checkpoint, --data and --output are required")
    for flag in ("checkpoint", "data", "lowres_from"):
        check_local(f"--{flag}", args[flag].value)
        check_utf8(f"--{flag}", args[flag].value)
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
        raise ValueError(
            f"--follow needs a workdir, but --checkpoint {checkpoint} is a file: give the"
            " workdir or omit --follow"
        )
    cli.make_directory("output", args.output)
    cli.set_up_jax()
    cli.check_platform()
    settings = {
        name: args[name].value
        for name in ("rows", "samples", "gallery", "bins", "batch_size", "seed", "lowres_from")
    }
    settings["samples"] = settings["samples"] or settings["rows"]
    overrides = {name: args[flag].value for name, flag in schema.EVALUATE_FLAGS.items()}
    evaluator = Evaluator(
        args.data,
        args.which,
        args.measures,
        settings,
        {name: value for name, value in overrides.items() if value is not None},
    )
    with only_process(output, "using"):
        if args.follow:
            evaluator.check_continues(output / history.FILE)
            follow(evaluator.run, checkpoint, output, args.follow_minutes)
        else:
            evaluator.run(checkpoint, output)
    return 0


class Evaluator:
    """Evaluates checkpoints one after another.

    Rows and compiled functions are reused as long as the config does not change.
    """

    def __init__(
        self,
        data: str,
        which: str,
        names: list[str],
        numbers: Mapping[str, Any],
        sampling: Mapping[str, Any],
    ):
        """Loads nothing yet; `run` loads a checkpoint and the data.

        data: a prepared directory.
        which: the weights to load, such as "ema".
        names: names of the measures; [] for all that apply.
        numbers: fields of `rows.Settings`.
        sampling: values that override those of the checkpoint's config.

        Raises ValueError for an unknown measure.
        """
        from imagen_jax.evals.measures import measure

        measure.check_known(names)
        self._data, self._which, self._names = data, which, names
        self._numbers, self._sampling = numbers, sampling
        self._config: Mapping[str, Any] | None = None

    def run(self, checkpoint: Path, output: Path) -> dict[str, Any]:
        """Evaluates one checkpoint and writes all files to `output`, evaluation.json last.

        Returns the content of evaluation.json.
        """
        import jax

        from imagen_jax.cascade import STAGE_META
        from imagen_jax.evals import report
        from imagen_jax.evals.evaluation import Evaluation
        from imagen_jax.evals.measures import measure
        from imagen_jax.weights.checkpoint import load_params
        from imagen_jax.weights.leaves import check_fit

        params, meta = load_params(checkpoint, self._which)
        remedy = "use a checkpoint of imagen_jax.train, or its export"
        check_object(checkpoint, meta, STAGE_META, remedy)
        meta = meta | {"config": schema.complete(meta["config"], f"config of {checkpoint}")}
        self._prepare(meta)
        model = jax.eval_shape(self._probe.stage.init, jax.random.key(0))
        check_fit(params, model, f"{checkpoint}: ")
        evaluation = Evaluation(self._probe, self._rows, params)
        log.info("%s, step %s: %s", meta["config"]["name"], meta["step"], ", ".join(self._chosen))
        for name, reason in self._left_out.items():
            log.warning("skipping %s: %s", name, reason)
        results = {name: chosen.measure(evaluation) for name, chosen in self._chosen.items()}
        weights = {"path": str(checkpoint), "which": meta["which"], "sha256": meta["sha256"]}
        provenance = {"checkpoint": weights} | self._provenance(meta)
        header = {"stage": meta["config"]["name"], "step": meta["step"]}
        result = header | results | {"provenance": provenance}
        output.mkdir(parents=True, exist_ok=True)
        if curves := measure.curves(results):
            write_atomically(output / "loss.png", report.plot(curves))
        sampling = json.dumps(self._probe.settings.sampling)
        origin = {"checkpoint_sha256": meta["sha256"], "sampling": sampling}
        measure.write(self._chosen, evaluation, output, origin)
        write_arrays(output / "rows.npz", measure.row_values(self._chosen, evaluation))
        write_json(output / "evaluation.json", result)
        skipped = [(name, f"skipped: {reason}") for name, reason in self._left_out.items()]
        table = report.table([*measure.lines(results), *skipped])
        print(f"{result['stage']}, step {result['step']}", table, sep="\n")
        print(f"all results: {output / 'evaluation.json'}")
        return result

    def check_continues(self, record: Path) -> None:
        """Raises ValueError if the last line of `record` has other settings or data than this run.

        record: an evaluations.jsonl, which may be missing.
        """
        from imagen_jax.data.records import Prepared

        recorded = history.last_provenance(record)
        if recorded is None:
            return
        trained = schema.complete_sampling(recorded["config"]["sampling"], f"{record}")
        current = self._numbers | {"data": Prepared(self._data).hash, "which": self._which}
        current |= {"sampling": trained | self._sampling}
        previous = {name: recorded[name] for name in self._numbers if name in recorded}
        previous |= {
            "data": recorded["data"]["manifest_hash"],
            "which": recorded["checkpoint"]["which"],
            "sampling": schema.complete_sampling(recorded["sampling"], f"{record}"),
        }
        changed = [
            f"{name}: {previous.get(name, 'not recorded')}, now {value}"
            for name, value in current.items()
            if name not in previous or previous[name] != value
        ]
        if changed:
            raise ValueError(
                f"{record} was made with other settings; give another --output:"
                f" {'; '.join(changed)}"
            )

    def _prepare(self, meta: Mapping[str, Any]) -> None:
        """Creates stage, rows and compiled functions for a config, and selects the measures.

        Raises ValueError if checkpoint, data and settings are incompatible, before anything is
        computed.
        """
        from imagen_jax.cascade import check_encoder
        from imagen_jax.evals.evaluation import Probe
        from imagen_jax.evals.measures import measure
        from imagen_jax.evals.rows import Data, Settings
        from imagen_jax.stage import check_interval, check_sampling, create_stage

        if meta["config"] == self._config:
            return
        config = meta["config"]
        stage = create_stage(config)
        settings = Settings(**self._numbers, sampling={**stage.sampling, **self._sampling})
        check_sampling(settings.sampling)
        self._check_effect(config | {"sampling": settings.sampling}, stage.sampling)
        if self._sampling:
            check_interval(settings.sampling, stage.schedule)
        chosen = measure.choose(self._names, stage, settings)
        self._rows = Data(dict(config["data"]) | {"path": self._data}, settings)
        if stage.text_dim:
            check_encoder(
                self._rows.prepared.encoder, meta["encoder"], f"{self._data} and the checkpoint"
            )
        if "heldout" not in self._rows.counts:
            log.warning("%s has no held-out images; evaluating on training images", self._data)
        if self._rows.prepared.hash != meta["manifest_hash"]:
            log.warning("the checkpoint was trained on other data than %s", self._data)
        if settings.lowres_from:
            log.info("low-res images are the samples of %s", self._rows.origin)
        self._chosen, self._left_out = measure.allowed(chosen, stage, self._rows)
        self._probe, self._config = Probe(stage, settings), config

    def _check_effect(self, config: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
        """Raises ValueError if a flag changes a field of `sampling` that has no effect.

        config: with the flags' values. trained: the section `sampling` without them.
        """
        changed = [
            f"sampling.{name}"
            for name, value in self._sampling.items()
            if value != trained[name] and schema.SAMPLING[name].defaults
        ]
        if changed:
            schema.check_effect(config, changed, "the flags")

    def _provenance(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """The provenance besides the checkpoint: config, data, settings, versions, devices."""
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
            **{name: getattr(settings, name) for name in self._numbers},
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
    """Calls `run` for each intact checkpoint that output/evaluations.jsonl does not list.

    The oldest checkpoint comes first; each result is appended to the file. Returns when the
    checkpoint of the last training step is evaluated, or after `minutes` (0: no limit). The workdir
    may still be empty, and the trainer may delete old checkpoints in the meantime. A damaged
    checkpoint is reported once and skipped.
    """
    from imagen_jax.weights.checkpoint import CheckpointError, Checkpoints

    # Used only to list steps. It never saves, so `keep` has no effect.
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    output.mkdir(parents=True, exist_ok=True)
    evaluated, damaged = history.steps(output / history.FILE), set()
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    while True:
        steps = checkpoints.steps()
        waiting = [step for step in steps if step not in evaluated | damaged]
        if waiting:
            step, directory = waiting[0], checkpoints.directory / str(waiting[0])
            try:
                result = run(directory, output / str(step))
            except (CheckpointError, FileNotFoundError) as error:
                # Otherwise the trainer deleted it in the meantime.
                if directory.exists():
                    log.warning("checkpoint %d is skipped: %s", step, error)
                damaged.add(step)
                continue
            history.append(output / history.FILE, result)
            evaluated.add(step)
        elif steps and steps[-1] >= last_step(workdir):
            return
        if time.monotonic() >= deadline:
            log.info("followed for %g minutes, %d checkpoints evaluated", minutes, len(evaluated))
            return
        if not waiting:
            time.sleep(poll_s)


def last_step(workdir: Path) -> float:
    """The last training step, or infinity before the run has written its config."""
    config = workdir / "config.json"
    if not config.is_file():
        return float("inf")
    remedy = "copy it from the meta.json of a checkpoint"
    return read_object(config, {"train.steps": int}, remedy)["train"]["steps"]


if __name__ == "__main__":
    cli.run(define_flags, main)
