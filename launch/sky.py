"""SkyPilot: a managed job, which moves to other machines, zones or clouds when preempted.

SkyPilot copies this directory to every machine. On GPUs one process runs on each node and finds the
others through SkyPilot's variables; on the hosts of a TPU slice JAX finds them itself.

SkyPilot counts restarts and can retry some exit codes without a limit, but it cannot exclude an
exit code: it also retries those of `exit_codes.FINAL`, at most --retries times.
"""

import json
import shlex
from collections.abc import Sequence
from typing import Any

import yaml
from absl import flags

from launch import machines, status
from launch.job import BUCKET, ENVIRONMENT, MOUNT, Job, ask, is_bucket_url, refuse

COORDINATOR_PORT = 8476
TOOL = "pip install 'skypilot[gcp]', or with another cloud in the brackets"
TASK = "sky.yaml"
NODES = """\
export JAX_COORDINATOR_ADDRESS="${{SKYPILOT_NODE_IPS%%$'\\n'*}}:{port}"
export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES"
export JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
"""


def define_flags(values: flags.FlagValues) -> None:
    """The options of --where sky."""
    flags.DEFINE_string(
        "infra",
        "",
        "cloud[/region[/zone]], such as gcp/us-west4; default: SkyPilot chooses by price",
        flag_values=values,
    )


def check(jobs: Sequence[Job], options: flags.FlagValues) -> None:
    """Raises ValueError for jobs that SkyPilot cannot run."""
    for job in jobs:
        if not is_bucket_url(job.workdir):
            raise ValueError(
                f"--workdir {job.workdir} would be lost with its machine: give gs://BUCKET/PATH"
            )
        if job.topology.chip.platform == "tpu" and job.topology.slices > 1:
            raise ValueError(
                f"--topology {job.topology}: SkyPilot starts one slice; for several slices use"
                " --where tpu or gke"
            )


def task(job: Job, options: flags.FlagValues) -> dict[str, Any]:
    """SkyPilot's task for a job."""
    size, tpu = machines.of(job.topology), job.topology.chip.platform == "tpu"
    resources: dict[str, Any] = {
        "accelerators": machines.sky_accelerator(job.topology),
        "use_spot": options.spot,
        "job_recovery": {"max_restarts_on_errors": job.retries},  # preemptions are not counted
    }
    if options.infra:
        resources["infra"] = options.infra
    if tpu:
        resources["accelerator_args"] = {
            "runtime_version": machines.NAMES[job.topology.chip.name].runtime
        }
    variables = "" if tpu else NODES.format(port=COORDINATOR_PORT)
    content: dict[str, Any] = {
        "name": job.name,
        "num_nodes": 1 if tpu else size.total,
        "workdir": ".",
        "resources": resources,
        "setup": f"set -e\n{job.install}",
        "run": (
            f'{variables}export PATH="$HOME/{ENVIRONMENT}/bin:$PATH"\nexec'
            f" {shlex.join(job.command('python'))}\n"
        ),
    }
    if job.environment:
        content["envs"] = dict(job.environment)
    if job.secrets:
        content["secrets"] = dict.fromkeys(job.secrets)
    if job.buckets:
        content["file_mounts"] = {
            f"{MOUNT}/{bucket}": {"source": f"{BUCKET}{bucket}", "mode": "MOUNT"}
            for bucket in job.buckets
        }
    return content


def render(jobs: Sequence[Job], options: flags.FlagValues) -> str:
    """The tasks as YAML."""
    return yaml.safe_dump_all([task(job, options) for job in jobs], sort_keys=False, width=1000)


def find(job: Job, options: flags.FlagValues) -> str:
    """The managed job's state: running, waiting (also while recovering) or "" if there is none."""
    done = ask(("sky", "jobs", "queue", "--skip-finished", "--all", "--output=json"), TOOL)
    refuse(done, "sky jobs queue")
    entries = json.loads(done.stdout[done.stdout.find("[") :] or "[]")
    states = [entry["status"] for entry in entries if entry["job_name"] == job.name]
    if not states:
        return ""
    return "running" if any("RUNNING" in state for state in states) else "waiting"


def submit(jobs: Sequence[Job], options: flags.FlagValues) -> int:
    """Submits the tasks to SkyPilot, each as a managed job."""
    for job in jobs:
        path = job.record / TASK
        path.write_text(render([job], options))
        # Secrets are passed by name: sky reads their values from the environment.
        secrets = [part for name in job.secrets for part in ("--secret", name)]
        command = ("sky", "jobs", "launch", "--yes", "--detach-run", *secrets, str(path))
        refuse(ask(command, TOOL), "sky jobs launch")
        status.write_state(job, "sky", "submitted", f"managed job {job.name}")
        print(
            f"{job.title}: managed job {job.name} submitted; sky jobs cancel --name {job.name}"
            " ends it"
        )
    return 0
