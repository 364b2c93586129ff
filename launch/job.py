"""`Job` describes a run for every platform: command, files, machines and environment."""

import dataclasses
import functools
import hashlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from imagen_jax import cli, config_options
from imagen_jax.data import sets
from imagen_jax.hardware.topology import Topology

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "gs://"
MOUNT = "/mnt/gs"  # every machine of a job mounts its buckets here
# Pods of a JobSet are named <name>-slice-<slice>-<host>-<5 characters>, and Kubernetes labels have
# at most 63 characters.
NAME_LENGTH = 40
ENVIRONMENT = ".imagen_jax"  # virtual environment in the home directory of a bare machine
INSTALL = """\
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.11 ~/{environment}
python3 -m uv pip install --quiet --python ~/{environment}/bin/python --editable '.[{extra}]'
"""
# Prefix of a line of kubectl's log: E1125 14:02:31.000000   77 cache.go:265] ...
KLOG = re.compile(r"[EFIW]\d{4} [\d:.]+ +\d+ \S+\] ")
LONGEST = 400  # longest error message of a tool, in characters
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY)(_|$)", re.IGNORECASE
)
COMMANDS = ("demo", "evaluate", "export", "plan", "prepare_data", "sample", "train")
# Options that open buckets themselves, as patterns by command; all other paths in buckets are
# mounted.
NATIVE = {
    "evaluate": (
        "checkpoint",
        "data",
        "output",
        "compare",
        r"cascade\.\w+\.checkpoint",
    ),
    "export": ("checkpoint", "output"),
    "prepare_data": ("output", "source"),
    "sample": ("output", "reproduce", r"config\.\w+\.checkpoint"),
    "train": ("workdir", "init_from", "fork", r"config\.data\.path", r"config\.data\.mixture"),
}
# Command lines are parsed in a subprocess, because the flags of a command are global and config
# flags read sys.argv when they are defined.
PARSE = """\
import importlib, sys
from imagen_jax import cli
sys.argv = sys.argv[1:]
importlib.import_module(sys.argv[0]).define_flags()
cli.parse(sys.argv)
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A command on machines.

    name: name of the job in schedulers, a DNS label of at most 40 characters made from the workdir.
    arguments: arguments of python, such as ("-m", "imagen_jax.train", ...); paths in buckets are
        written as gs://BUCKET/PATH, see `passed`.
    workdir: a directory or gs://BUCKET/PATH.
    config: resolved config of a training; empty for other commands, which write no progress.
    topology: the accelerators; None on this machine.
    setup: shell commands to run on each machine before the command.
    environment: environment variables of every process.
    secrets: names of environment variables whose values are passed on from the launcher and never
        printed.
    retries: maximum number of restarts after failures.
    stage: name of the cascade stage; empty for a single job.
    """

    name: str
    arguments: tuple[str, ...]
    workdir: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    topology: Topology | None = None
    setup: str = ""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    retries: int = 0
    stage: str = ""

    @property
    def steps(self) -> int:
        """Number of training steps; 0 for other commands."""
        return self.config["train"]["steps"] if self.config else 0

    @property
    def title(self) -> str:
        """Display name: the stage's name, or else the job's."""
        return self.stage or self.name

    @property
    def record(self) -> Path:
        """Directory of the launcher's own files.

        It is in the workdir or, if the workdir is in a bucket, in the cache of this user.
        """
        if is_bucket_url(self.workdir):
            return Path("~/.cache/imagen_jax/launch").expanduser() / self.name
        return Path(self.workdir) / "launch"

    @property
    def buckets(self) -> tuple[str, ...]:
        """Names of the buckets to mount: the arguments name them as /mnt/gs/NAME after `passed`."""
        names = (
            name
            for argument in passed(self.arguments)
            for name in re.findall(f"(?:{_before_path(argument)}){MOUNT}/([^/'\"]+)", argument)
        )
        return tuple(sorted(set(names)))

    @property
    def unmounted(self) -> str:
        """The first argument with a gs:// path that needs a mount; "" if there is none."""
        pairs = zip(self.arguments, passed(self.arguments))
        return next((given for given, argument in pairs if given != argument), "")

    @property
    def opens_buckets(self) -> bool:
        """Whether the command reads or writes a bucket without a mount."""
        return any(
            is_native and BUCKET in argument for argument, is_native in _natives(self.arguments)
        )

    @property
    def install(self) -> str:
        """Shell commands: `setup`, or by default those that install the checkout and JAX."""
        extra = "tpu" if self.topology.chip.platform == "tpu" else "cuda12"
        if self.config and self.config["train"].get("wandb"):
            extra += ",wandb"
        if self.opens_buckets:
            extra += ",gcs"
        return self.setup or INSTALL.format(environment=ENVIRONMENT, extra=extra)

    def command(self, python: str = "python3") -> tuple[str, ...]:
        """The command for the machines, see `passed`."""
        return (python, *passed(self.arguments))


