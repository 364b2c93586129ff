r"""Runs every arm of an ablation, on this machine one process at a time or as jobs of a cluster,
and compares the arms pair by pair.

    python -m launch.sweep --config configs/ablations/text_conditioning.py:demo \
        --config.data.path=PREPARED --seeds 0,1 --workdir DIR
    python -m launch.sweep ... --where slurm --topology h100:1x8

The config file has get_config(arg), what the arms share, and sweep(arg), which yields {"name": ...,
"config.optim.lr": ...} for each arm. All arms of a seed see the same batches with the same noise
and are evaluated on the same rows with the same noise, so their differences are paired. Arms that
differ in `config.sampling` only share one training. The same command again continues: with --where
it starts the trainings that neither run nor are finished, and once all are finished it evaluates
them here, which compares the arms.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagen_jax import cli, schema
from imagen_jax.storage import write_json
from launch import places, status
from launch.job import Job, check_path, in_bucket, mounted, read_config, training

FINISHED = "finished.json"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting of an ablation: dotted config fields and their values, without "config."."""

    name: str
    overrides: Mapping[str, Any]

    @property
    def training(self) -> dict[str, Any]:
        """The part that training depends on."""
        return {
            field: value
            for field, value in self.overrides.items()
            if not field.startswith("sampling.")
        }

    @property
    def sampling(self) -> dict[str, Any]:
        """The other part, without "sampling."."""
        return sampling_of(self.overrides)


