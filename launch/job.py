"""One description of a run, which every launcher renders: what is run, where it keeps its files, on
which machines, in which environment.
"""

import dataclasses
import functools
import hashlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax import cli, sharding

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "gs://"
MOUNT = "/mnt/gs"  # where a bucket's files are on every machine that a job runs on
# Pods of a JobSet are called <name>-slice-<slice>-<host>-<5 characters>, and no Kubernetes label is
# longer than 63.
NAME_LENGTH = 40
ENVIRONMENT = ".imagen_jax"  # in the home directory of a machine that starts bare
INSTALL = """\
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.11 ~/{environment}
python3 -m uv pip install --quiet --python ~/{environment}/bin/python --editable '.[{extra}]'
"""
KLOG = re.compile(
    r"[EFIW]\d{4} [\d:.]+ +\d+ \S+\] "
)  # E1125 14:02:31.000000   77 memcache.go:265] ...
LONGEST = 400  # letters of a tool's complaint
USAGE_ERROR = 2  # the verbs' exit code for what no repetition mends
VERBS = ("demo", "evaluate", "export", "plan", "prepare_data", "sample", "train")
# A verb's flags are global, and those of a config are read from the command line as they are
# defined: each is parsed in a process of its own.
PARSE = """\
import importlib, sys
from imagen_jax import cli, sharding
verb = importlib.import_module(sys.argv[1])
if hasattr(verb, "define_flags"):
    sys.argv = sys.argv[1:]
    verb.define_flags()
    cli.parse(sys.argv)
else:
    verb.parser().parse_args(sys.argv[2:])
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A command on machines.

    name: a DNS label of at most 40 characters, the same for the same workdir: what a scheduler
    knows the job by. arguments: of python, such as ("-m", "imagen_jax.train", ...); buckets in them
    as gs://. workdir: a directory or gs://BUCKET/PATH. config: that of a training, as the trainer
    will read it; empty: nothing tells when the job is finished. topology: None on this machine.
    setup: shell commands before the command on each machine. environment: for every process.
    secrets: names of variables whose values are taken from the launcher's environment and never
    shown. retries: how often the job is started again after it failed or was preempted.
    """

    name: str
    arguments: tuple[str, ...]
    workdir: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    topology: Any = None
    setup: str = ""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    retries: int = 0
    stage: str = ""

    @property
    def steps(self) -> int:
        """How many the training takes; 0: no training."""
        return self.config["train"]["steps"] if self.config else 0

    @property
    def title(self) -> str:
        """What people call it: its stage, or its name."""
        return self.stage or self.name

    @property
    def record(self) -> Path:
        """The launchers' own files: in the workdir, or, of a workdir in a bucket, in this user's
        cache.
        """
        return (
            Path("~/.cache/imagen_jax/launch").expanduser() / self.name
            if in_bucket(self.workdir)
            else Path(self.workdir) / "launch"
        )

    @property
    def buckets(self) -> tuple[str, ...]:
        """The buckets that the command's arguments name, as gs:// or by where they are mounted."""
        return tuple(
            sorted(
                {
                    found
                    for argument in self.arguments
                    for found in re.findall(rf"(?:^|=)(?:{BUCKET}|{MOUNT}/)([^/]+)", argument)
                }
            )
        )

    @property
    def unmounted(self) -> str:
        """The first argument with a path that is none before its bucket is mounted, "" if there is
        none.
        """
        return next((argument for argument in self.arguments if mounted(argument) != argument), "")

    @property
    def install(self) -> str:
        """`setup`, or, on machines that start bare, what installs the checkout and JAX for their
        chips with a Python that is new enough.
        """
        extra = "tpu" if self.topology.chip.platform == "tpu" else "cuda12"
        return self.setup or INSTALL.format(environment=ENVIRONMENT, extra=extra)

    def command(self, python: str = "python3") -> tuple[str, ...]:
        """The command as the machines run it: buckets are directories there."""
        return (python, *(mounted(argument) for argument in self.arguments))


