"""Where jobs can run, the options that all launchers share, and the rule that a run is not started
twice.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from imagen_jax import cli
from launch import gke, local, sky, slurm, status, tpu_pod
from launch.job import Job, check_inputs, check_mesh, check_secrets, environment_of, in_bucket

PLACES: dict[str, ModuleType] = {
    "local": local,
    "tpu": tpu_pod,
    "gke": gke,
    "slurm": slurm,
    "sky": sky,
}
WATCHED = ("local", "tpu")  # the launcher stays until the job has ended; the others hand it over
RETRIES = 3


def define_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """`required`: whether the place must be given."""
    parser.add_argument(
        "--where",
        choices=list(PLACES),
        required=required,
        help="this machine, Cloud TPU, GKE, SLURM or SkyPilot",
    )
    parser.add_argument(
        "--topology",
        default="",
        help="machines of a job: v5e:16x16, 2xv5p:4x4x8, v4-512 (cores), h100:4x8 (nodes x GPUs)",
    )
    parser.add_argument(
        "--setup",
        default="",
        help=(
            "shell commands on every machine before the job; default: on bare machines what"
            " installs it"
        ),
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for every process; may be repeated",
    )
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME",
        help="a variable of your environment, passed on and never shown",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=RETRIES,
        help="starts after a failure; preemptions of cloud machines are not counted",
    )
    parser.add_argument(
        "--spot", action="store_true", help="tpu, gke, sky: cheaper machines that can be taken away"
    )
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="only print what would be run, and what is running or finished already",
    )
    for place in PLACES.values():
        place.define_options(parser)


def completed(
    jobs: Sequence[Job],
    options: argparse.Namespace,
    topologies: Sequence[str] = (),
    environments: Sequence[Sequence[str]] = (),
) -> list[Job]:
    """The jobs with what the options say, and, for each job, a topology and variables of its own.
    Raises ValueError before anything is started.
    """
    if options.retries < 0:
        raise ValueError(f"--retries={options.retries} is negative")
    shared, secrets = environment_of(options.env), check_secrets(options.secret)
    check_own_options(options)
    if options.where == "local":
        secrets = ()  # its processes have this environment
    made = []
    for i, job in enumerate(jobs):
        own = environment_of(environments[i]) if environments else {}
        topology = _topology(
            topologies[i] if topologies and topologies[i] else options.topology, options.where, job
        )
        made.append(
            dataclasses.replace(
                job,
                topology=topology,
                setup=options.setup,
                environment=shared | own,
                secrets=secrets,
                retries=options.retries,
            )
        )
    for job in made:
        if options.where == "local" and (in_bucket(job.workdir) or job.unmounted):
            raise ValueError(
                f"{job.title}: a bucket is no directory of this machine; mount it and give the"
                " directory"
            )
        if not in_bucket(job.workdir):
            cli.check_directory("workdir", job.workdir)
        if job.topology:
            check_mesh(
                job,
                job.topology.chips,
                job.topology.slices if job.topology.chip.platform == "tpu" else 1,
            )
        elif options.devices:
            check_mesh(job, options.processes * options.devices, 1)
    PLACES[options.where].check(made, options)
    for job in made:
        if options.where in ("tpu", "gke", "sky"):
            check_inputs(job, options.code if options.where == "gke" else "")
    return made


def check_own_options(options: argparse.Namespace) -> None:
    """Raises ValueError for an option of another place than the one that was chosen, where it would
    do nothing.
    """
    for name, place in PLACES.items():
        parser = argparse.ArgumentParser(add_help=False)
        place.define_options(parser)
        for option, default in vars(parser.parse_args([])).items():
            if name != options.where and getattr(options, option) != default:
                raise ValueError(f"--{option} is for --where {name}, not for {options.where}")


def check_unused(options: argparse.Namespace) -> None:
    """Raises ValueError for an option that only a place reads, where --where names none."""
    parser = argparse.ArgumentParser(add_help=False)
    define_options(parser, required=False)
    for option, default in vars(parser.parse_args([])).items():
        if option != "dry_run" and getattr(options, option) != default:
            raise ValueError(f"--{option} needs --where")


def _topology(text: str, where: str, job: Job):
    """Raises ValueError if one is missing, or given where it means nothing."""
    from imagen_jax.hardware.topology import parse

    if where == "local":
        if text:
            raise ValueError(
                f"--topology {text} is not for --where local, which uses --processes and --devices"
            )
        return None
    if not text:
        raise ValueError(
            f"--where {where} needs --topology{f' for {job.stage}' if job.stage else ''}, such as"
            " v5e:16x16 or h100:4x8"
        )
    return parse(text)


def start(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Starts those jobs that neither run nor are finished, or prints what that would be; the exit
    code.
    """
    place = PLACES[options.where]
    todo = []
    for job in jobs:
        state, detail = standing(job, options)
        if state in ("finished", "running", "waiting"):
            print(
                f"{job.title}: {state} already{f' ({detail})' if detail else ''}, not started"
                f" again; its workdir: {job.workdir}",
                flush=True,
            )
        else:
            todo.append(job)
    if not todo:
        return 0
    if options.dry_run:
        for job in todo:
            if options.where == "local":  # elsewhere it need not be this machine that makes them
                check_can_be_made(job.record)
        print(place.render(todo, options))
        return 0
    for job in todo:
        try:
            job.record.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--workdir: {job.record} cannot be made: {error.strerror}") from error
    if options.where in WATCHED:
        return place.run(todo, options)
    return place.submit(todo, options)


def check_can_be_made(directory: Path) -> None:
    """Raises ValueError if nothing can be written to a directory, or to where it would be. Makes
    nothing that stays.
    """
    there = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"--workdir: {directory} cannot be made: {error.strerror}") from error


def standing(job: Job, options: argparse.Namespace) -> tuple[str, str]:
    """(state, detail) by the workdir, and, unless that says it all, by the scheduler that the job
    would be given to.

    With --dry_run a tool that is not installed, or a cluster that does not answer, is no error:
    then only the workdir is looked at.
    """
    row = status.read(job)
    guessed = row.state == "running" and in_bucket(job.workdir)  # by how old its newest row is
    if row.state == "finished" or (row.state == "running" and not guessed):
        return row.state, row.detail
    try:
        found = PLACES[options.where].find(job, options)
    except ValueError as error:
        if not options.dry_run:
            raise
        print(f"# {job.title}: not known whether it runs: {error}")
        found = ""
    if found == "finished" and job.steps and row.state != "unreadable":
        found = "ended"  # its files say that steps are left
    if row.state == "unreadable" and not found:
        print(f"# {job.title}: not known how far it is: {row.detail}", flush=True)
    if guessed and not found and options.where != "tpu":
        return "running", "it wrote a row minutes ago, though not as a job of this cluster"
    return found, options.where if found else ""
