r"""Trains and evaluates every arm of an ablation, and compares each arm with the first.

    python -m launch.sweep --config configs/ablations/text_conditioning.py:demo \
        --config.data.path=PREPARED --seeds 0,1 --workdir DIR
    python -m launch.sweep ... --where slurm --topology h100:1x8

By default everything runs on this machine, one process at a time. With --where, each training is a
job. Set a config field for all arms with --config.train.steps=1000.

The config file has get_config(arg), the settings common to all arms, and sweep(arg), which yields
{"name": ..., "config.optim.lr": ...} for each arm. All arms of a seed see the same batches with the
same noise and are evaluated on the same rows with the same noise, so their differences are paired.
Arms that differ only in `config.sampling` share one training. COLUMNS = ("loss", ...) in the file
chooses the columns of the table, by name of the measure or of the column.

Running the same command again continues. A sweep that is interrupted or fails prints the
comparison of the arms that are finished. With --where it starts the trainings that are neither
running nor finished; once all are finished, it evaluates them on this machine and compares the
arms. The workdir may be in a bucket, gs://BUCKET/PATH (with the extra `gcs`).
"""

import contextlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from imagen_jax import cli, output_paths, schema
from imagen_jax.object_storage import check_bucket
from imagen_jax.storage import absolute, as_path, exists, write_json
from launch import command_line, comparison, platforms, status
from launch.ablation import (
    FINISHED,
    Ablation,
    Arm,
    Task,
    columns_of,
    load,
    options_of,
    plan,
)
from launch.job import MOUNT, Job, check_path, is_bucket_url, read_config, training


