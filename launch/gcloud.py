"""A job's queued resource of Cloud TPU: the gcloud commands for it, and its state.

Requests are repeated while the failure is temporary: the machines cost money, so a launcher that
has reached the cloud once does not give up on them.
"""

import json
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from launch import machines
from launch.job import Job, ask, refuse, said

TOOL = "install the Google Cloud CLI and run gcloud auth login"
# Temporary failures, in gcloud's words.
TEMPORARY = re.compile(
    r"unavailable|deadline|time[d -]*out|connect|network|resolv|unreachable|reset by|internal"
    r" error|temporar|\b(429|50[0234])\b",
    re.IGNORECASE,
)
# States before the machines exist. The others: ACTIVE, FAILED, SUSPENDING, SUSPENDED, DELETING.
WAITING = ("CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES")
TPUS = ("gcloud", "compute", "tpus")


class Commands:
    """The gcloud commands for one job."""

    def __init__(self, job: Job, options: flags.FlagValues):
        self._job, self._options = job, options
        project = [f"--project={options.project}"] if options.project else []
        self._location = (f"--zone={options.zone}", *project)

    @property
    def nodes(self) -> list[str]:
        """The names of the slices."""
        count = self._job.topology.slices
        return [self._job.name] if count == 1 else [f"{self._job.name}-{i}" for i in range(count)]

    def create(self) -> tuple[str, ...]:
        """Requests the queued resource."""
        job, options = self._job, self._options
        if len(self.nodes) == 1:
            nodes: tuple[str, ...] = (f"--node-id={job.name}",)
        else:
            nodes = (f"--node-count={len(self.nodes)}", f"--node-prefix={job.name}")
        runtime = options.runtime or machines.NAMES[job.topology.chip.name].runtime
        kind = (
            f"--accelerator-type={machines.accelerator_type(job.topology)}",
            f"--runtime-version={runtime}",
            *(["--spot"] if options.spot else []),
        )
        return (*TPUS, "queued-resources", "create", job.name, *self._location, *nodes, *kind)

    def describe(self) -> tuple[str, ...]:
        """Describes the queued resource."""
        words = ("queued-resources", "describe", self._job.name)
        return (*TPUS, *words, *self._location, "--format=json")

    def delete(self) -> tuple[str, ...]:
        """Deletes the queued resource and its machines, and waits until they are gone."""
        words = ("queued-resources", "delete", self._job.name)
        return (*TPUS, *words, *self._location, "--force", "--quiet")

    def node(self, node: str) -> tuple[str, ...]:
        """Describes a slice."""
        return (*TPUS, "tpu-vm", "describe", node, *self._location, "--format=json")

    def copy(self, files: Sequence[str], node: str) -> tuple[str, ...]:
        """Copies files to the job's directory on all workers of a slice."""
        target = f"{node}:{self._job.name}/"
        return (*TPUS, "tpu-vm", "scp", *files, target, *self._location, "--worker=all")

    def ssh(self, node: str, command: str) -> tuple[str, ...]:
        """Runs a shell command on all workers of a slice."""
        words = ("tpu-vm", "ssh", node, *self._location)
        return (*TPUS, *words, "--worker=all", f"--command={command}")


class QueuedResource:
    """The queued resource of a job, and whether its machines are usable."""

    def __init__(self, job: Job, commands: Commands, poll_s: float, tell: Callable[[str], None]):
        """poll_s: seconds between two requests. tell: function that prints a line."""
        self.created = False  # whether this launcher requested the current machines
        self._job, self._commands, self._poll_s, self._tell = job, commands, poll_s, tell
        self._answered = False  # whether the cloud has answered a request for this job

    def state(self) -> tuple[str, str]:
        """(state, the cloud's error message); ("", "") if the resource does not exist."""
        description = self._describe(self._commands.describe())
        if description is None:
            return "", ""
        state = description["state"]
        return state["state"], state.get("failedData", {}).get("error", {}).get("message", "")

    def request(self) -> None:
        """Creates the resource. Raises ValueError if the cloud refuses.

        It may exist already: another launcher was faster, or an earlier answer was lost.
        """
        done = self._persist(self._commands.create())
        if "ALREADY_EXISTS" not in done.stderr:
            refuse(done, "gcloud could not create the queued resource:")
        self.created = True

    def wait(self, show: Callable[[str], None]) -> tuple[str, str]:
        """Waits for the machines; (final state, the cloud's reason).

        show: called with each new state.
        """
        shown = ""
        while True:
            state, reason = self.state()
            if state not in WAITING:
                return state or "GONE", reason
            if state != shown:
                show(state)
                shown = state
            time.sleep(self._poll_s)

    def healthy(self) -> bool:
        """Whether all machines are still available to this job."""
        if self.state()[0] != "ACTIVE":
            return False
        nodes = (self._describe(self._commands.node(node)) for node in self._commands.nodes)
        return all(node is not None and node["state"] == "READY" for node in nodes)

    def delete(self) -> None:
        """Deletes the resource with its machines. Raises ValueError if the cloud refuses."""
        done = self._persist(self._commands.delete())
        if "NOT_FOUND" not in done.stderr:
            refuse(done, "gcloud could not delete the queued resource:")
        self.created = False

    def _describe(self, command: Sequence[str]) -> dict[str, Any] | None:
        """The parsed answer; None if the resource does not exist.

        After the first answer every failure counts as temporary.
        """
        done = self._persist(command, any_failure=self._answered)
        if done.returncode and "NOT_FOUND" not in done.stderr:
            refuse(done, "gcloud could not describe the queued resource:")
        self._answered = True
        return None if done.returncode else json.loads(done.stdout)

    def _persist(
        self, command: Sequence[str], any_failure: bool = False
    ) -> subprocess.CompletedProcess:
        """Repeats a command until it succeeds, finds nothing or fails permanently.

        any_failure: whether to repeat after failures that are not known to be temporary.
        """
        shown = ""
        while True:
            done = ask(command, TOOL)
            temporary = any_failure or TEMPORARY.search(done.stderr)
            if not done.returncode or "NOT_FOUND" in done.stderr or not temporary:
                return done
            if (line := said(done)) != shown:
                shown = line
                self._tell(
                    f"{self._job.title}: gcloud {' '.join(command[3:5])} failed and is repeated"
                    f" until it succeeds: {line}"
                )
            time.sleep(self._poll_s)
