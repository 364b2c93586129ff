r"""Starts a training, another verb, or several trainings side by side, on this machine or a
cluster, and starts none twice.

    python -m launch --where local --processes 2 --devices 4 --workdir DIR \
        --config configs/base_64.py:tiny --config.data.path=PREPARED
    python -m launch --where tpu --topology v5e:16x16 --zone us-west4-a --workdir gs://B/base \
        --config configs/base_64.py --config.data.path=gs://B/data
    python -m launch --where gke ... --workdir gs://B/run --stage base=configs/base_64.py \
        --stage sr=configs/sr_256.py --sr.topology=v5e:8x16
    python -m launch --where slurm --topology h100:4x8 --workdir DIR -- prepare_data \
        --output DIR ...

--config.FIELD=VALUE is for every training, --STAGE.config.FIELD=VALUE for one, and so are
--STAGE.topology and --STAGE.env. What follows "--" is a verb and its options or, beside --config,
further options of the training. How far runs are: python -m launch.status WORKDIR.
"""

import argparse
import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Sequence

from imagen_jax import cli
from launch import places
from launch.job import Job, check_options, check_path, in_bucket, name_of, training

CHECKED = re.compile(
    r"--?(workdir|config|flagfile)([.=]|$)"
)  # options of the training, which absl also reads from a file


@dataclasses.dataclass
class Stage:
    """What the command line says of one training."""

    config: str
    fields: list[str] = dataclasses.field(default_factory=list)
    topology: str = ""
    env: list[str] = dataclasses.field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        jobs, options = read(sys.argv[1:] if argv is None else argv)
        code = places.start(jobs, options)
        if options.where not in places.WATCHED and not options.dry_run:
            print(
                "how far they are: python -m launch.status"
                f" {shlex.join([job.workdir for job in jobs])}"
            )
        return code
    except KeyboardInterrupt:
        return cli.fail("interrupted, the same command continues", 130)
    except (ValueError, OSError) as error:
        return cli.fail(str(error))


def read(argv: Sequence[str]) -> tuple[list[Job], argparse.Namespace]:
    """The jobs and options of a command line. Raises ValueError for a mistake."""
    parser = cli.Parser(
        prog="python -m launch",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir",
        required=True,
        help=(
            "of the run, a directory or gs://BUCKET/PATH; with --stage, of all, each in"
            " WORKDIR/STAGE"
        ),
    )
    parser.add_argument("--config", default="", help="config of a training, FILE.py or FILE.py:ARG")
    parser.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="NAME=CONFIG",
        help="one of several trainings side by side; may be repeated",
    )
    places.define_options(parser, required=True)
    before, after = _split(list(argv))
    options, rest = parser.parse_known_args(before)
    if (
        bool(options.config) + bool(options.stage) + bool(after and not after[0].startswith("-"))
        != 1
    ):
        raise ValueError(
            "give one of --config FILE, --stage NAME=FILE (once for each), or -- VERB and its"
            " options"
        )
    check_path(options.workdir)
    if not in_bucket(options.workdir):
        options.workdir = os.path.abspath(options.workdir)
    if not (options.config or options.stage):
        if rest:
            raise ValueError(
                f"{rest[0]!r} is no option of launch; options of {after[0]} come after it"
            )
        check_options(after[0], after[1:])
        jobs = [
            Job(
                name_of(options.workdir),
                ("-m", f"imagen_jax.{after[0]}", *after[1:]),
                options.workdir,
            )
        ]
        return places.completed(jobs, options), options
    stages = _stages(options, rest)
    workdir_of = lambda name: f"{options.workdir.rstrip('/')}/{name}" if name else options.workdir
    if again := next(filter(CHECKED.match, after), ""):
        raise ValueError(
            f"{again!r} after -- would replace what launch has checked: --workdir, --config and its"
            " fields stand before it"
        )
    if after:
        check_options("train", after)
    jobs = [
        training(name, stage.config, stage.fields, workdir_of(name), options.where, after)
        for name, stage in stages.items()
    ]
    return (
        places.completed(
            jobs,
            options,
            [stage.topology for stage in stages.values()],
            [stage.env for stage in stages.values()],
        ),
        options,
    )


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first "--", and after it."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def _joined(rest: Sequence[str]) -> list[str]:
    """Options written "--name value" as "--name=value"."""
    made: list[str] = []
    for text in rest:
        if made and not text.startswith("--") and "=" not in made[-1]:
            made[-1] += f"={text}"
        else:
            made.append(text)
    return made


def _stages(options: argparse.Namespace, rest: Sequence[str]) -> dict[str, Stage]:
    """{name: stage}; the one training of --config is called ""."""
    stages = {"": Stage(options.config)} if options.config else {}
    for text in options.stage:
        name, equals, config = text.partition("=")
        if not equals or not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in stages:
            raise ValueError(
                f"--stage {text} is not NAME=CONFIG with a name of its own in small letters, such"
                " as sr_256=configs/sr_256.py"
            )
        stages[name] = Stage(config)
    shared = Stage("")
    for option in _joined(rest):
        found = re.fullmatch(
            r"--(?:([a-z][a-z0-9_]*)\.)?(config\.[^=]+|topology|env)=(.*)", option, re.DOTALL
        )
        name, what, value = found.groups() if found else ("", "", "")
        if not found or (name and name not in stages):
            raise ValueError(
                f"{option!r} is no option of launch; fields are written --config.optim.lr=3e-4, or"
                " --STAGE.config.optim.lr=3e-4 for one stage"
            )
        stage = stages[name] if name else shared
        if what == "topology":
            stage.topology = value
        elif what == "env":
            stage.env.append(value)
        else:
            stage.fields.append(f"--{what}={value}")
    for stage in stages.values():  # its own fields come last, and of two the last counts
        stage.fields = shared.fields + stage.fields
    return stages


if __name__ == "__main__":
    sys.exit(main())