def define_flags(values: flags.FlagValues) -> None:
    """The flags of `python -m launch.sweep`."""
    flags.DEFINE_string(
        "config",
        None,
        "ablation file, FILE.py or FILE.py:ARG; --config.train.steps=1000 sets a field of all arms",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "directory for all runs and sweep.json, local or gs://BUCKET/PATH; the latter with --where"
        " tpu, gke or sky",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "seeds", "0", "comma-separated; every arm runs once per seed", flag_values=values
    )
    flags.DEFINE_string(
        "checkpoint",
        "",
        "for ablations of sampling: a trained model that all arms evaluate, with the sampling"
        " settings of --config",
        flag_values=values,
    )
    flags.DEFINE_string(
        "measures",
        "",
        "measures of imagen_jax.evaluate, comma-separated; default: all that apply",
        flag_values=values,
    )
    flags.DEFINE_integer("rows", 256, "images per split to measure on", flag_values=values)
    flags.DEFINE_integer(
        "samples",
        0,
        "images per split to draw samples for; 0: the value of --rows",
        flag_values=values,
    )
    platforms.define_flags(values, required=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    ablation, options = parse(argv)
    arms, tasks = plan(ablation)
    check(ablation, arms, options)
    if options.where:
        trainings = [task for task in tasks if task.trains]
        place = place_of_evaluations(tasks)
        if not start_missing_trainings(ablation, trainings, options, place):
            return 0
        if options.dry_run:
            print(f"# trainings are the jobs above; evaluations run {place}")
    try:
        for i, task in enumerate(tasks):
            _run_task(task, f"[{i + 1}/{len(tasks)}]", options)
    except (KeyboardInterrupt, Exception):
        if not options.dry_run:
            # The error that ended the sweep matters more than one of the table.
            with contextlib.suppress(Exception):
                print_partial(ablation, arms, tasks)
        raise
    if options.dry_run:
        return 0
    result = _compared(ablation, arms, ablation.seeds)
    write_json(ablation.workdir / "sweep.json", {"config": ablation.config, **result})
    print(comparison.table(result) + f"\nall in {ablation.workdir / 'sweep.json'}")
    return 0


def _compared(ablation: Ablation, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[str, Any]:
    evaluations = comparison.read_evaluations(ablation.workdir, arms, seeds)
    return comparison.compare(arms, seeds, evaluations, columns_of(ablation.config))


def print_partial(ablation: Ablation, arms: Sequence[Arm], tasks: Sequence[Task]) -> None:
    """Prints the table of the finished arms, if the first arm, the reference, is one of them.

    Each seed has a list of finished arms. The table has the arms of the longest list, over all
    seeds for which these arms are finished. sweep.json is not written.
    """
    done = {task.directory for task in tasks if _is_finished(task)}
    finished = {
        seed: [arm for arm in arms if ablation.evaluation(arm, seed) in done]
        for seed in ablation.seeds
    }
    chosen = max((found for found in finished.values() if arms[0] in found), key=len, default=[])
    if not chosen:
        return
    seeds = [seed for seed, found in finished.items() if all(arm in found for arm in chosen)]
    print(comparison.table(_compared(ablation, chosen, seeds)))
    print(
        f"PARTIAL: {len(chosen)} of {len(arms)} arms, {len(seeds)} of {len(ablation.seeds)} seeds;"
        f" {command_line.CONTINUE}"
    )


def _is_finished(task: Task) -> bool:
    """`task.finished`; False if another command wrote its directory."""
    try:
        return task.finished
    except ValueError:
        return False


def _run_task(task: Task, number: str, options: flags.FlagValues) -> None:
    """Prints a process's state, and its command with --dry_run; runs it if it is not finished."""
    is_job = bool(options.where) and task.trains
    if task.finished:
        state = "finished"
    elif is_job:
        state = "a job"
    else:
        state = "to run" if options.dry_run else "running"
    print(f"{number} {task.label}: {state}", flush=True)
    if options.dry_run and not is_job:
        print("  " + shlex.join(("python", *task.command[1:])))
    elif state == "running":
        execute(task)


def parse(argv: Sequence[str]) -> tuple[Ablation, flags.FlagValues]:
    """The ablation and the launcher's options. Raises ValueError if the command line is invalid."""
    options, rest = command_line.parse(argv, define_flags, __doc__)
    check_path(options.workdir)
    shared = {}
    for option in rest:
        field, equals, value = option.removeprefix("--config.").partition("=")
        if not option.startswith("--config.") or not equals:
            raise ValueError(
                f"{option!r} is not an option of sweep; set a config field for all arms"
                " with --config.optim.lr=3e-4"
            )
        shared[field] = value
    ablation = Ablation(
        config=options.config,
        workdir=as_path("--workdir", options.workdir),
        seeds=_seeds(options.seeds),
        shared=shared,
        checkpoint=options.checkpoint,
        measures=options.measures,
        rows=options.rows,
        samples=options.samples,
    )
    return ablation, options


def _seeds(text: str) -> tuple[int, ...]:
    """The seeds of --seeds. Raises ValueError unless they are distinct integers in [0, 2^32)."""
    try:
        seeds = tuple(int(seed) for seed in text.split(","))
    except ValueError as error:
        raise ValueError(f"--seeds {text} is not a list of whole numbers such as 0,1,2") from error
    for seed in seeds:
        schema.check_seed(seed, "--seeds")
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            f"--seeds {text} has the same seed twice, which would be the same training twice:"
            " give different seeds"
        )
    return seeds


def check(ablation: Ablation, arms: Sequence[Arm], options: flags.FlagValues) -> None:
    """Checks everything that would otherwise fail after the first training.

    Raises ValueError for an invalid config of an arm, a measure or setting that evaluate refuses,
    and a workdir that cannot be written to.
    """
    from imagen_jax.evals.measures import measure
    from imagen_jax.evals.rows import Settings
    from imagen_jax.stage import check_interval, create_stage
    from imagen_jax.training import optim
    from imagen_jax.training.step import check_accumulation

    if not options.where:
        platforms.check_unused(options)
    if is_bucket_url(options.workdir):
        check_bucket("--workdir", ablation.workdir)
    else:
        if not options.where:
            platforms.check_can_be_made(ablation.workdir)
        output_paths.check_directory("workdir", str(ablation.workdir))
    names = [name.strip() for name in ablation.measures.split(",")] if ablation.measures else []
    measure.check_known(names)
    numbers = {"rows": ablation.rows, "samples": ablation.samples or ablation.rows}
    settings = Settings(**numbers, gallery=1, bins=1, batch_size=1, seed=0, sampling={})
    columns = chosen_columns(ablation, arms, names)
    configured, _ = load(ablation.config)
    configs = {}
    for arm in arms:
        fields: Mapping[str, object] = {**ablation.shared, **arm.overrides}
        config = configs[arm.name] = read_config(ablation.config, options_of(fields))
        values = schema.flat(config)
        own = [field for field in arm.overrides if values[field] != configured[field]]
        if own:
            schema.check_effect(config, own, f"arm {arm.name} of {ablation.config}")
        check_interval(config["sampling"], config["diffusion"]["schedule"])
        stage = create_stage(config)
        # With --checkpoint the stage comes from the checkpoint, which is not read here.
        if not ablation.checkpoint:
            read_config(ablation.config, options_of({**ablation.shared, **arm.training}))
            measure.choose(names, stage, settings)
            if arm is arms[0]:  # the table shows no column that the reference lacks
                check_measured(ablation, columns, stage, settings)
            optim.make_optimizer(config["optim"], config["train"]["steps"])
            check_accumulation(config["data"]["batch_size"], config["optim"]["accumulation"])
    if not ablation.checkpoint:
        check_data(configs, here=not options.where)


def check_data(configs: Mapping[str, Mapping[str, Any]], here: bool) -> None:
    """Raises ValueError if the data lack something that an arm reads; prints a line for each arm.

    configs: of the trainings, by arm. here: whether this machine trains; then data in buckets are
    checked too. Other data that are not on this machine are not checked.
    """
    from imagen_jax.data import manifest_file, pipeline, sets
    from imagen_jax.training import run

    problems = []
    for name, config in configs.items():
        paths = [one.path for one in sets.data_sets(config["data"])]
        for path in paths if here else ():
            check_bucket("--config.data.path", as_path("--config.data.path", path))
        known = (
            here if is_bucket_url(path) else (Path(path) / manifest_file.MANIFEST).is_file()
            for path in paths
        )
        if not all(known):
            continue
        try:
            run.check_data(config)
            pipeline.bucket_shares(config["data"])
        except ValueError as error:
            problems.append(f"arm {name}: {error}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(configs)} arms do not fit the data, see above: nothing was"
            " started"
        )


def chosen_columns(ablation: Ablation, arms: Sequence[Arm], measures: Sequence[str]) -> list[Any]:
    """The columns in COLUMNS of the ablation file that --measures does not leave out.

    [] for the default columns. measures: those of --measures; [] for all that apply. Raises
    ValueError if a column is unknown, or could not be shown, or if none is left.
    """
    from imagen_jax.evals.measures import measure

    source = f"COLUMNS of {ablation.config.partition(':')[0]}"
    names = columns_of(ablation.config)
    try:
        columns = measure.columns(names) if names else []
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    fields = sorted({field for arm in arms for field in arm.overrides})
    needed = ", ".join(dict.fromkeys(map(measure.measure_of, columns)))
    left = [one for one in columns if not measures or measure.measure_of(one) in measures]
    if columns and not left:
        raise ValueError(f"{source} needs one of the measures {needed}: add it to --measures")
    for column in left:
        if differ := [field for field in fields if field.startswith(column.needs_same)]:
            raise ValueError(
                f"{source}: {_titled(column)} cannot compare arms that differ in"
                f" {', '.join(differ)}; choose another column, such as 'error of x-hat'"
            )
    return left


def _titled(column: Any) -> str:
    """A column for a message: its title, and the measure by which COLUMNS may name it."""
    from imagen_jax.evals.measures import measure

    return f"{column.name!r} of {measure.measure_of(column)}"


def check_measured(ablation: Ablation, columns: Sequence[Any], stage: Any, settings: Any) -> None:
    """Raises ValueError for a column whose measure does not apply to the stage."""
    from imagen_jax.evals.measures import measure

    for column in columns:
        module = measure.modules()[measure.measure_of(column)]
        if reason := module.excluded(stage, settings):
            source = ablation.config.partition(":")[0]
            raise ValueError(f"COLUMNS of {source}: {_titled(column)} does not apply: {reason}")


def place_of_evaluations(tasks: Sequence[Task]) -> str:
    """Where this command can evaluate, in words: data below MOUNT have to be there."""
    prefix = f"--data={MOUNT}/"
    mounts = any(word.startswith(prefix) for task in tasks for word in task.command)
    return f"on a machine where the bucket of the data is mounted below {MOUNT}" * mounts or "here"


def start_missing_trainings(
    ablation: Ablation, tasks: Sequence[Task], options: flags.FlagValues, place: str
) -> bool:
    """Starts the trainings that are neither running nor finished, as jobs of --where.

    place: see `place_of_evaluations`. Returns whether all are finished.
    """
    open_tasks = [task for task in tasks if not task.finished]
    jobs = [job_of(ablation, task, options) for task in open_tasks]
    jobs = platforms.completed(jobs, options)
    # Cloud TPU jobs are supervised in parallel; local jobs run one after the other.
    groups = [jobs] * bool(jobs) if options.where == "tpu" else [[job] for job in jobs]
    for group in groups:
        if code := platforms.start(group, options):
            names = ", ".join(job.title for job in group)
            raise ValueError(f"{names}: exit code {code}; {command_line.CONTINUE}")
    rows = [status.read(job) for job in jobs]
    for task, row in zip(open_tasks, rows):
        if row.state == "finished" and exists(task.directory) and not options.dry_run:
            write_json(task.directory / FINISHED, task.command[1:])
    if all(task.finished for task in tasks):
        return True
    print(status.table(rows))
    print(f"when all trainings have finished, run this command again {place} to evaluate them")
    return options.dry_run


def job_of(ablation: Ablation, task: Task, options: flags.FlagValues) -> Job:
    """The job of a training."""
    fields = [option for option in task.command if option.startswith("--config.")]
    workdir = str(absolute(task.directory))
    title = task.label.removeprefix("train ")
    return training(title, ablation.config, fields, workdir, options.where)


def execute(task: Task) -> None:
    """Runs a process to its end (see `cli.call`). Raises ValueError if it fails or stops early."""
    code = cli.call(task.command)
    if code:
        raise ValueError(
            f"{task.label} failed with exit code {code}; its command: {shlex.join(task.command)};"
            f" after the cause is removed, {command_line.CONTINUE}"
        )
    # A training stopped by a signal also exits with 0.
    row = status.read(Job(task.label, (), str(task.directory)))
    if row.state == "unreadable" or (row.steps and not row.ended):
        reason = f": {row.detail}" if row.detail else ""
        raise ValueError(
            f"{task.label} stopped before its last step; {command_line.CONTINUE}{reason}"
        )
    write_json(task.directory / FINISHED, task.command[1:])


if __name__ == "__main__":
    sys.exit(main())
