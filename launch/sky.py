"""SkyPilot: a managed job, which SkyPilot moves to other machines, zones or clouds when it is
preempted.

SkyPilot copies this directory to every machine. On GPUs one process runs on each node and finds the
others by SkyPilot's variables; on the hosts of a TPU slice JAX finds them by itself.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from launch import machines, status
from launch.job import BUCKET, ENVIRONMENT, MOUNT, Job, ask, in_bucket, refuse

COORDINATOR_PORT = 8476
TOOL = "pip install 'skypilot[gcp]', or with another cloud in the brackets"
TASK = "sky.yaml"
NODES = """\
export JAX_COORDINATOR_ADDRESS="${{SKYPILOT_NODE_IPS%%$'\\n'*}}:{port}"
export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES"
export JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
"""


def define_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--where sky")
    group.add_argument(
        "--infra",
        default="",
        help="cloud[/region[/zone]], such as gcp/us-west4; default: SkyPilot chooses by price",
    )


def check(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    for job in jobs:
        if not in_bucket(job.workdir):
            raise ValueError(
                f"--workdir {job.workdir} would be lost with its machine: give gs://BUCKET/PATH"
            )
        if job.topology.chip.platform == "tpu" and job.topology.slices > 1:
            raise ValueError(
                f"--topology {job.topology}: SkyPilot starts one slice; use --where tpu or gke for"
                " several"
            )


def task(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """What SkyPilot reads."""
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
    place = "" if tpu else NODES.format(port=COORDINATOR_PORT)
    made: dict[str, Any] = {
        "name": job.name,
        "num_nodes": 1 if tpu else size.total,
        "workdir": ".",
        "resources": resources,
        "setup": f"set -e\n{job.install}",
        "run": (
            f'{place}export PATH="$HOME/{ENVIRONMENT}/bin:$PATH"\nexec'
            f" {shlex.join(job.command('python'))}\n"
        ),
    }
    if job.environment:
        made["envs"] = dict(job.environment)
    if job.secrets:
        made["secrets"] = dict.fromkeys(job.secrets)
    if job.buckets:
        made["file_mounts"] = {
            f"{MOUNT}/{bucket}": {"source": f"{BUCKET}{bucket}", "mode": "MOUNT"}
            for bucket in job.buckets
        }
    return made


def render(jobs: Sequence[Job], options: argparse.Namespace) -> str:
    return yaml.safe_dump_all([task(job, options) for job in jobs], sort_keys=False, width=1000)


def find(job: Job, options: argparse.Namespace) -> str:
    """The managed job's state: running, or waiting, which recovering is too; "" if none of that
    name is in progress.
    """
    done = ask(("sky", "jobs", "queue", "--skip-finished", "--all", "--output=json"), TOOL)
    refuse(done, "sky jobs queue")
    states = [
        found["status"]
        for found in json.loads(done.stdout[done.stdout.find("[") :] or "[]")
        if found["job_name"] == job.name
    ]
    return (
        ""
        if not states
        else "running"
        if any("RUNNING" in state for state in states)
        else "waiting"
    )


def submit(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    for job in jobs:
        path = job.record / TASK
        path.write_text(render([job], options))
        secrets = [
            part for name in job.secrets for part in ("--secret", name)
        ]  # by name: sky takes the value from the environment
        refuse(
            ask(("sky", "jobs", "launch", "--yes", "--detach-run", *secrets, str(path)), TOOL),
            "sky jobs launch",
        )
        status.record(job, "sky", "submitted", f"managed job {job.name}")
        print(
            f"{job.title}: managed job {job.name} submitted; sky jobs cancel --name {job.name}"
            " ends it"
        )
    return 0