def sampling_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `sampling` among dotted fields, without "sampling."."""
    return {
        field.removeprefix("sampling."): value
        for field, value in fields.items()
        if field.startswith("sampling.")
    }


@dataclasses.dataclass(frozen=True)
class Step:
    """One process: what it is called, its command, and the directory in which `finished.json` says
    that it is done.
    """

    label: str
    command: tuple[str, ...]
    directory: Path

    @property
    def trains(self) -> bool:
        return "imagen_jax.train" in self.command

    @property
    def finished(self) -> bool:
        """Raises ValueError if the directory is that of another command."""
        marker = self.directory / FINISHED
        if not marker.exists():
            return False
        made, wanted = json.loads(marker.read_text()), list(self.command[1:])
        if made != wanted and not restates(made, wanted, self.directory / "evaluation.json"):
            raise ValueError(
                f"{self.directory} was made by another command: give the one that began it, or"
                " another --workdir"
            )
        return True


def restates(made: Sequence[str], wanted: Sequence[str], evaluation: Path) -> bool:
    """Whether the finished command is the wanted one without sampling options that change nothing.

    An option changes nothing if evaluation.json records its value as the one used. So a sweep
    started before an option existed resumes, unless that option then had another value.
    """
    (then, before), (now, after) = split_sampling(made), split_sampling(wanted)
    if then != now or not before.keys() <= after.keys() or not evaluation.is_file():
        return False
    recorded = json.loads(evaluation.read_text())["provenance"]["sampling"]
    used = schema.complete_sampling(recorded, str(evaluation))
    parsed = {name: schema.parse(text, schema.SAMPLING[name]) for name, text in after.items()}
    return all(used[name] == value for name, value in parsed.items())


def split_sampling(command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command without its options of sampling, and these as {field: text}."""
    prefixes = {f"--{flag}=": field for field, flag in schema.EVALUATE_FLAGS.items()}
    rest, sampling = [], {}
    for option in command:
        flag, equals, text = option.partition("=")
        if flag + equals in prefixes:
            sampling[prefixes[flag + equals]] = text
        else:
            rest.append(option)
    return rest, sampling


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args, shared = parse(argv)
        arms, steps = plan(args, shared)
        check(args, shared, arms)
        if args.where and not trained(args, [step for step in steps if step.trains]):
            return 0
        if args.dry_run and args.bucket:
            print(
                "# trainings are the jobs above; evaluations run on a machine where the buckets"
                f" are mounted at {mounted('gs://')}"
            )
        for i, step in enumerate(steps):
            job = (
                bool(args.where) and step.trains
            )  # of which a call that goes on from here has none to run
            state = (
                "finished"
                if step.finished
                else "a job"
                if job
                else "to run"
                if args.dry_run
                else "running"
            )
            print(f"[{i + 1}/{len(steps)}] {step.label}: {state}", flush=True)
            if args.dry_run and not job:
                print("  " + shlex.join(("python", *step.command[1:])))
            elif state == "running":
                execute(step)
        if args.dry_run:
            return 0
        result = compare(arms, args.seeds, read_evaluations(args.workdir, arms, args.seeds))
        write_json(args.workdir / "sweep.json", {"config": args.config, **result})
        print(table(result) + f"\nall in {args.workdir / 'sweep.json'}")
    except KeyboardInterrupt:
        return cli.fail("interrupted, the same command continues", 130)
    except (ValueError, OSError) as error:
        return cli.fail(" ".join(str(error).split()))
    return 0


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """The options, and the config fields that all arms share as {"data.path": "..."}."""
    parser = cli.Parser(
        prog="python -m launch.sweep", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        required=True,
        help=(
            "ablation file, FILE.py or FILE.py:ARG; fields for all arms as"
            " --config.train.steps=1000"
        ),
    )
    parser.add_argument(
        "--workdir",
        required=True,
        help="directory for all runs and sweep.json; with --where tpu, gke or sky gs://BUCKET/PATH",
    )
    parser.add_argument(
        "--seeds", default="0", help="comma-separated; every arm runs once for each"
    )
    parser.add_argument(
        "--checkpoint",
        default="",
        help=(
            "for ablations of sampling: a trained model that all arms evaluate, with the sampling "
            "settings of --config"
        ),
    )
    parser.add_argument(
        "--measures",
        default="",
        help="of imagen_jax.evaluate, comma-separated; default: all that apply",
    )
    parser.add_argument("--rows", type=int, default=256, help="images a split to measure on")
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        help="images a split that samples are drawn for; 0: as many as --rows",
    )
    places.define_options(parser, required=False)
    args, rest = parser.parse_known_args(argv)
    check_path(args.workdir)
    args.bucket = args.workdir if in_bucket(args.workdir) else ""
    args.workdir = Path(mounted(args.workdir))  # where evaluation finds a bucket's files
    shared = {}
    for option in rest:
        field, equals, value = option.removeprefix("--config.").partition("=")
        if not option.startswith("--config.") or not equals:
            parser.error(
                f"{option!r} is no option of sweep, and fields of all arms are written"
                " --config.optim.lr=3e-4"
            )
        shared[field] = value
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {args.seeds} is not a list of whole numbers such as 0,1,2")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(
            "--seeds: the same seed twice would be the same training twice, with a difference of"
            " nothing between them"
        )
    return args, shared


def load(config: str) -> tuple[Mapping[str, Any], list[Arm]]:
    """(flat config, arms) of an ablation file. Raises ValueError if there is no sweep, or an arm
    sets a field that does not exist.
    """
    path, _, arg = config.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"--config {path} does not exist")
    spec = importlib.util.spec_from_file_location("ablation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise ValueError(
            f"{path} has no sweep(arg): it is a config of one run, for imagen_jax.train"
        )
    fields = schema.flat(module.get_config(arg).to_dict())
    arms = [
        Arm(
            arm["name"],
            {key.removeprefix("config."): value for key, value in arm.items() if key != "name"},
        )
        for arm in module.sweep(arg)
    ]
    repeated = [
        name for name, n in zip(*np.unique([arm.name for arm in arms], return_counts=True)) if n > 1
    ]
    if repeated:
        raise ValueError(f"{path}: several arms are called {', '.join(repeated)}")
    for arm in arms:
        check_fields(arm.overrides, fields, f"arm {arm.name} of {path}")
    return fields, arms


