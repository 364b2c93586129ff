"""Cloud TPU pods: asks for a queued resource, waits, runs the job on all its workers over ssh, and
asks again when it is preempted.

The code goes to the workers as the archive of a commit. The job runs there in the background: ssh
is only how it is started and watched, so a lost connection, or a launcher that is stopped, leaves
it running, and the same command looks after it again.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.storage import only_process
from launch import machines, status
from launch.job import (
    ENVIRONMENT,
    MOUNT,
    ROOT,
    USAGE_ERROR,
    Job,
    ask,
    exports,
    in_bucket,
    refuse,
    revision,
    said,
    uncommitted,
)

TOOL = "install the Google Cloud CLI and run gcloud auth login"
POLL_S = 30.0
SSH_FAILED = 255
WITHOUT_CHANGES = (
    "this checkout has changes that are not committed: the workers get the commit without them"
)
RECONNECTS = 20  # in a row, of ssh to machines that the cloud calls healthy
# In gcloud's words for what the same command may well do the next time.
PASSING = re.compile(
    r"unavailable|deadline|time[d -]*out|connect|network|resolv|unreachable|reset by|internal"
    r" error|temporar|\b(429|50[0234])\b",
    re.IGNORECASE,
)
WAITING = (
    "CREATING",
    "ACCEPTED",
    "PROVISIONING",
    "WAITING_FOR_RESOURCES",
)  # the other states: ACTIVE, FAILED, SUSPENDING, SUSPENDED, DELETING
_print_lock = threading.Lock()

# Run by ssh on every worker, any number of times: the first starts the job, the others wait for it
# too. Whoever comes back, with the name of the attempt that it saw begin or go on, after the job
# has ended is told how it ended.
WATCH = """\
#!/bin/bash
cd "$(dirname "$0")" || exit 1
exec 8> door 9> lock
flock 8  # one watcher at a time
if ! flock --nonblock 9; then
  echo "$1" >> attempts
elif ! { [ -f exit ] && grep -qxF "$1" attempts; }; then
  rm -f exit log pid; touch log; echo "$1" > attempts
  cp run.sh running.sh  # the next watcher brings run.sh again, while bash still reads this one
  setsid nohup bash running.sh > log 2>&1 < /dev/null 8>&- &  # it keeps the lock for as long as it runs
  echo $! > pid
fi
exec 8>&- 9>&-
while [ ! -s pid ]; do sleep 0.1; done
tail -n +1 -f -s 0.2 --pid="$(cat pid)" log
exit "$(cat exit 2> /dev/null || echo 1)"
"""
# gcsfuse gives the directories of a bucket to programs that know only files
# (docs.cloud.google.com/storage/docs/cloud-storage-fuse).
GCSFUSE = """\
if ! command -v gcsfuse > /dev/null; then
  source=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  curl -fsS $source/doc/apt-key.gpg | sudo tee $key > /dev/null
  echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
