"""Cloud TPU pods: requests a queued resource, runs the job on its workers and handles preemption.

The workers get the code as the archive of a commit. The job runs in the background there; ssh only
starts and watches it. So a lost connection or an ended launcher leaves the job running, and the
same command watches it again.
"""

import concurrent.futures
import contextlib
import dataclasses
import shlex
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence

from absl import flags

from imagen_jax import exit_codes
from imagen_jax.storage import only_process
from launch import status
from launch.gcloud import TOOL, Commands, QueuedResource
from launch.job import Job, ask, in_bucket, revision, uncommitted
from launch.tpu_worker import files, run_script, watch_command, written

POLL_S = 30.0
SSH_FAILED = 255
WITHOUT_CHANGES = "this checkout has uncommitted changes: the workers get the commit without them"
RECONNECTS = 20  # consecutive failures of ssh to machines that the cloud reports as healthy
_print_lock = threading.Lock()


def define_flags(values: flags.FlagValues) -> None:
    """The options of --where tpu."""
    flags.DEFINE_string("zone", "", "zone, such as us-west4-a", flag_values=values)
    flags.DEFINE_string(
        "project", "", "Google Cloud project; default: gcloud's", flag_values=values
    )
    flags.DEFINE_string(
        "runtime", "", "image of the TPU VMs; default: the chip's image", flag_values=values
    )
    flags.DEFINE_bool(
        "keep", False, "keep the queued resource when the job has ended", flag_values=values
    )


def check(jobs: Sequence[Job], options: flags.FlagValues) -> None:
    """Raises ValueError for options and jobs that Cloud TPU cannot run."""
    if not options.zone:
        raise ValueError("--where tpu needs --zone, such as us-west4-a")
    for job in jobs:
        if job.topology.chip.platform != "tpu":
            raise ValueError(f"--topology {job.topology} has no TPUs: give one such as v5e:16x16")
        if not in_bucket(job.workdir):
            raise ValueError(
                f"--workdir {job.workdir} would be lost with its machine: give gs://BUCKET/PATH"
            )
        flag = "--config="
        configs = [argument for argument in job.arguments if argument.startswith(flag)]
        config = configs[0].removeprefix(flag).partition(":")[0] if configs else ""
        if config and uncommitted(config):
            raise ValueError(
                f"{config} differs from the commit, which is what the workers get: commit it first"
            )


def render(jobs: Sequence[Job], options: flags.FlagValues) -> str:
    """The commands and the workers' script, in the order in which they run."""
    parts = []
    for job in jobs:
        commands = Commands(job, options)
        parts += [
            f"# {job.title}: commit {revision() or 'unknown'}",
            *([f"# {WITHOUT_CHANGES}"] if changed() else []),
            shlex.join(commands.create()),
            shlex.join(commands.describe()) + "  # until ACTIVE",
        ]
        for node in commands.nodes:
            parts += [
                shlex.join(commands.ssh(node, f"mkdir -p {job.name}")),
                shlex.join(commands.copy(files(job), node)),
                shlex.join(commands.ssh(node, watch_command(job, "ATTEMPT"))),
            ]
        parts += [shlex.join(commands.delete()), "# run.sh, on every worker:", run_script(job)]
    return "\n".join(parts)


def changed() -> bool:
    """Whether this checkout differs from the commit that the workers get."""
    return revision().endswith("+changes")


def find(job: Job, options: flags.FlagValues) -> str:
    """Always "": `supervise` takes up a resource that exists."""
    return ""


