"""Google Kubernetes Engine: a JobSet whose pods are the hosts of TPU slices or the nodes of a GPU
cluster.

JobSet starts all pods again when one fails (--retries times) or is preempted (any number of times).
The image holds the code. On TPUs JAX finds its place from what GKE puts into pods that ask for
google.com/tpu; on GPUs the manifest names the first pod as coordinator.
"""

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from launch import machines, status
from launch.job import MOUNT, Job, ask, in_bucket, refuse

COORDINATOR_PORT = 8476
SAVE_S = 300  # from SIGTERM to SIGKILL, for the save
TOOL = "install kubectl and choose the cluster: gcloud container clusters get-credentials"
REPLICATED = "slice"
SECRET = "imagen-jax"  # the Kubernetes Secret that --secret names are keys of
MANIFEST = "jobset.yaml"


def define_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--where gke")
    group.add_argument(
        "--image", default="", help="container image with the code and its requirements"
    )
    group.add_argument("--code", default="/app", help="directory of the code in the image")
    group.add_argument("--namespace", default="default")
    group.add_argument(
        "--service_account",
        default="",
        help="Kubernetes service account that may read and write the buckets",
    )


def check(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    if not options.image:
        raise ValueError(
            "--where gke needs --image, a container image with the code (its Dockerfile:"
            " launch/README.md)"
        )
    if re.search(r"\s", options.image):
        raise ValueError(
            f"--image {options.image!r} is no name of an image: it has white space in it"
        )
    for job in jobs:
        if not in_bucket(job.workdir):
            raise ValueError(
                f"--workdir {job.workdir} would be lost with its pod: give gs://BUCKET/PATH"
            )


def manifest(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """The JobSet."""
    size, tpu = machines.of(job.topology), job.topology.chip.platform == "tpu"
    template = {
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}} if job.buckets else {},
        "spec": _pod(job, options, size, tpu),
    }
    one_job = {
        "parallelism": size.hosts,
        "completions": size.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        # A pod that is drained or preempted fails its job with the reason PodFailurePolicy, which
        # the rule below does not count.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                }
            ]
        },
        "template": template,
    }
    preempted = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    # A slice's pods share one node pool, for its chips are linked; no other slice's pods are in it.
    annotations = (
        {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        if tpu
        else {}
    )
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, "namespace": options.namespace, "annotations": annotations},
        "spec": {
            "failurePolicy": {"maxRestarts": job.retries, "rules": [preempted]},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [
                {"name": REPLICATED, "replicas": size.slices, "template": {"spec": one_job}}
            ],
        },
    }


def _pod(
    job: Job, options: argparse.Namespace, size: machines.Machines, tpu: bool
) -> dict[str, Any]:
    volumes = {
        f"bucket-{i}": bucket for i, bucket in enumerate(job.buckets)
    }  # a bucket's own name may have dots and underscores in it
    resource = "google.com/tpu" if tpu else "nvidia.com/gpu"
    label = machines.NAMES[job.topology.chip.name].gke
    if tpu:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": label,
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, job.topology.shape)),
        }
    else:
        selector = {"cloud.google.com/gke-accelerator": label}
    container = {
        "name": "imagen-jax",
        "image": options.image,
        "workingDir": options.code,
        "command": [
            "bash",
            "-c",
            "\n".join(
                [
                    *([f"{{ {job.setup}", "} || exit 2"] if job.setup else []),
                    f"exec {shlex.join(job.command())}",
                ]
            ),
        ],
        "env": _environment(job, size, tpu),
        "resources": {"requests": {resource: size.chips}, "limits": {resource: size.chips}},
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            *({"name": name, "mountPath": f"{MOUNT}/{bucket}"} for name, bucket in volumes.items()),
        ],
    }
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SAVE_S,
        "nodeSelector": selector | ({"cloud.google.com/gke-spot": "true"} if options.spot else {}),
        "containers": [container],
        "volumes": [
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory"},
            },  # data workers pass batches through it
            *(_bucket(name, bucket) for name, bucket in volumes.items()),
        ],
    }
    if options.spot:
        spec["tolerations"] = [
            {
                "key": "cloud.google.com/gke-spot",
                "operator": "Equal",
                "value": "true",
                "effect": "NoSchedule",
            }
        ]
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    return spec


def _bucket(name: str, bucket: str) -> dict[str, Any]:
    attributes = {"bucketName": bucket, "mountOptions": "implicit-dirs"}
    return {
        "name": name,
        "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes},
    }


def _environment(job: Job, size: machines.Machines, tpu: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in job.environment.items()
    ]
    found += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": name}}}
        for name in job.secrets
    ]
    if not tpu and size.total == 1:
        found.append({"name": "JAX_NUM_PROCESSES", "value": "1"})
    elif not tpu:
        index = {
            "fieldRef": {
                "fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            }
        }
        found += [
            {
                "name": "JAX_COORDINATOR_ADDRESS",
                "value": f"{job.name}-{REPLICATED}-0-0.{job.name}:{COORDINATOR_PORT}",
            },
            {"name": "JAX_NUM_PROCESSES", "value": str(size.total)},
            {"name": "JAX_PROCESS_ID", "valueFrom": index},
        ]
    return found


def render(jobs: Sequence[Job], options: argparse.Namespace) -> str:
    return yaml.safe_dump_all([manifest(job, options) for job in jobs], sort_keys=False, width=1000)


def find(job: Job, options: argparse.Namespace) -> str:
    """The JobSet's state: running, finished or failed; "" if there is none of that name."""
    done = ask(
        (
            "kubectl",
            "get",
            "jobset",
            job.name,
            f"--namespace={options.namespace}",
            "--ignore-not-found",
            "--output=json",
        ),
        TOOL,
    )
    refuse(done, "kubectl get jobset")
    if not done.stdout.strip():
        return ""
    ended = json.loads(done.stdout).get("status", {}).get("terminalState", "")
    return {"": "running", "Completed": "finished"}.get(ended, "failed")


def submit(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Creates the JobSets; one of that name that has ended makes room first."""
    for job in jobs:
        name = (job.name, f"--namespace={options.namespace}")
        if find(job, options):
            refuse(ask(("kubectl", "delete", "jobset", *name), TOOL), "kubectl delete")
        text = render([job], options)
        (job.record / MANIFEST).write_text(text)
        refuse(
            ask(("kubectl", "create", "--filename=-"), TOOL, text), "kubectl create"
        )  # unlike apply, it refuses a name that is taken
        status.record(job, "gke", "submitted", f"JobSet {job.name}")
        print(
            f"{job.title}: JobSet {' '.join(name)} created; kubectl delete jobset {' '.join(name)}"
            " ends it"
        )
    return 0