def check_fields(overrides: Mapping[str, Any], fields: Mapping[str, Any], who: str) -> None:
    unknown = sorted(overrides.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{who} sets {', '.join(unknown)}, which the config does not have")


def plan(args: argparse.Namespace, shared: Mapping[str, str]) -> tuple[list[Arm], list[Step]]:
    """The arms and all processes in order: seed by seed, each training before the evaluations that
    need it.
    """
    fields, arms = load(args.config)
    check_fields(shared, fields, "the command line")
    for arm in arms:
        both = sorted(arm.overrides.keys() & shared.keys() | arm.overrides.keys() & {"seed"})
        if both:
            raise ValueError(
                f"{', '.join(both)}: set by arm {arm.name}, so it cannot be shared by all arms"
            )
    if "seed" in shared:
        raise ValueError("give seeds as --seeds 0,1, not as --config.seed")
    data = shared.get("data.path") or fields["data.path"]
    if not data:
        raise ValueError(
            "--config.data.path is needed: a directory made by imagen_jax.prepare_data"
        )
    if args.checkpoint and any(arm.training for arm in arms):
        raise ValueError(
            "--checkpoint is for ablations of sampling; the arms of this one are trained"
            " differently"
        )
    sampling = sampling_of(shared)
    if args.checkpoint:  # a model that is trained here has the config's settings already
        sampling = schema.complete_sampling(sampling_of(fields), args.config) | sampling
    steps = []
    for seed in args.seeds:
        trained: dict[str, Path] = {}
        for arm in arms:
            key, place = (
                json.dumps(arm.training, sort_keys=True),
                args.workdir / arm.name / f"seed_{seed}",
            )
            if args.checkpoint:
                trained[key] = Path(args.checkpoint)
            elif key not in trained:
                trained[key] = place / "train"
                steps.append(
                    train_step(
                        args.config, seed, {**shared, **arm.training}, trained[key], arm.name
                    )
                )
            output = place / "evaluation"
            steps.append(evaluate_step(args, seed, arm, sampling, trained[key], data, output))
    return arms, steps


def check(args: argparse.Namespace, shared: Mapping[str, str], arms: Sequence[Arm]) -> None:
    """Raises ValueError for what would be found after the first training: an arm's config, a
    measure or setting that evaluate refuses, no place to write.
    """
    from imagen_jax.evals.measures import measure
    from imagen_jax.evals.rows import Settings
    from imagen_jax.stage import create_stage

    if not args.where:
        places.check_unused(args)
        check_here(args.bucket)
        places.check_can_be_made(args.workdir)
    if not args.bucket:
        cli.check_directory("workdir", str(args.workdir))
    names = [name.strip() for name in args.measures.split(",")] if args.measures else []
    measure.check_known(names)
    numbers = {"rows": args.rows, "samples": args.samples or args.rows}
    settings = Settings(**numbers, gallery=1, bins=1, batch_size=1, seed=0, sampling={})
    for arm in arms:
        config = read_config(args.config, options_of({**shared, **arm.overrides}))
        if not args.where:
            check_here(config["data"]["path"])
        stage = create_stage(config)
        if not args.checkpoint:  # whose stage is not known yet
            measure.choose(names, stage, settings)


def check_here(path: str) -> None:
    if in_bucket(path):
        raise ValueError(
            f"{path}: a bucket is no directory of this machine; mount it and give the directory"
        )


def options_of(fields: Mapping[str, Any]) -> list[str]:
    return [f"--config.{field}={value}" for field, value in fields.items()]


def train_step(
    config: str, seed: int, overrides: Mapping[str, Any], workdir: Path, name: str
) -> Step:
    options = options_of({**overrides, "seed": seed})
    command = (
        sys.executable,
        "-m",
        "imagen_jax.train",
        f"--config={config}",
        f"--workdir={workdir}",
        *options,
    )
    return Step(f"train {name}, seed {seed}", command, workdir)


def evaluate_step(
    args: argparse.Namespace,
    seed: int,
    arm: Arm,
    sampling: Mapping[str, Any],
    checkpoint: Path,
    data: str,
    output: Path,
) -> Step:
    """Evaluates with `sampling`, which all arms share, and the arm's own settings.

    All arms and seeds are evaluated on the same rows with the same noise.
    """
    settings = {**sampling, **arm.sampling}
    options = [f"--{schema.EVALUATE_FLAGS[field]}={value}" for field, value in settings.items()]
    options += [f"--rows={args.rows}", f"--samples={args.samples}"]
    options += [f"--measures={args.measures}"] if args.measures else []
    command = (
        sys.executable,
        "-m",
        "imagen_jax.evaluate",
        f"--checkpoint={checkpoint}",
        f"--data={mounted(data)}",
        f"--output={output}",
        *options,
    )
    return Step(f"evaluate {arm.name}, seed {seed}", command, output)


def trained(args: argparse.Namespace, steps: Sequence[Step]) -> bool:
    """Starts the trainings that neither run nor are finished where --where says. Whether all are
    finished and their files are here.
    """
    open_steps = [step for step in steps if not step.finished]
    jobs = places.completed([job_of(args, step) for step in open_steps], args)
    for group in (
        [jobs] * bool(jobs) if args.where == "tpu" else [[job] for job in jobs]
    ):  # which is looked after to its end; of local jobs one at a time
        if code := places.start(group, args):
            raise ValueError(
                f"{', '.join(job.title for job in group)}: ended with exit code {code}; the same"
                " command continues"
            )
    rows = [status.read(job) for job in jobs]
    for step, row in zip(open_steps, rows):
        if row.state == "finished" and step.directory.exists() and not args.dry_run:
            write_json(step.directory / FINISHED, step.command[1:])
    if all(step.finished for step in steps):
        return True
    print(status.table(rows))
    here = f" on a machine where the buckets are mounted at {mounted('gs://')}" * bool(args.bucket)
    print(f"the same command{here} goes on with the evaluations when all trainings are finished")
    return args.dry_run


def job_of(args: argparse.Namespace, step: Step) -> Job:
    """A training step as a job."""
    fields = [option for option in step.command if option.startswith("--config.")]
    workdir = str(step.directory.absolute())
    if args.bucket:
        workdir = args.bucket.rstrip("/") + "/" + str(step.directory.relative_to(args.workdir))
    return training(step.label.removeprefix("train "), args.config, fields, workdir, args.where)


def execute(step: Step) -> None:
    """Runs a process to its end (see `cli.call`). Raises ValueError if it fails."""
    code = cli.call(step.command)
    if code:
        raise ValueError(
            f"{step.label} ended with exit code {code}; its command: {shlex.join(step.command)}"
        )
    row = status.read(
        Job(step.label, (), str(step.directory))
    )  # a training exits in order also when it is asked to stop
    if row.state == "unreadable" or (row.steps and not row.ended):
        raise ValueError(
            f"{step.label} was stopped before its last step; the same command"
            f" continues{f': {row.detail}' if row.detail else ''}"
        )
    write_json(step.directory / FINISHED, step.command[1:])


def read_evaluations(
    workdir: Path, arms: Sequence[Arm], seeds: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """{arm: one evaluation a seed}: {"measures": evaluation.json, "rows": {place: value of each
    row} if evaluate wrote them}.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        for seed in seeds:
            directory = workdir / arm.name / f"seed_{seed}" / "evaluation"
            rows = {}
            if (directory / "rows.npz").exists():
                with np.load(directory / "rows.npz") as file:
                    rows = {
                        name: file[name].astype(float) for name in file.files
                    }  # hits are booleans
            found.setdefault(arm.name, []).append(
                {"measures": json.loads((directory / "evaluation.json").read_text()), "rows": rows}
            )
    return found


def compare(
    arms: Sequence[Arm], seeds: Sequence[int], found: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """{"seeds", "reference", "columns": [{"name", "place", "less_is_better", "arms": {arm: ...}}]}
    with the first arm as reference.

    An arm has "values" (one a seed) and their "mean"; the others have "difference", the mean of
    value minus the reference's of the same seed, with the standard error over seeds (None for one
    seed) and over rows (None where evaluate wrote no rows). An arm without a column's number is
    left out of it; a column that the reference lacks is left out. So is a column that needs a field
    to be the same, if an arm sets that field.
    """
    from imagen_jax.evals.measures.measure import columns

    reference = found[arms[0].name]
    fields = {field for arm in arms for field in arm.overrides}
    shown = []
    for column in columns():
        if any(field.startswith(column.needs_same) for field in fields):
            continue
        place = column.place.replace("SPLIT", split_of(reference[0]["measures"]))
        has_it = lambda arm: all(at(one["measures"], place) is not None for one in found[arm.name])
        present = [arm for arm in arms if has_it(arm)]
        if arms[0] not in present:
            continue
        compared = {arm.name: against(found[arm.name], reference, place) for arm in present}
        about = {"name": column.name, "place": place, "less_is_better": column.less_is_better}
        shown.append(about | {"arms": compared})
    overrides = {arm.name: dict(arm.overrides) for arm in arms}
    about = {"seeds": list(seeds), "reference": arms[0].name, "overrides": overrides}
    return about | {"columns": shown}


def split_of(measures: Mapping[str, Any]) -> str:
    """The split that arms are compared on: heldout, if a measure has it, else train."""
    results = [found for found in measures.values() if isinstance(found, Mapping)]
    return "heldout" if any("heldout" in found for found in results) else "train"


def at(measures: Mapping[str, Any], place: str) -> Any:
    """The number at a dotted place, None if there is none."""
    for key in place.split("."):
        measures = measures.get(key) if isinstance(measures, Mapping) else None
    return measures


def against(
    these: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], place: str
) -> dict[str, Any]:
    """Values of one arm and their paired differences to the reference, seed by seed and
    row by row.
    """
    values = [at(one["measures"], place) for one in these]
    out = {"values": values, "mean": statistics.mean(values)}
    if these is reference:
        return out
    differences = [value - at(other["measures"], place) for value, other in zip(values, reference)]
    pairs = [
        (one["rows"].get(place), other["rows"].get(place)) for one, other in zip(these, reference)
    ]
    complete = all(a is not None and b is not None and len(a) == len(b) for a, b in pairs)
    # All seeds are measured on the same rows, so a row is one observation, however many seeds there
    # are.
    by_row = np.mean([a - b for a, b in pairs], axis=0).tolist() if complete else []
    return out | {
        "difference": statistics.mean(differences),
        "se_seeds": standard_error(differences),
        "se_rows": standard_error(by_row),
    }


def standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def table(result: Mapping[str, Any]) -> str:
    """One block a column: arm, mean over seeds, paired difference to the first arm, its standard
    errors.
    """
    text = lambda number, sign="": "-" if number is None else f"{number:{sign}.4f}"
    width = max(len("arm"), *(len(arm) for arm in result["overrides"]))
    lines = []
    for column in result["columns"]:
        lines += [
            "",
            (
                f"{column['name']} ({column['place']};"
                f" {'less' if column['less_is_better'] else 'more'} is better), seeds"
                f" {result['seeds']}"
            ),
        ]
        lines += [f"{'arm':<{width}} {'mean':>9} {'difference':>11} {'se rows':>9} {'se seeds':>9}"]
        for arm, found in column["arms"].items():
            difference = (
                text(found.get("difference"), "+"),
                text(found.get("se_rows")),
                text(found.get("se_seeds")),
            )
            lines.append(
                "{:<{}} {:>9} {:>11} {:>9} {:>9}".format(
                    arm, width, text(found["mean"]), *difference
                )
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
