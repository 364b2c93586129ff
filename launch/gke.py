"""Google Kubernetes Engine: a JobSet with one pod per TPU host or GPU node.

JobSet restarts all pods when one is preempted (not counted) or fails (at most --retries times,
except for exit codes that are not retried). The image contains the code. On TPUs JAX reads each
pod's index from the variables that GKE sets for google.com/tpu; on GPUs the manifest names the
first pod as coordinator.
"""

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml
from absl import flags

from imagen_jax import exit_codes
from launch import machines, status
from launch.job import MOUNT, Job, ask, is_bucket_url, refuse

COORDINATOR_PORT = 8476
SAVE_S = 300  # time to save, from SIGTERM to SIGKILL
TOOL = "install kubectl and choose the cluster: gcloud container clusters get-credentials"
REPLICATED = "slice"
CONTAINER = "imagen-jax"
SECRET = "imagen-jax"  # the Kubernetes Secret whose keys are the names of --secret
MANIFEST = "jobset.yaml"
# Rules of a Job's podFailurePolicy. A Job that fails by one has the reason PodFailurePolicy and a
# message that ends with the rule's index.
POD_RULES = (
    {
        "action": "FailJob",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    },
    {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": CONTAINER,
            "operator": "In",
            "values": sorted(exit_codes.FINAL),
        },
    },
)
# The JobSet's action for each of these rules; other failures count against maxRestarts. The message
# patterns need JobSet 0.10.0 or later.
ACTIONS = (("preempted", "RestartJobSetAndIgnoreMaxRestarts"), ("not_retried", "FailJobSet"))


def define_flags(values: flags.FlagValues) -> None:
    """The options of --where gke."""
    flags.DEFINE_string(
        "image", "", "container image with the code and its requirements", flag_values=values
    )
    flags.DEFINE_string("code", "/app", "directory of the code in the image", flag_values=values)
    flags.DEFINE_string("namespace", "default", "Kubernetes namespace", flag_values=values)
    flags.DEFINE_string(
        "service_account",
        "",
        "Kubernetes service account that may read and write the buckets",
        flag_values=values,
    )


def check(jobs: Sequence[Job], options: flags.FlagValues) -> None:
    """Raises ValueError for options and jobs that GKE cannot run."""
    if not options.image:
        raise ValueError(
            "--where gke needs --image, a container image with the code; docs/launching.md has a"
            " Dockerfile"
        )
    if re.search(r"\s", options.image):
        raise ValueError(f"--image {options.image!r} contains white space: give an image's name")
    for job in jobs:
        if not is_bucket_url(job.workdir):
            raise ValueError(
                f"--workdir {job.workdir} would be lost with its pod: give gs://BUCKET/PATH"
            )


def manifest(job: Job, options: flags.FlagValues) -> dict[str, Any]:
    """The JobSet of a job."""
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
        "podFailurePolicy": {"rules": [dict(rule) for rule in POD_RULES]},
        "template": template,
    }
    rules = [
        {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [f"rule at index {i}$"],
        }
        for i, (name, action) in enumerate(ACTIONS)
    ]
    # The chips of a slice are linked, so its pods share a node pool that no other slice uses.
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
            "failurePolicy": {"maxRestarts": job.retries, "rules": rules},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [
                {"name": REPLICATED, "replicas": size.slices, "template": {"spec": one_job}}
            ],
        },
    }


def _pod(job: Job, options: flags.FlagValues, size: machines.Machines, tpu: bool) -> dict[str, Any]:
    # Buckets are numbered: their names may contain dots and underscores.
    volumes = {f"bucket-{i}": bucket for i, bucket in enumerate(job.buckets)}
    resource = "google.com/tpu" if tpu else "nvidia.com/gpu"
    label = machines.NAMES[job.topology.chip.name].gke
    if not label:
        raise ValueError(
            f"GKE does not offer {job.topology.chip.name}: use --where local, slurm or sky"
        )
    if tpu:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": label,
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, job.topology.shape)),
        }
    else:
        selector = {"cloud.google.com/gke-accelerator": label}
    setup = [f"{{ {job.setup}", f"}} || exit {exit_codes.INVALID}"] if job.setup else []
    container = {
        "name": CONTAINER,
        "image": options.image,
        "workingDir": options.code,
        "command": ["bash", "-c", "\n".join([*setup, f"exec {shlex.join(job.command())}"])],
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
            # Data workers pass batches through shared memory.
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
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
    variables: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in job.environment.items()
    ]
    variables += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": name}}}
        for name in job.secrets
    ]
    if not tpu and size.total == 1:
        variables.append({"name": "JAX_NUM_PROCESSES", "value": "1"})
    elif not tpu:
        index = {
            "fieldRef": {
                "fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            }
        }
        variables += [
            {
                "name": "JAX_COORDINATOR_ADDRESS",
                "value": f"{job.name}-{REPLICATED}-0-0.{job.name}:{COORDINATOR_PORT}",
            },
            {"name": "JAX_NUM_PROCESSES", "value": str(size.total)},
            {"name": "JAX_PROCESS_ID", "valueFrom": index},
        ]
    return variables


def render(jobs: Sequence[Job], options: flags.FlagValues) -> str:
    """The manifests as YAML."""
    return yaml.safe_dump_all([manifest(job, options) for job in jobs], sort_keys=False, width=1000)


def find(job: Job, options: flags.FlagValues) -> str:
    """The JobSet's state: running, finished or failed; "" if no JobSet has the job's name."""
    name = (job.name, f"--namespace={options.namespace}")
    done = ask(
        ("kubectl", "get", "jobset", *name, "--ignore-not-found", "--output=json"),
        TOOL,
    )
    refuse(done, "kubectl get jobset")
    if not done.stdout.strip():
        return ""
    state = json.loads(done.stdout).get("status", {}).get("terminalState", "")
    return {"": "running", "Completed": "finished"}.get(state, "failed")


def submit(jobs: Sequence[Job], options: flags.FlagValues) -> int:
    """Creates the JobSets. Deletes an ended JobSet of the same name first."""
    for job in jobs:
        name = (job.name, f"--namespace={options.namespace}")
        if find(job, options):
            refuse(ask(("kubectl", "delete", "jobset", *name), TOOL), "kubectl delete")
        text = render([job], options)
        (job.record / MANIFEST).write_text(text)
        # Unlike apply, create refuses a name that is in use.
        refuse(ask(("kubectl", "create", "--filename=-"), TOOL, text), "kubectl create")
        status.write_state(job, "gke", "submitted", f"JobSet {job.name}")
        print(
            f"{job.title}: JobSet {' '.join(name)} created; kubectl delete jobset {' '.join(name)}"
            " ends it"
        )
    return 0