def check_options(verb: str, options: Sequence[str]) -> None:
    """Raises ValueError, in the verb's words, for options that it would refuse. Values that it
    looks at later, such as paths, are not looked at.
    """
    if verb not in VERBS:
        raise ValueError(
            f"{verb!r} is no verb of imagen_jax; after -- give one of {', '.join(VERBS)}"
        )
    done = subprocess.run(
        (sys.executable, "-c", PARSE, f"imagen_jax.{verb}", *options),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise ValueError(f"options of {verb}: {words.rpartition('error: ')[2]}")


def check_mesh(job: Job, devices: int, slices: int) -> None:
    """Raises ValueError, with what would do, if a training's mesh or batch does not divide over its
    devices.
    """
    if not job.config:
        return
    try:
        sizes = sharding.mesh_sizes(job.config["mesh"], devices, slices)
        sharding.check_batch(job.config["data"]["batch_size"], sizes)
    except ValueError as error:
        raise ValueError(f"{job.title}: {error}") from error


def check_inputs(job: Job, code: str) -> None:
    """Raises ValueError if a training on machines elsewhere reads a path that only this one has.
    `code`: directory of files that they have too, "" for none.
    """
    if not job.config:
        return
    begun = re.findall(r"^--?init_from[=\n](.*)", "\n".join(job.arguments), re.MULTILINE)[
        -1:
    ]  # --init_from=PATH or --init_from PATH
    inputs = [
        ("--config.data.path", job.config["data"]["path"]),
        *(("--init_from", path) for path in begun if path and not path.startswith("embedded:")),
    ]
    for flag, path in inputs:
        check_path(path, flag)
        above = Path(os.path.normpath(path)).parents
        if not (in_bucket(path) or Path(MOUNT) in above or (code and Path(code) in above)):
            raise ValueError(
                f"{job.title}: {flag}={path} is a path of this machine, which the others do not"
                f" have: give {BUCKET}BUCKET/PATH"
            )


def in_bucket(path: str) -> bool:
    return path.startswith(BUCKET)


def check_path(text: str, flag: str = "--workdir") -> None:
    """Raises ValueError for one that was left empty, and for a bucket without its name."""
    if not text.strip():
        raise ValueError(f"{flag} is empty: give a directory or {BUCKET}BUCKET/PATH")
    if in_bucket(text) and not re.match(r"[^/\s]", text.removeprefix(BUCKET)):
        raise ValueError(f"{flag} {text} names no bucket: give {BUCKET}BUCKET/PATH")


def mounted(argument: str) -> str:
    """An argument with gs://BUCKET/PATH, alone or after "=", as the directory that it is mounted
    at.
    """
    return re.sub(rf"(^|=){BUCKET}", rf"\1{MOUNT}/", argument, count=1)


def name_of(workdir: str) -> str:
    """The name of the job that works in `workdir`: its last two parts and a hash of all of it, so
    that no other workdir gives the same.
    """
    full = workdir.rstrip("/") if in_bucket(workdir) else os.path.realpath(workdir)
    words = re.sub(
        r"[^a-z0-9]+", "-", "-".join(full.removeprefix(BUCKET).split("/")[-2:]).lower()
    ).strip("-")
    digest = hashlib.sha256(full.encode()).hexdigest()[:6]
    return f"{('r-' + words if not words[:1].isalpha() else words)[: NAME_LENGTH - 7].rstrip('-')}-{digest}"


def exports(environment: Mapping[str, str]) -> list[str]:
    """Lines of a shell script."""
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def environment_of(given: Sequence[str]) -> dict[str, str]:
    """{NAME: value} of NAME=VALUE. Raises ValueError for another form, and for a name that looks
    like a secret's.
    """
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"--env {name if equals else text} is not NAME=VALUE")
        if re.search(
            r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY)(_|$)", name, re.IGNORECASE
        ):
            raise ValueError(
                f"--env {name}=... would be printed and stored: give --secret {name}, which is"
                " taken from your environment"
            )
        found[name] = value
    return found