def check_options(command: str, options: Sequence[str]) -> None:
    """Raises ValueError with the command's own message if it cannot parse the options.

    Values that the command checks later, such as paths, are not checked.

    command: the command, NAME of imagen_jax.NAME.
    """
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}: after -- give one of {', '.join(COMMANDS)}")
    result = subprocess.run(
        (sys.executable, "-c", PARSE, f"imagen_jax.{command}", *options),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if result.returncode:
        text = result.stderr.strip() or result.stdout.strip() or "no error message"
        raise ValueError(f"options of {command}: {text.splitlines()[-1].rpartition('error: ')[2]}")


def check_mesh(job: Job, devices: int, slices: int) -> None:
    """Raises ValueError if a training's mesh or batch is not divisible over its devices."""
    if not job.config:
        return
    from imagen_jax import sharding  # jax is slow to import, and --help does not need it

    try:
        sizes = sharding.mesh_sizes(job.config["mesh"], devices, slices)
        sharding.check_batch(job.config["data"]["batch_size"], sizes)
    except ValueError as error:
        raise ValueError(f"{job.title}: {error}") from error


def check_inputs(job: Job, code: str) -> None:
    """Raises ValueError if a training on other machines reads a path that exists only here.

    code: directory whose files the other machines have too; "" for none.
    """
    if not job.config:
        return
    # --init_from=PATH or --init_from PATH; the last one counts.
    starts = {
        flag: re.findall(rf"^--?{flag}[=\n](.*)", "\n".join(job.arguments), re.MULTILINE)[-1:]
        for flag in ("init_from", "fork")
    }
    data = job.config["data"]
    field = "path" if data["path"] else "mixture"
    inputs = [(f"--config.data.{field}", one.path) for one in sets.data_sets(data)]
    inputs += [
        (f"--{flag}", path)
        for flag, paths in starts.items()
        for path in paths
        if path and not path.startswith("embedded:")
    ]
    for flag, path in inputs:
        check_path(path, flag)
        parents = Path(os.path.normpath(path)).parents
        if not (is_bucket_url(path) or Path(MOUNT) in parents or (code and Path(code) in parents)):
            shown = f"{path} in {flag}" if flag == "--config.data.mixture" else f"{flag}={path}"
            raise ValueError(
                f"{job.title}: {shown} exists only on this machine: give {BUCKET}BUCKET/PATH"
            )


def is_bucket_url(text: str) -> bool:
    """Whether a path starts with gs://."""
    return text.startswith(BUCKET)


def check_path(text: str, flag: str = "--workdir") -> None:
    """Raises ValueError for an empty path, and for gs:// without a bucket name."""
    if not text.strip():
        raise ValueError(f"{flag} is empty: give a directory or {BUCKET}BUCKET/PATH")
    if is_bucket_url(text) and not re.match(r"[^/\s]", text.removeprefix(BUCKET)):
        raise ValueError(f"{flag} {text} has no bucket name: give {BUCKET}BUCKET/PATH")


def passed(arguments: Sequence[str]) -> list[str]:
    """The arguments of python as the machines get them: gs:// where a mount is not needed.

    The options of NATIVE keep gs://, all others get the mount directory.
    """
    return [
        argument if is_native else mounted(argument) for argument, is_native in _natives(arguments)
    ]


def _natives(arguments: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """(argument, whether it is an option of NATIVE or the value of one)."""
    command = next((text for text in arguments if text.startswith("imagen_jax.")), "")
    native = NATIVE.get(command.removeprefix("imagen_jax."), ())
    option = re.compile(rf"--?({'|'.join(native)})(=|$)") if native else None
    follows = False  # whether the argument is the value of the option before it
    for argument in arguments:
        match = option and option.match(argument)
        yield argument, bool(match) or follows
        follows = bool(match and not match[2])


def mounted(argument: str) -> str:
    """The argument with gs:// replaced by the mount directory.

    At its start or after "="; of a data.mixture, in each path.
    """
    return re.sub(f"({_before_path(argument)}){BUCKET}", rf"\1{MOUNT}/", argument)


def _before_path(argument: str) -> str:
    """Pattern of what comes before a path: the quote of each path of a data.mixture."""
    is_mixture = re.match(r"(--?config\.data\.mixture=)?\s*[(\[]", argument)
    return "['\"]" if is_mixture else "^|="


def name_of(workdir: str) -> str:
    """The job name for a workdir: its last two path components and a hash of the path."""
    full = workdir.rstrip("/") if is_bucket_url(workdir) else os.path.realpath(workdir)
    components = "-".join(full.removeprefix(BUCKET).split("/")[-2:]).lower()
    label = re.sub(r"[^a-z0-9]+", "-", components).strip("-")
    if not label[:1].isalpha():
        label = "r-" + label
    digest = hashlib.sha256(full.encode()).hexdigest()[:6]
    return f"{label[: NAME_LENGTH - 7].rstrip('-')}-{digest}"


def exports(environment: Mapping[str, str]) -> list[str]:
    """Lines of a shell script that export the variables."""
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def environment_of(assignments: Sequence[str]) -> dict[str, str]:
    """{NAME: value} of entries NAME=VALUE.

    Raises ValueError if an entry has another form or its name looks like a secret.
    """
    environment = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(VARIABLE, name):
            raise ValueError(f"--env {name if equals else text} is not NAME=VALUE")
        if SECRET_NAME.search(name):
            raise ValueError(
                f"--env {name}=... would be printed and stored: give --secret {name}, which passes"
                " the value from your environment"
            )
        environment[name] = value
    return environment


def check_secrets(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names. Raises ValueError if one is not set in this environment."""
    for name in names:
        if not re.fullmatch(VARIABLE, name) or name not in os.environ:
            raise ValueError(
                f"--secret {name.partition('=')[0]}: give the name of a variable that is set in"
                " your environment, not its value"
            )
    return tuple(names)


def read_config(config: str, fields: Sequence[str]) -> dict[str, Any]:
    """Loads a config file with its overrides, exactly as the trainer does.

    Raises ValueError if the config is invalid.

    config: FILE or FILE:ARG. fields: --config.optim.lr=3e-4, ...
    """
    from ml_collections import config_flags

    path = config.partition(":")[0]
    if not Path(path).is_file():
        raise ValueError(f"--config {path} does not exist")
    values = flags.FlagValues()
    argv = config_options.last_values(["launch", f"--config={config}", *fields], cli.CONFIGS)
    config_flags.DEFINE_config_file(
        "config", None, "", flag_values=values, lock_config=True, sys_argv=argv
    )
    try:
        values(argv)
    except cli.FLAG_ERRORS as error:
        reason = cli.cause(error).strip().splitlines()[-1]
        raise ValueError(f"--config {config}: {reason}") from error
    content = cli.stage_config(values.config, f"--config {config}")
    sets.data_sets(content["data"])  # says what is wrong
    return content


def training(
    title: str,
    config: str,
    fields: Sequence[str],
    workdir: str,
    where: str,
    more: Sequence[str] = (),
) -> Job:
    """The job of a training. Raises ValueError if its config is invalid.

    title: name of the stage. fields: --config.FIELD=VALUE options. where: a key of PLATFORMS;
    other machines read the config from their own checkout. more: further options of train.
    """
    content = read_config(config, fields)
    for name in ("path", "mixture"):
        option, value = f"--config.data.{name}=", content["data"][name]
        value = value if name == "path" else tuple(map(tuple, value))
        given = any(field.startswith(option) for field in fields)
        if not given and (BUCKET in str(value) or f"{MOUNT}/" in str(value)):
            # As an argument, so that the machines can open or mount its buckets.
            fields = (*fields, f"{option}{value}")
    file = config if where in ("local", "slurm") else inside_checkout(config)
    files = (f"--config={file}", f"--workdir={workdir}")
    arguments = ("-m", "imagen_jax.train", *files, *fields, *more)
    return Job(name_of(workdir), arguments, workdir, config=content, stage=title)


def inside_checkout(config: str) -> str:
    """FILE[:ARG] of a config relative to the checkout, so that it is valid on other machines.

    Raises ValueError if the file is not in the checkout.
    """
    path, colon, arg = config.partition(":")
    try:
        return str(Path(path).resolve().relative_to(ROOT)) + colon + arg
    except ValueError as error:
        raise ValueError(
            f"--config {path} is not in {ROOT}, so other machines do not have it"
        ) from error


@functools.cache
def revision() -> str:
    """Commit of the checkout, with "+changes" if files differ from it; "" if git has none."""
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    try:
        commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        changes = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + "+changes" * bool(changes)


def uncommitted(path: str) -> bool:
    """Whether a file of the checkout differs from the commit or is not in the commit."""
    command = ["git", "status", "--porcelain", "--ignored", "--", path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return bool(result.stdout.strip())


def ask(
    command: Sequence[str], tool: str, content: str | None = None
) -> subprocess.CompletedProcess:
    """Runs the tool of a scheduler or cloud. Raises ValueError if it is not installed.

    tool: how to install the tool, for the message. content: standard input.
    """
    try:
        return subprocess.run(command, input=content, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"{command[0]} is not on PATH: {tool}") from error


def refuse(done: subprocess.CompletedProcess, action: str) -> None:
    """Raises ValueError with the tool's own message if its exit code is not 0."""
    if done.returncode:
        raise ValueError(f"{action} failed with exit code {done.returncode}: {said(done)}")


def said(done: subprocess.CompletedProcess) -> str:
    """The error message of a tool in one line.

    From the first line that starts with ERROR; without one, the last three lines. Lines of
    kubectl's internal log are left out.
    """
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    messages = [line for line in lines if not KLOG.match(line)]
    lines = messages or [KLOG.sub("", line) for line in lines]
    errors = (i for i, line in enumerate(lines) if line.startswith("ERROR"))
    first = next(errors, max(0, len(lines) - 3))
    text = textwrap.shorten(" ".join(lines[first:]), LONGEST, placeholder=" ...")
    return text or "no error message"