def run(jobs: Sequence[Job], options: flags.FlagValues) -> int:
    """Supervises all jobs side by side to their end; 0 or the first exit code that is not 0."""
    if not shutil.which("gcloud"):
        raise ValueError(f"gcloud is not on PATH: {TOOL}")
    if changed():
        print(WITHOUT_CHANGES, file=sys.stderr)
    codes: dict[str, int] = {}

    def supervise_one(job: Job) -> None:
        try:
            codes[job.name] = supervise(job, options)
        except (ValueError, OSError) as error:
            codes[job.name] = exit_codes.of(error)
            _report(job, "failed", str(error))

    with contextlib.ExitStack() as stack:
        for job in jobs:
            stack.enter_context(only_process(job.record, "looking after"))
        threads = [threading.Thread(target=supervise_one, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            print(
                "the jobs continue without this launcher; run the same command to watch them again",
                file=sys.stderr,
            )
            raise
        print(status.table(status.read(job) for job in jobs))
    return next((code for code in codes.values() if code), 0)


def supervise(job: Job, options: flags.FlagValues, poll_s: float = POLL_S) -> int:
    """Runs one job to its end; the exit code.

    It creates the job's queued resource or takes up an existing one, runs again after each
    preemption, and at most `job.retries` times after other failures.
    """
    commands = Commands(job, options)
    resource = QueuedResource(job, commands, poll_s, _print)
    failures = preemptions = 0
    while True:
        outcome = _attempt(job, commands, resource, poll_s)
        failures += outcome.kind in ("not served", "crashed", "faulty")
        preemptions += outcome.kind == "preempted"
        attempt = failures + preemptions
        if outcome.kind in ("finished", "refused", "out of reach") or failures > job.retries:
            state = "finished" if outcome.kind == "finished" else "failed"
            _report(job, state, outcome.reason, attempt)
            if options.keep or outcome.kind == "out of reach":
                _print(
                    f"{job.title}: its queued resource is kept and costs money until you run"
                    f" {shlex.join(commands.delete())}"
                )
            else:
                resource.delete()
            return outcome.code
        counts = f"{preemptions} preemptions, {failures} of {job.retries + 1} failures"
        state = "preempted" if outcome.kind == "preempted" else "waiting"
        _report(job, state, f"{outcome.reason}; {counts}", attempt)
        if outcome.kind != "crashed":
            resource.delete()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of an attempt. code: the launcher's exit code if no other attempt follows.

    Kinds:
        finished
        refused: the exit code is one that is not retried
        crashed: the job may succeed on the same machines
        faulty: the job may succeed on other machines
        preempted: the machines are gone
        not served: the cloud never provided the machines
        out of reach: ssh never reached the machines, which may run another launcher's job
    """

    kind: str
    reason: str = ""
    code: int = exit_codes.FAILED


def _attempt(job: Job, commands: Commands, resource: QueuedResource, poll_s: float) -> Outcome:
    """Runs the job once, from the resource's present state."""
    while (state := resource.state()[0]) == "DELETING":  # an earlier one of the same name
        time.sleep(poll_s)
    if not state:
        resource.request()
    state, reason = resource.wait(lambda state: _report(job, "waiting", f"queued resource {state}"))
    if state != "ACTIVE":
        kind = "not served" if state == "FAILED" else "preempted"
        return Outcome(kind, f"queued resource {state}{f': {reason}' if reason else ''}")
    _report(job, "running", f"on {job.topology}")
    return _run_to_its_end(job, commands, resource, poll_s)


def _run_to_its_end(
    job: Job, commands: Commands, resource: QueuedResource, poll_s: float
) -> Outcome:
    """Runs the job on existing machines.

    A lost connection is made again, without a limit if there has been one.
    """
    attempt, lost, reached = uuid.uuid4().hex[:12], 0, False
    while True:
        code, connected = _on_all_workers(job, commands, attempt)
        if code == 0:
            return Outcome("finished", code=0)
        if not resource.healthy():
            return Outcome("preempted", "its machines were preempted")
        if code in exit_codes.FINAL:
            return Outcome("refused", f"exit code {code}", code)
        if code != SSH_FAILED:
            kind = "faulty" if code == exit_codes.HARDWARE else "crashed"
            return Outcome(kind, f"exit code {code}")
        reached |= connected
        lost = 0 if connected else lost + 1
        if lost >= RECONNECTS and not reached:
            return Outcome(
                "crashed" if resource.created else "out of reach",
                f"ssh failed {lost} times to reach its machines, which the cloud reports as"
                " healthy",
            )
        if lost and lost % RECONNECTS == 0:
            _print(
                f"{job.title}: ssh failed {lost} times to reach its machines; the job goes on, and"
                " ssh is repeated"
            )
        time.sleep(poll_s)


def _on_all_workers(job: Job, commands: Commands, attempt: str) -> tuple[int, bool]:
    """Runs or watches the job on all workers of all slices, and prints their output.

    Returns (the first exit code that is not 0, whether all slices were reached).
    """
    with (
        written(job) as directory,
        concurrent.futures.ThreadPoolExecutor(len(commands.nodes)) as pool,
    ):

        def on_slice(node: str) -> tuple[int, bool]:
            paths = [str(directory / name) for name in files(job)]
            steps = (commands.ssh(node, f"mkdir -p {job.name}"), commands.copy(paths, node))
            for command in steps:
                if ask(command, TOOL).returncode:
                    return SSH_FAILED, False
            return _pass_on(job, commands.ssh(node, watch_command(job, attempt))), True

        codes, reached = zip(*pool.map(on_slice, commands.nodes))
    failed = sorted((code for code in codes if code), key=lambda code: code == SSH_FAILED)
    return failed[0] if failed else 0, all(reached)


def _pass_on(job: Job, command: Sequence[str]) -> int:
    """Runs a command and prints its output with the job's title; its exit code."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
    )
    for line in process.stdout:
        _print(f"{job.title} | {line.rstrip()}")
    return process.wait()


def _report(job: Job, state: str, detail: str, attempt: int = 0) -> None:
    """Records a state and prints it with the time."""
    status.record(job, "tpu", state, detail, attempt)
    _print(f"{time.strftime('%H:%M:%S')} {job.title}: {state}{f', {detail}' if detail else ''}")


def _print(line: str) -> None:
    with _print_lock:
        print(line, flush=True)
