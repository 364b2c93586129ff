"""Cloud TPU pods: requests a queued resource, runs the job on its workers and handles preemption.

The workers receive an archive of the commit. The job runs there in the background; ssh only starts
it and follows its log. If the connection is lost or the launcher ends, the job continues, and the
same command follows it again.
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
from imagen_jax.locks import only_process
from launch import status
from launch.gcloud import TOOL, Commands, QueuedResource
from launch.job import Job, ask, is_bucket_url, revision, uncommitted
from launch.tpu_worker import files, run_script, watch_command, written

POLL_S = 30.0
SSH_FAILED = 255
WITHOUT_CHANGES = "this checkout has uncommitted changes, which the workers do not get"
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
    flags.DEFINE_bool("keep", False, "keep the queued resource after the job", flag_values=values)


def check(jobs: Sequence[Job], options: flags.FlagValues) -> None:
    """Raises ValueError for options and jobs that Cloud TPU cannot run."""
    if not options.zone:
        raise ValueError("--where tpu needs --zone, such as us-west4-a")
    for job in jobs:
        if job.topology.chip.platform != "tpu":
            raise ValueError(f"--topology {job.topology} has no TPUs: give one such as v5e:16x16")
        if not is_bucket_url(job.workdir):
            raise ValueError(
                f"--workdir {job.workdir} would be lost with its machine: give gs://BUCKET/PATH"
            )
        flag = "--config="
        configs = [argument for argument in job.arguments if argument.startswith(flag)]
        config = configs[0].removeprefix(flag).partition(":")[0] if configs else ""
        if config and uncommitted(config):
            raise ValueError(
                f"{config} has uncommitted changes, and the workers get the commit: commit it first"
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
    """Always "" (unknown): `supervise` attaches to a resource that exists."""
    return ""


def run(jobs: Sequence[Job], options: flags.FlagValues) -> int:
    """Supervises all jobs in parallel until they end. Returns the first nonzero exit code, or 0."""
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
            stack.enter_context(only_process(job.record, "supervising the job of"))
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
    """Runs one job to completion and returns its exit code.

    Creates the job's queued resource or attaches to an existing one. Restarts after every
    preemption, and at most `job.retries` times after other failures.
    """
    commands = Commands(job, options)
    resource = QueuedResource(job, commands, poll_s, _print)
    failures = preemptions = 0
    while True:
        outcome = _attempt(job, commands, resource, poll_s)
        failures += outcome.kind in ("not served", "crashed", "faulty")
        preemptions += outcome.kind == "preempted"
        attempt_number = failures + preemptions
        if outcome.kind in ("finished", "refused", "out of reach") or failures > job.retries:
            state = "finished" if outcome.kind == "finished" else "failed"
            _report(job, state, outcome.reason, attempt_number)
            if options.keep or outcome.kind == "out of reach":
                _print(
                    f"{job.title}: its queued resource still exists and is billed until you run"
                    f" {shlex.join(commands.delete())}"
                )
            else:
                resource.delete()
            return outcome.code
        counts = (
            f"preemptions: {preemptions}, failures: {failures} (retries: at most {job.retries})"
        )
        state = "preempted" if outcome.kind == "preempted" else "waiting"
        _report(job, state, f"{outcome.reason}; {counts}", attempt_number)
        if outcome.kind != "crashed":
            resource.delete()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an attempt ended. code: exit code of the launcher if no other attempt follows.

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
    """Makes one attempt, from the current state of the resource."""
    # An earlier resource of the same name is still being deleted.
    while (state := resource.state()[0]) == "DELETING":
        time.sleep(poll_s)
    if not state:
        resource.request()
    state, reason = resource.wait(
        lambda new_state: _report(job, "waiting", f"queued resource {new_state}")
    )
    if state != "ACTIVE":
        kind = "not served" if state == "FAILED" else "preempted"
        return Outcome(kind, f"queued resource {state}{f': {reason}' if reason else ''}")
    _report(job, "running", f"on {job.topology}")
    return _run_to_its_end(job, commands, resource, poll_s)


def _run_to_its_end(
    job: Job, commands: Commands, resource: QueuedResource, poll_s: float
) -> Outcome:
    """Runs the job on existing machines.

    Reconnects after a lost connection: without limit once the machines were reached, and otherwise
    until RECONNECTS consecutive failures.
    """
    attempt_id, ssh_failures, ever_connected = uuid.uuid4().hex[:12], 0, False
    while True:
        code, connected = _on_all_workers(job, commands, attempt_id)
        if code == 0:
            return Outcome("finished", code=0)
        if not resource.healthy():
            return Outcome("preempted", "its machines were preempted")
        if code in exit_codes.FINAL:
            return Outcome("refused", f"exit code {code}", code)
        if code != SSH_FAILED:
            kind = "faulty" if code == exit_codes.HARDWARE else "crashed"
            return Outcome(kind, f"exit code {code}")
        ever_connected |= connected
        ssh_failures = 0 if connected else ssh_failures + 1
        if ssh_failures >= RECONNECTS and not ever_connected:
            return Outcome(
                "crashed" if resource.created else "out of reach",
                f"ssh did not reach its machines in {ssh_failures} tries, but the cloud reports"
                " them as healthy",
            )
        if ssh_failures and ssh_failures % RECONNECTS == 0:
            _print(
                f"{job.title}: ssh did not reach its machines in {ssh_failures} tries; the job"
                " continues; retrying ssh"
            )
        time.sleep(poll_s)


def _on_all_workers(job: Job, commands: Commands, attempt_id: str) -> tuple[int, bool]:
    """Starts the job on all workers of all slices or follows it, and prints their output.

    Returns (exit code, whether all slices were reached). The exit code is the first nonzero one of
    the job, else SSH_FAILED if ssh failed, else 0.
    """
    with (
        written(job) as directory,
        concurrent.futures.ThreadPoolExecutor(len(commands.nodes)) as pool,
    ):

        def on_slice(node: str) -> tuple[int, bool]:
            paths = [str(directory / name) for name in files(job)]
            upload_commands = (
                commands.ssh(node, f"mkdir -p {job.name}"),
                commands.copy(paths, node),
            )
            for command in upload_commands:
                if ask(command, TOOL).returncode:
                    return SSH_FAILED, False
            return _stream_output(job, commands.ssh(node, watch_command(job, attempt_id))), True

        codes, reached = zip(*pool.map(on_slice, commands.nodes))
    failed = sorted((code for code in codes if code), key=lambda code: code == SSH_FAILED)
    return failed[0] if failed else 0, all(reached)


def _stream_output(job: Job, command: Sequence[str]) -> int:
    """Runs a command, prints its output prefixed with the job's title, returns its exit code."""
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
    status.write_state(job, "tpu", state, detail, attempt)
    _print(f"{time.strftime('%H:%M:%S')} {job.title}: {state}{f', {detail}' if detail else ''}")


def _print(line: str) -> None:
    with _print_lock:
        print(line, flush=True)
