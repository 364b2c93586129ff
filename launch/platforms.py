"""The platforms on which jobs run, their common options, and the check against double starts."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from absl import flags

from imagen_jax import output_paths
from imagen_jax.hardware import topology
from launch import gke, local, sky, slurm, status, tpu_pod
from launch.job import Job, check_inputs, check_mesh, check_secrets, environment_of, is_bucket_url

PLATFORMS: dict[str, ModuleType] = {
    "local": local,
    "tpu": tpu_pod,
    "gke": gke,
    "slurm": slurm,
    "sky": sky,
}
WATCHED = ("local", "tpu")  # the launcher runs until the job ends; other platforms only submit it
CLOUDS = ("tpu", "gke", "sky")  # the data of a training must be in a bucket or on all machines
RETRIES = 3


def define_flags(values: flags.FlagValues, required: bool) -> None:
    """Defines the common options and those of each platform.

    required: whether --where is mandatory.
    """
    flags.DEFINE_enum(
        "where",
        None,
        list(PLATFORMS),
        "platform: local (this machine), tpu (Cloud TPU), gke, slurm or sky (SkyPilot)",
        required=required,
        flag_values=values,
    )
    flags.DEFINE_string(
        "topology",
        "",
        "accelerators of a job, such as v5e:16x16, 2xv5p:4x4x8 (two slices), v4-512 (cores) or"
        " h100:4x8 (nodes x GPUs)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "setup",
        "",
        "shell commands to run on every machine before the job; default: install the package where"
        " it is missing",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "env", [], "NAME=VALUE: environment variable of every process", flag_values=values
    )
    flags.DEFINE_multi_string(
        "secret",
        [],
        "name of an environment variable of yours; its value is passed to the job and never"
        " printed",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "retries",
        RETRIES,
        "maximum number of restarts after failures; preemptions do not count",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "spot", False, "tpu, gke, sky: cheaper machines that can be preempted", flag_values=values
    )
    flags.DEFINE_bool(
        "dry_run",
        False,
        "print the commands and the jobs that are running or finished; start nothing",
        flag_values=values,
    )
    flags.DEFINE_alias("dry-run", "dry_run", flag_values=values)
    for platform in PLATFORMS.values():
        platform.define_flags(values)


def completed(
    jobs: Sequence[Job],
    options: flags.FlagValues,
    topologies: Sequence[str] = (),
    environments: Sequence[Sequence[str]] = (),
) -> list[Job]:
    """The jobs with machines, setup, environment and retries from the options.

    topologies, environments: values per job, in the order of `jobs`; they override the options.
    Raises ValueError for an invalid combination, before anything starts.
    """
    if options.retries < 0:
        raise ValueError(f"--retries={options.retries} is negative: give 0 or more")
    common_environment, secrets = environment_of(options.env), check_secrets(options.secret)
    check_own_options(options)
    if options.where == "local":
        secrets = ()  # local processes inherit this environment
    complete = []
    for i, job in enumerate(jobs):
        job_environment = environment_of(environments[i]) if environments else {}
        topology_text = topologies[i] if topologies and topologies[i] else options.topology
        settings = {
            "topology": _topology(topology_text, options.where, job),
            "setup": options.setup,
            "environment": common_environment | job_environment,
            "secrets": secrets,
            "retries": options.retries,
        }
        complete.append(dataclasses.replace(job, **settings))
    for job in complete:
        _check_job(job, options)
    PLATFORMS[options.where].check(complete, options)
    if options.where in CLOUDS:
        for job in complete:
            check_inputs(job, options.code if options.where == "gke" else "")
    return complete


def _check_job(job: Job, options: flags.FlagValues) -> None:
    """Raises ValueError if a job's paths or its mesh are impossible on its machines."""
    if options.where == "local" and job.unmounted:
        raise ValueError(
            f"{job.title}: {job.unmounted} is in a bucket: mount it on this machine and give the"
            " directory"
        )
    if not is_bucket_url(job.workdir):
        output_paths.check_directory("workdir", job.workdir)
    if job.topology:
        slices = job.topology.slices if job.topology.chip.platform == "tpu" else 1
        check_mesh(job, job.topology.chips, slices)
    elif options.devices:
        check_mesh(job, options.processes * options.devices, 1)


def check_own_options(options: flags.FlagValues) -> None:
    """Raises ValueError if an option of another platform is set; it would be ignored."""
    for name, platform in PLATFORMS.items():
        for flag in options.get_flags_for_module(platform.__name__):
            if name != options.where and flag.value != flag.default:
                raise ValueError(f"--{flag.name} is for --where {name}, not for {options.where}")


def check_unused(options: flags.FlagValues) -> None:
    """Raises ValueError if a launcher option is set without --where; it would be ignored."""
    for module in (__name__, *(platform.__name__ for platform in PLATFORMS.values())):
        for flag in options.get_flags_for_module(module):
            if flag.name not in ("dry_run", "dry-run") and flag.value != flag.default:
                raise ValueError(f"--{flag.name} needs --where")


def _topology(text: str, where: str, job: Job) -> topology.Topology | None:
    """The parsed --topology; None for --where local.

    Raises ValueError if it is missing, or given with --where local.
    """
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
    platform = PLATFORMS[options.where]
    to_start = []
    for job in jobs:
        state, detail = standing(job, options)
        if state in ("finished", "running", "waiting"):
            print(
                f"{job.title}: already {state}{f' ({detail})' if detail else ''}, not started"
                f" again; workdir: {job.workdir}",
                flush=True,
            )
        else:
            to_start.append(job)
    if not to_start:
        return 0
    if options.dry_run:
        for job in to_start:
            if options.where == "local":  # other platforms may create it on another machine
                check_can_be_made(job.record)
        print(platform.render(to_start, options))
        return 0
    for job in to_start:
        try:
            job.record.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(_cannot_create(job.record, error)) from error
    return (platform.run if options.where in WATCHED else platform.submit)(to_start, options)


def check_can_be_made(directory: Path) -> None:
    """Raises ValueError if a directory, or the first existing one above it, is not writable."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(_cannot_create(directory, error)) from error


def _cannot_create(directory: Path, error: OSError) -> str:
    return f"--workdir: cannot create {directory} ({error.strerror}): give another directory"


def standing(job: Job, options: flags.FlagValues) -> tuple[str, str]:
    """(state, detail) of the job, from its workdir or, if that is not conclusive, its scheduler.

    With --dry_run, a missing tool or an unreachable cluster is printed instead of raised, and the
    state comes from the workdir alone.
    """
    row = status.read(job)
    # A training that has mounted its bucket has no lock there: "running" then means only that its
    # newest row of metrics is recent.
    inferred_from_age = row.state == "running" and is_bucket_url(job.workdir) and not row.is_locked
    if row.state == "finished" or (row.state == "running" and not inferred_from_age):
        return row.state, row.detail
    try:
        state = PLATFORMS[options.where].find(job, options)
    except ValueError as error:
        if not options.dry_run:
            raise
        print(f"# {job.title}: cannot determine whether it is running: {error}")
        state = ""
    if state == "finished" and job.steps and row.state != "unreadable":
        state = "ended"  # the scheduler's job ended before the last training step
    if row.state == "unreadable" and not state:
        print(f"# {job.title}: cannot read its progress: {row.detail}", flush=True)
    if inferred_from_age and not state and options.where != "tpu":
        return (
            "running",
            "its metrics were updated minutes ago, but no job of this cluster has its name",
        )
    return state, options.where if state else ""