def check_secrets(names: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError if one is no variable of this environment."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name not in os.environ:
            raise ValueError(
                f"--secret {name.partition('=')[0]}: give the name of a variable that is set in"
                " your environment, not its value"
            )
    return tuple(names)


def read_config(config: str, fields: Sequence[str]) -> dict[str, Any]:
    """The config of a training as the trainer will read it. `fields`: --config.optim.lr=3e-4, ...
    Raises ValueError that says what is wrong.
    """
    from absl import flags
    from ml_collections import config_flags

    path = config.partition(":")[0]
    if not Path(path).is_file():
        raise ValueError(f"--config {path} does not exist")
    values, argv = flags.FlagValues(), ["launch", f"--config={config}", *fields]
    config_flags.DEFINE_config_file(
        "config", None, "", flag_values=values, lock_config=True, sys_argv=argv
    )
    try:
        values(argv)
    except cli.FLAG_ERRORS as error:
        raise ValueError(
            f"--config {config}: {cli.cause(error).strip().splitlines()[-1]}"
        ) from error
    return cli.data_config(values.config, f"--config {config}")


def training(
    title: str,
    config: str,
    fields: Sequence[str],
    workdir: str,
    where: str,
    more: Sequence[str] = (),
) -> Job:
    """The job of a training; its config is read as the trainer will read it, and must be good.
    `where` it runs: machines elsewhere read their checkout's file.
    """
    content = read_config(config, fields)
    if in_bucket(path := content["data"]["path"]) and not any(
        field.startswith("--config.data.path=") for field in fields
    ):
        fields = (
            *fields,
            f"--config.data.path={path}",
        )  # in an argument, so that its bucket is mounted
    file = config if where in ("local", "slurm") else inside_checkout(config)
    arguments = (
        "-m",
        "imagen_jax.train",
        f"--config={file}",
        f"--workdir={workdir}",
        *fields,
        *more,
    )
    return Job(
        name=name_of(workdir), stage=title, workdir=workdir, config=content, arguments=arguments
    )


def inside_checkout(config: str) -> str:
    """FILE[:ARG] of a config relative to the checkout, which is where another machine has it.
    Raises ValueError if it is elsewhere.
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
    """The commit that this checkout is at, with "+changes" if files differ from it; ""
    without git.
    """
    try:
        git = functools.partial(
            subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True
        )
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        return commit + "+changes" * bool(
            git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


def uncommitted(path: str) -> bool:
    """Whether a file of the checkout is not in the commit, or not as it is there; False without
    git.
    """
    done = subprocess.run(
        ["git", "status", "--porcelain", "--ignored", "--", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return bool(done.stdout.strip())


def ask(
    command: Sequence[str], tool: str, content: str | None = None
) -> subprocess.CompletedProcess:
    """Runs a scheduler's or a cloud's own tool. Raises ValueError, with what to install, if it is
    not there.
    """
    try:
        return subprocess.run(command, input=content, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"{command[0]} is not on PATH: {tool}") from error


def refuse(done: subprocess.CompletedProcess, what: str) -> None:
    """Raises ValueError with a tool's own words if it failed."""
    if done.returncode:
        raise ValueError(f"{what} failed with exit code {done.returncode}: {said(done)}")


def said(done: subprocess.CompletedProcess) -> str:
    """What a tool that failed said, in one line: from its line ERROR on, which says what to do, or
    the last three; without the log of kubectl's own code.
    """
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    lines = [line for line in lines if not KLOG.match(line)] or [
        KLOG.sub("", line) for line in lines
    ]
    first = next(
        (i for i, line in enumerate(lines) if line.startswith("ERROR")), max(0, len(lines) - 3)
    )
    return (
        textwrap.shorten(" ".join(lines[first:]), LONGEST, placeholder=" ...") or "it said nothing"
    )
