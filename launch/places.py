"""Where jobs can run, the options that all launchers share, and the check against double starts."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from absl import flags

from imagen_jax import cli
from imagen_jax.hardware import topology
from launch import gke, local, sky, slurm, status, tpu_pod
from launch.job import Job, check_inputs, check_mesh, check_secrets, environment_of, in_bucket

PLACES: dict[str, ModuleType] = {
    "local": local,
    "tpu": tpu_pod,
    "gke": gke,
    "slurm": slurm,
    "sky": sky,
}
WATCHED = ("local", "tpu")  # the launcher stays until the job ends; the others only submit it
CLOUDS = ("tpu", "gke", "sky")  # machines there read a training's data from buckets
RETRIES = 3


def define_flags(values: flags.FlagValues, required: bool) -> None:
    """The options of all launchers. required: whether --where must be given."""
    flags.DEFINE_enum(
        "where",
        None,
        list(PLACES),
        "this machine, Cloud TPU, GKE, SLURM or SkyPilot",
        required=required,
        flag_values=values,
    )
    flags.DEFINE_string(
        "topology",
        "",
        "machines of a job: v5e:16x16, 2xv5p:4x4x8, v4-512 (cores), h100:4x8 (nodes x GPUs)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "setup",
        "",
        "shell commands to run on every machine before the job; default: install the package on"
        " machines that start without it",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "env", [], "NAME=VALUE: a variable of every process", flag_values=values
    )
    flags.DEFINE_multi_string(
        "secret",
        [],
        "name of a variable of your environment; its value is passed on and never shown",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "retries",
        RETRIES,
        "restarts after a failure; preemptions of cloud machines are not counted",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "spot", False, "tpu, gke, sky: cheaper machines that can be preempted", flag_values=values
    )
    flags.DEFINE_bool(
        "dry_run",
        False,
        "only print what would run, and which jobs are running or finished",
        flag_values=values,
    )
    flags.DEFINE_alias("dry-run", "dry_run", flag_values=values)
    for place in PLACES.values():
        place.define_flags(values)


def completed(
    jobs: Sequence[Job],
    options: flags.FlagValues,
    topologies: Sequence[str] = (),
    environments: Sequence[Sequence[str]] = (),
) -> list[Job]:
    """The jobs with the machines and variables that the options give.

    topologies, environments: those of single jobs, in the order of `jobs`. Raises ValueError for an
    invalid combination, before anything starts.
    """
    if options.retries < 0:
        raise ValueError(f"--retries={options.retries} is negative: give 0 or more")
    shared, secrets = environment_of(options.env), check_secrets(options.secret)
    check_own_options(options)
    if options.where == "local":
        secrets = ()  # local processes inherit this environment
    complete = []
    for i, job in enumerate(jobs):
        own = environment_of(environments[i]) if environments else {}
        text = topologies[i] if topologies and topologies[i] else options.topology
        settings = {
            "topology": _topology(text, options.where, job),
            "setup": options.setup,
            "environment": shared | own,
            "secrets": secrets,
            "retries": options.retries,
        }
        complete.append(dataclasses.replace(job, **settings))
    for job in complete:
        _check_job(job, options)
    PLACES[options.where].check(complete, options)
    if options.where in CLOUDS:
        for job in complete:
            check_inputs(job, options.code if options.where == "gke" else "")
    return complete


def _check_job(job: Job, options: flags.FlagValues) -> None:
    """Raises ValueError if a job's paths or its mesh do not suit its machines."""
    if options.where == "local" and (in_bucket(job.workdir) or job.unmounted):
        raise ValueError(
            f"{job.title}: {job.unmounted or job.workdir} is in a bucket: mount it on this machine"
            " and give the directory"
        )
    if not in_bucket(job.workdir):
        cli.check_directory("workdir", job.workdir)
    if job.topology:
        slices = job.topology.slices if job.topology.chip.platform == "tpu" else 1
        check_mesh(job, job.topology.chips, slices)
    elif options.devices:
        check_mesh(job, options.processes * options.devices, 1)


def check_own_options(options: flags.FlagValues) -> None:
    """Raises ValueError for an option of a place other than --where, which would be ignored."""
    for name, place in PLACES.items():
        for flag in options.get_flags_for_module(place.__name__):
            if name != options.where and flag.value != flag.default:
                raise ValueError(f"--{flag.name} is for --where {name}, not for {options.where}")


def check_unused(options: flags.FlagValues) -> None:
    """Raises ValueError for a launcher's option without --where, which would be ignored."""
    for module in (__name__, *(place.__name__ for place in PLACES.values())):
        for flag in options.get_flags_for_module(module):
            if flag.name not in ("dry_run", "dry-run") and flag.value != flag.default:
                raise ValueError(f"--{flag.name} needs --where")


def _topology(text: str, where: str, job: Job) -> topology.Topology | None:
    """Raises ValueError if --topology is missing, or given for this machine."""
    if where == "local":
        if text:
            raise ValueError(
                f"--topology {text} is not for --where local: give --processes and --devices"
            )
        return None
    if not text:
        raise ValueError(
            f"--where {where} needs --topology{f' for {job.stage}' if job.stage else ''}, such as"
            " v5e:16x16 or h100:4x8"
        )
    return topology.parse(text)


def start(jobs: Sequence[Job], options: flags.FlagValues) -> int:
    """Starts the jobs that neither run nor are finished, or prints them with --dry_run.

    Returns the exit code.
    """
    place = PLACES[options.where]
    to_start = []
    for job in jobs:
        state, detail = standing(job, options)
        if state in ("finished", "running", "waiting"):
            print(
                f"{job.title}: {state} already{f' ({detail})' if detail else ''}, not started"
                f" again; its workdir: {job.workdir}",
                flush=True,
            )
        else:
            to_start.append(job)
    if not to_start:
        return 0
    if options.dry_run:
        for job in to_start:
            if options.where == "local":  # other launchers may run on another machine later
                check_can_be_made(job.record)
        print(place.render(to_start, options))
        return 0
    for job in to_start:
        try:
            job.record.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--workdir: cannot make {job.record}: {error.strerror}") from error
    return (place.run if options.where in WATCHED else place.submit)(to_start, options)


def check_can_be_made(directory: Path) -> None:
    """Raises ValueError if a directory, or the first existing one above it, is not writable."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(f"--workdir: cannot make {directory}: {error.strerror}") from error


def standing(job: Job, options: flags.FlagValues) -> tuple[str, str]:
    """The job's (state, detail) by its workdir and, where that is not conclusive, its scheduler.

    With --dry_run a missing tool or an unreachable cluster is reported, not an error: then the
    workdir alone decides.
    """
    row = status.read(job)
    by_age = row.state == "running" and in_bucket(job.workdir)  # a recent row, not a lock
    if row.state == "finished" or (row.state == "running" and not by_age):
        return row.state, row.detail
    try:
        state = PLACES[options.where].find(job, options)
    except ValueError as error:
        if not options.dry_run:
            raise
        print(f"# {job.title}: cannot tell whether it runs: {error}")
        state = ""
    if state == "finished" and job.steps and row.state != "unreadable":
        state = "ended"  # the job ended, but its files show that steps are left
    if row.state == "unreadable" and not state:
        print(f"# {job.title}: cannot read its progress: {row.detail}", flush=True)
    if by_age and not state and options.where != "tpu":
        return "running", "it wrote a row minutes ago, though not as a job of this cluster"
    return state, options.where if state else ""
