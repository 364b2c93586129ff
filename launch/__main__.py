r"""Starts a training, several trainings or another command, here or on a cluster; none twice.

    python -m launch --where local --processes 2 --devices 4 --workdir DIR \
        --config configs/base_64.py:tiny --config.data.path=PREPARED
    python -m launch --where tpu --topology v5e:16x16 --zone us-west4-a --workdir gs://B/base \
        --config configs/base_64.py --config.data.path=gs://B/data
    python -m launch --where gke ... --workdir gs://B/run --stage base=configs/base_64.py \
        --stage sr=configs/sr_256.py --sr.topology=v5e:8x16
    python -m launch --where slurm --topology h100:4x8 --workdir DIR -- prepare_data \
        --source=folder:DIR --encoder=ENCODER --output=DIR

--config.FIELD=VALUE applies to every training, --STAGE.config.FIELD=VALUE to one of them;
--STAGE.topology replaces --topology for one stage, and --STAGE.env extends --env. The arguments
after "--" are a command and its options or, with --config, further options of the training.
`python -m launch.status WORKDIR` shows the progress.
"""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from launch import command_line, platforms
from launch.job import Job, check_options, check_path, is_bucket_url, name_of, training

# Options of the training that launch sets itself; absl also reads flags from a file.
CHECKED = re.compile(r"--?(workdir|config|flagfile)([.=]|$)")


@dataclasses.dataclass
class Stage:
    """The arguments for one training."""

    config: str
    fields: list[str] = dataclasses.field(default_factory=list)
    topology: str = ""
    env: list[str] = dataclasses.field(default_factory=list)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of `python -m launch`."""
    flags.DEFINE_string(
        "workdir",
        None,
        "directory of the run, local or gs://BUCKET/PATH; with --stage, stage NAME uses"
        " WORKDIR/NAME",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "config", "", "config of a training, FILE.py or FILE.py:ARG", flag_values=values
    )
    flags.DEFINE_multi_string(
        "stage", [], "NAME=CONFIG: one of several trainings", flag_values=values
    )
    platforms.define_flags(values, required=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    jobs, options = read(argv)
    code = platforms.start(jobs, options)
    if options.where not in platforms.WATCHED and not options.dry_run:
        print(f"progress: python -m launch.status {shlex.join([job.workdir for job in jobs])}")
    return code


def read(argv: Sequence[str]) -> tuple[list[Job], flags.FlagValues]:
    """The jobs and options of a command line. Raises ValueError if it is invalid."""
    before, after = _split(list(argv))
    options, rest = command_line.parse(before, define_flags, __doc__)
    command = after[0] if after and not after[0].startswith("-") else ""
    if bool(options.config) + bool(options.stage) + bool(command) != 1:
        raise ValueError(
            "give one of --config FILE, --stage NAME=FILE (once per stage), or -- COMMAND and"
            " its options"
        )
    check_path(options.workdir)
    if not is_bucket_url(options.workdir):
        options.workdir = os.path.abspath(options.workdir)
    if not command:
        return _trainings(options, rest, after), options
    if rest:
        raise ValueError(
            f"{rest[0]!r} is not an option of launch; options of {command} come after --"
        )
    check_options(command, after[1:])
    arguments = ("-m", f"imagen_jax.{command}", *after[1:])
    job = Job(name_of(options.workdir), arguments, options.workdir)
    return platforms.completed([job], options), options


def _trainings(options: flags.FlagValues, rest: Sequence[str], after: Sequence[str]) -> list[Job]:
    """The jobs of --config or --stage.

    rest: config fields and options of single stages. after: further options of every training.
    """
    stages = _stages(options, rest)
    if repeated := next(filter(CHECKED.match, after), ""):
        raise ValueError(
            f"{repeated!r} after -- would replace what launch has checked: give --workdir,"
            " --config and its fields before --"
        )
    if after:
        check_options("train", after)
    jobs = []
    for name, stage in stages.items():
        workdir = f"{options.workdir.rstrip('/')}/{name}" if name else options.workdir
        jobs.append(training(name, stage.config, stage.fields, workdir, options.where, after))
    topologies = [stage.topology for stage in stages.values()]
    return platforms.completed(jobs, options, topologies, [stage.env for stage in stages.values()])


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before the first "--", and those after it."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def _joined(rest: Sequence[str]) -> list[str]:
    """Rewrites options given as "--name value" to "--name=value"."""
    options: list[str] = []
    for text in rest:
        if options and not text.startswith("--") and "=" not in options[-1]:
            options[-1] += f"={text}"
        else:
            options.append(text)
    return options


def _stages(options: flags.FlagValues, rest: Sequence[str]) -> dict[str, Stage]:
    """{name: stage}; the single training of --config has the name ""."""
    stages = {"": Stage(options.config)} if options.config else {}
    for text in options.stage:
        name, equals, config = text.partition("=")
        if not equals or not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in stages:
            raise ValueError(
                f"--stage {text} is not NAME=CONFIG with a unique name in lower case, such as"
                " sr_256=configs/sr_256.py"
            )
        stages[name] = Stage(config)
    shared = Stage("")
    for option in _joined(rest):
        _assign(option, stages, shared)
    for stage in stages.values():  # the stage's own fields come last: the last of two applies
        stage.fields = shared.fields + stage.fields
    return stages


def _assign(option: str, stages: dict[str, Stage], shared: Stage) -> None:
    """Adds one option to the stage that it names, or to `shared`."""
    match = re.fullmatch(
        r"--(?:([a-z][a-z0-9_]*)\.)?(config\.[^=]+|topology|env)=(.*)", option, re.DOTALL
    )
    name, field, value = match.groups() if match else ("", "", "")
    if not match or (name and name not in stages):
        raise ValueError(
            f"{option!r} is not an option of launch; write config fields as"
            " --config.optim.lr=3e-4, or --STAGE.config.optim.lr=3e-4 for one stage"
        )
    stage = stages[name] if name else shared
    if field == "topology":
        stage.topology = value
    elif field == "env":
        stage.env.append(value)
    else:
        stage.fields.append(f"--{field}={value}")


if __name__ == "__main__":
    sys.exit(main())