fi
mount_bucket() {
  mountpoint -q MOUNT/$1 && return
  sudo mkdir -p MOUNT/$1 && sudo chown $USER MOUNT/$1 && gcsfuse --implicit-dirs $1 MOUNT/$1 9>&-  # it must not keep the lock of watch.sh
}
""".replace("MOUNT", MOUNT)


def define_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--where tpu")
    group.add_argument("--zone", default="", help="such as us-west4-a")
    group.add_argument("--project", default="", help="default: gcloud's own")
    group.add_argument(
        "--runtime", default="", help="image of the TPU VMs; default: the one for the chip"
    )
    group.add_argument(
        "--keep",
        action="store_true",
        help="do not delete the queued resource when the job has ended",
    )


def check(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    if not options.zone:
        raise ValueError("--where tpu needs --zone, such as us-west4-a")
    for job in jobs:
        if job.topology.chip.platform != "tpu":
            raise ValueError(f"--topology {job.topology} has no TPUs")
        if not in_bucket(job.workdir):
            raise ValueError(
                f"--workdir {job.workdir} would be lost with its machine: give gs://BUCKET/PATH"
            )
        config = next(
            (
                argument.removeprefix("--config=").partition(":")[0]
                for argument in job.arguments
                if argument.startswith("--config=")
            ),
            "",
        )
        if config and uncommitted(config):
            raise ValueError(
                f"{config} is not as in the commit, which is what the workers get: commit it first"
            )


class Gcloud:
    """The commands that are needed, for one job."""

    def __init__(self, job: Job, options: argparse.Namespace):
        self._job, self._options = job, options
        # whether it has said anything of the job: from then on questions are repeated until it does
        # again
        self.answered = False
        self.created = False  # whether this launcher asked for the machines that are there
        self._place = (
            f"--zone={options.zone}",
            *([f"--project={options.project}"] if options.project else []),
        )

    @property
    def nodes(self) -> list[str]:
        """One a slice."""
        count = self._job.topology.slices
        return [self._job.name] if count == 1 else [f"{self._job.name}-{i}" for i in range(count)]

    def create(self) -> tuple[str, ...]:
        job, options = self._job, self._options
        nodes = (
            ("--node-id=" + job.name,)
            if len(self.nodes) == 1
            else (f"--node-count={len(self.nodes)}", f"--node-prefix={job.name}")
        )
        runtime = options.runtime or machines.NAMES[job.topology.chip.name].runtime
        kind = (
            f"--accelerator-type={machines.accelerator_type(job.topology)}",
            f"--runtime-version={runtime}",
            *(["--spot"] if options.spot else []),
        )
        return (
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "create",
            job.name,
            *self._place,
            *nodes,
            *kind,
        )

    def describe(self) -> tuple[str, ...]:
        return (
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "describe",
            self._job.name,
            *self._place,
            "--format=json",
        )

    def delete(self) -> tuple[str, ...]:
        """Waits until it is gone; --force takes the machines too."""
        return (
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "delete",
            self._job.name,
            *self._place,
            "--force",
            "--quiet",
        )

    def node(self, node: str) -> tuple[str, ...]:
        return (
            "gcloud",
            "compute",
            "tpus",
            "tpu-vm",
            "describe",
            node,
            *self._place,
            "--format=json",
        )

    def copy(self, files: Sequence[str], node: str) -> tuple[str, ...]:
        return (
            "gcloud",
            "compute",
            "tpus",
            "tpu-vm",
            "scp",
            *files,
            f"{node}:{self._job.name}/",
            *self._place,
            "--worker=all",
        )

    def ssh(self, node: str, command: str) -> tuple[str, ...]:
        return (
            "gcloud",
            "compute",
            "tpus",
            "tpu-vm",
            "ssh",
            node,
            *self._place,
            "--worker=all",
            f"--command={command}",
        )


def run_script(job: Job) -> str:
    """What every worker runs, in ~/NAME: unpacks the code, mounts the buckets, sets up, runs; the
    exit code goes to the file `exit`.
    """
    lines = [
        "#!/bin/bash",
        'here="$PWD" failed=1',
        "# What fails before the job does may well work the next time, whatever code it ends with.",
        (
            "trap 'code=$?; [ $code -eq 0 ] || code=${failed:-$code}; echo $code > \"$here/exit\"'"
            " EXIT"
        ),
        "set -e",
        *exports(job.environment),
        "if [ -f secrets.sh ]; then . ./secrets.sh; fi",
        "mkdir -p code && tar -xzf code.tar.gz -C code && cd code",
        *(
            [GCSFUSE.rstrip(), *(f"mount_bucket {bucket}" for bucket in job.buckets)]
            if job.buckets
            else []
        ),
        job.install.rstrip(),
        f'export PATH="$HOME/{ENVIRONMENT}/bin:$PATH"',
        "failed=",
        shlex.join(job.command("python")),
    ]
    return "\n".join(lines) + "\n"


def render(jobs: Sequence[Job], options: argparse.Namespace) -> str:
    """The commands and the script, in the order in which they are run."""
    parts = []
    for job in jobs:
        cloud = Gcloud(job, options)
        parts += [
            f"# {job.title}: commit {revision() or 'unknown'}",
            *([f"# {WITHOUT_CHANGES}"] if changed() else []),
        ]
        parts += [shlex.join(cloud.create()), shlex.join(cloud.describe()) + "  # until ACTIVE"]
        for node in cloud.nodes:
            parts += [
                shlex.join(cloud.ssh(node, f"mkdir -p {job.name}")),
                shlex.join(cloud.copy(_files(job), node)),
                shlex.join(cloud.ssh(node, watch_command(job, "ATTEMPT"))),
            ]
        parts += [shlex.join(cloud.delete()), "# run.sh, on every worker:", run_script(job)]
    return "\n".join(parts)


def watch_command(job: Job, attempt: str) -> str:
    return f"bash {job.name}/watch.sh {attempt}"


def _files(job: Job) -> list[str]:
    return ["code.tar.gz", "run.sh", "watch.sh", *(["secrets.sh"] if job.secrets else [])]


def changed() -> bool:
    """Whether this checkout differs from the commit that the workers get."""
    return revision().endswith("+changes")


def find(job: Job, options: argparse.Namespace) -> str:
    """Always "": the same command looks after what is there already (`supervise`)."""
    return ""


def run(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Looks after all jobs side by side, to their end. 0 if all ended well."""
    if not shutil.which("gcloud"):
        raise ValueError(f"gcloud is not on PATH: {TOOL}")
    if changed():
        print(WITHOUT_CHANGES, file=sys.stderr)
    codes: dict[str, int] = {}

    def look_after(job: Job) -> None:
        try:
            codes[job.name] = supervise(job, options)
        except (ValueError, OSError) as error:
            codes[job.name] = USAGE_ERROR
            _say(job, "failed", str(error))

    with contextlib.ExitStack() as stack:
        for job in jobs:
            stack.enter_context(only_process(job.record, "looking after"))
        threads = [threading.Thread(target=look_after, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            print(
                "the jobs go on without this launcher; the same command looks after them again",
                file=sys.stderr,
            )
            raise
        print(status.table(status.read(job) for job in jobs))
    return next((code for code in codes.values() if code), 0)


def supervise(job: Job, options: argparse.Namespace, poll_s: float = POLL_S) -> int:
    """One job: creates or takes up its queued resource and runs, again after each preemption, and
    at most `retries` times after other failures.
    """
    cloud, failures, preemptions = Gcloud(job, options), 0, 0
    while True:
        outcome, why = _attempt(job, cloud, poll_s)
        failures += outcome in ("not served", "crashed")
        preemptions += outcome == "preempted"
        if outcome in ("finished", "refused", "out of reach") or failures > job.retries:
            _say(
                job, "finished" if outcome == "finished" else "failed", why, failures + preemptions
            )
            if options.keep or outcome == "out of reach":
                _print(
                    f"{job.title}: its queued resource is kept, and costs money until"
                    f" {shlex.join(cloud.delete())}"
                )
            else:
                _delete(job, cloud, poll_s)
            return {"finished": 0, "refused": USAGE_ERROR}.get(outcome, 1)
        counted = f"{why}; {preemptions} preemptions, {failures} of {job.retries + 1} failures"
        _say(
            job,
            "preempted" if outcome == "preempted" else "waiting",
            counted,
            failures + preemptions,
        )
        if outcome != "crashed":
            _delete(job, cloud, poll_s)


def _attempt(job: Job, cloud: Gcloud, poll_s: float) -> tuple[str, str]:
    """From whatever is there now to the command's end: (outcome, why).

    finished; refused: the command will never do; crashed: it may the next time, on the same
    machines; preempted: the machines are gone; not served: they never came; out of reach: they are
    there, but were never reached, and may be running what another launcher started.
    """
    while (state := _state(job, cloud, poll_s)[0]) == "DELETING":  # an earlier one of this name
        time.sleep(poll_s)
    if not state:
        done = _persist(job, cloud.create(), poll_s)
        if (
            "ALREADY_EXISTS" not in done.stderr
        ):  # another launcher was faster, or the answer to an earlier request was lost
            refuse(done, "gcloud could not create the queued resource:")
        cloud.created = True
    state, why = _wait(job, cloud, poll_s)
    if state != "ACTIVE":
        return (
            "not served" if state == "FAILED" else "preempted",
            f"queued resource {state}{f': {why}' if why else ''}",
        )
    _say(job, "running", f"on {job.topology}")
    return _run_to_its_end(job, cloud, poll_s)


def _run_to_its_end(job: Job, cloud: Gcloud, poll_s: float) -> tuple[str, str]:
    """The part of an attempt for which there are machines. A lost connection is made again, for as
    long as it takes if there ever was one.
    """
    attempt, lost, reached = uuid.uuid4().hex[:12], 0, False
    while True:
        code, connected = _on_all_workers(job, cloud, attempt)
        if code == 0:
            return "finished", ""
        if not _healthy(job, cloud, poll_s):
            return "preempted", "its machines were taken away"
        if code != SSH_FAILED:
            return "refused" if code == USAGE_ERROR else "crashed", f"exit code {code}"
        reached |= connected
        lost = 0 if connected else lost + 1
        if lost >= RECONNECTS and not reached:
            return (
                "crashed" if cloud.created else "out of reach",
                (
                    f"ssh does not reach its machines, which the cloud calls healthy, in {lost}"
                    " attempts"
                ),
            )
        if lost and lost % RECONNECTS == 0:
            _print(
                f"{job.title}: ssh has not reached its machines in {lost} attempts; they go on, and"
                " so does this launcher"
            )
        time.sleep(poll_s)


def _wait(job: Job, cloud: Gcloud, poll_s: float) -> tuple[str, str]:
    """Until the queued resource is there or will never be: (its state, the cloud's reason)."""
    shown = ""
    while True:
        state, why = _state(job, cloud, poll_s)
        if state not in WAITING:
            return state or "GONE", why
        if state != shown:
            _say(job, "waiting", f"queued resource {state}")
            shown = state
        time.sleep(poll_s)


def _delete(job: Job, cloud: Gcloud, poll_s: float) -> None:
    done = _persist(job, cloud.delete(), poll_s)
    if "NOT_FOUND" not in done.stderr:
        refuse(done, "gcloud could not delete the queued resource:")
    cloud.created = False


def _persist(
    job: Job, command: Sequence[str], poll_s: float, whatever: bool = False
) -> subprocess.CompletedProcess:
    """Asks gcloud until it answers, or fails for a reason that will not pass; with `whatever`,
    until it answers or finds nothing.
    """
    told = ""
    while True:
        done = ask(command, TOOL)
        if (
            not done.returncode
            or "NOT_FOUND" in done.stderr
            or not (whatever or PASSING.search(done.stderr))
        ):
            return done
        if (line := said(done)) != told:
            told = line
            _print(
                f"{job.title}: gcloud {' '.join(command[3:5])} fails, and is repeated until it does"
                f" not: {line}"
            )
        time.sleep(poll_s)


def _describe(
    job: Job, cloud: Gcloud, command: Sequence[str], poll_s: float
) -> dict[str, Any] | None:
    """What the cloud says of a resource, None if there is none.

    Once it has answered a question, no failure to ask another ends the launcher: what is there
    costs money, and is not left alone.
    """
    done = _persist(job, command, poll_s, whatever=cloud.answered)
    if done.returncode and "NOT_FOUND" not in done.stderr:
        refuse(done, "gcloud could not describe the queued resource:")
    cloud.answered = True
    return None if done.returncode else json.loads(done.stdout)


def _state(job: Job, cloud: Gcloud, poll_s: float) -> tuple[str, str]:
    """(state of the queued resource, the error that the cloud gives for it); "" if there
    is none.
    """
    found = _describe(job, cloud, cloud.describe(), poll_s)
    state: dict[str, Any] = found["state"] if found else {"state": ""}
    return state["state"], state.get("failedData", {}).get("error", {}).get("message", "")


def _healthy(job: Job, cloud: Gcloud, poll_s: float) -> bool:
    """Whether the cloud still gives us all machines."""
    if _state(job, cloud, poll_s)[0] != "ACTIVE":
        return False
    found = (_describe(job, cloud, cloud.node(node), poll_s) for node in cloud.nodes)
    return all(node is not None and node["state"] == "READY" for node in found)


def _on_all_workers(job: Job, cloud: Gcloud, attempt: str) -> tuple[int, bool]:
    """Copies the files, runs the job on every worker of every slice and passes on what they print;
    the first bad exit code, and whether all were reached.
    """
    with (
        _written(job) as directory,
        concurrent.futures.ThreadPoolExecutor(len(cloud.nodes)) as pool,
    ):

        def one(node: str) -> tuple[int, bool]:
            steps = (
                cloud.ssh(node, f"mkdir -p {job.name}"),
                cloud.copy([str(directory / name) for name in _files(job)], node),
            )
            for command in steps:
                if ask(command, TOOL).returncode:
                    return SSH_FAILED, False
            return _pass_on(job, cloud.ssh(node, watch_command(job, attempt))), True

        codes, reached = zip(*pool.map(one, cloud.nodes))
    return next(
        (code for code in sorted(codes, key=lambda code: code == SSH_FAILED) if code), 0
    ), all(reached)


def _pass_on(job: Job, command: Sequence[str]) -> int:
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


@contextlib.contextmanager
def _written(job: Job) -> Iterator[Path]:
    """The files for the workers, in a directory that only this user can read."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with open(directory / "code.tar.gz", "wb") as file:
            refuse(
                subprocess.run(
                    ["git", "archive", "--format=tar.gz", "HEAD"],
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.PIPE,
                    text=True,
                ),
                "git archive",
            )
        (directory / "run.sh").write_text(run_script(job))
        (directory / "watch.sh").write_text(WATCH)
        if job.secrets:
            path = directory / "secrets.sh"
            path.touch(mode=0o600)
            path.write_text(
                "\n".join(f"export {name}={shlex.quote(os.environ[name])}" for name in job.secrets)
                + "\n"
            )
        yield directory


def _say(job: Job, state: str, detail: str, attempt: int = 0) -> None:
    status.record(job, "tpu", state, detail, attempt)
    _print(f"{time.strftime('%H:%M:%S')} {job.title}: {state}{f', {detail}' if detail else ''}")


def _print(line: str) -> None:
    with _print_lock:
        print(line, flush=True)
