"""Makes tests/launch/*.schema.json, which the tests hold launch's manifests against.

    pip install skypilot==0.14.1 kubeflow-trainer-api==2.3.0 && python tools/launch_schemas.py

Both packages are under the Apache License 2.0. kubeflow-trainer-api has models of JobSet and the
Kubernetes API, generated from their sources. The models lack enumerations, which are added here
from the documentation of the fields. Descriptions are left out. Parts of a pod that launch does not
render are {"type": "object"}. SkyPilot's schemas are its own, without the block `config`.
"""

import json
from pathlib import Path
from typing import Any

from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from sky.utils import schemas

HERE = Path(__file__).resolve().parent.parent / "tests" / "launch"
PROSE = {"description", "title", "default", "examples", "$schema"}
LEFT_OUT = (
    "Affinity",
    "Probe",
    "Lifecycle",
    "EphemeralContainer",
    "SecurityContext",
    "Status",
    "DNSConfig",
    "TopologySpreadConstraint",
    "EnvFromSource",
    "VolumeSource",
    "ResourceClaim",
    "SchedulingGate",
    "ReadinessGate",
    "LabelSelector",
    "VolumeClaim",
    "HostAlias",
    "ManagedFieldsEntry",
)
KEPT = ("EmptyDirVolumeSource", "CSIVolumeSource")
ENUMS = {
    ("JobsetV1alpha2FailurePolicyRule", "action"): [
        "FailJobSet",
        "RestartJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
    ],
    ("JobsetV1alpha2FailurePolicy", "restartStrategy"): ["Recreate", "BlockingRecreate"],
    ("IoK8sApiBatchV1JobSpec", "completionMode"): ["NonIndexed", "Indexed"],
    ("IoK8sApiBatchV1PodFailurePolicyRule", "action"): ["FailJob", "FailIndex", "Ignore", "Count"],
    ("IoK8sApiCoreV1PodSpec", "restartPolicy"): ["Always", "OnFailure", "Never"],
    ("IoK8sApiCoreV1Toleration", "operator"): ["Exists", "Equal"],
    ("IoK8sApiCoreV1Toleration", "effect"): ["NoSchedule", "PreferNoSchedule", "NoExecute"],
    ("IoK8sApiCoreV1EmptyDirVolumeSource", "medium"): ["", "Memory"],
}


def bare(schema: Any, names: bool = False) -> Any:
    """A schema without descriptions, whose objects allow only the listed properties.

    names: whether the keys are names of properties.
    """
    if isinstance(schema, list):
        return [bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    simplified = {
        key: bare(value, key in ("properties", "$defs"))
        for key, value in schema.items()
        if names or key not in PROSE
    }
    if not names and "anyOf" in simplified:
        choices = [choice for choice in simplified.pop("anyOf") if choice != {"type": "null"}]
        simplified |= choices[0] if len(choices) == 1 else {"anyOf": choices}
    if not names and simplified.get("type") == "object" and "properties" in simplified:
        simplified.setdefault("additionalProperties", False)
    return simplified


def references(schema: Any) -> set[str]:
    """Names of the definitions that a schema refers to."""
    if isinstance(schema, list):
        return {name for item in schema for name in references(item)}
    if not isinstance(schema, dict):
        return set()
    return {
        value.rpartition("/")[2] if key == "$ref" else name
        for key, value in schema.items()
        for name in ([""] if key == "$ref" else references(value))
    }


def jobset() -> dict[str, Any]:
    """The schema of a JobSet."""
    schema = bare(JobsetV1alpha2JobSet.model_json_schema(by_alias=True))
    parts = schema.pop("$defs")
    for name in parts:
        if "actual_instance" in parts[name].get(
            "properties", {}
        ):  # a quantity, or a number or a string
            parts[name] = {"type": ["number", "string"]}
        if any(word in name for word in LEFT_OUT) and not any(word in name for word in KEPT):
            parts[name] = {"type": "object"}
    for (name, field), values in ENUMS.items():
        parts[name]["properties"][field]["enum"] = values
    used, todo = set(), references(schema)
    while todo:
        used |= todo
        todo = {name for part in todo for name in references(parts[part])} - used
    return {
        "$comment": "kubeflow-trainer-api 2.3.0, Apache-2.0; made by tools/launch_schemas.py",
        **schema,
        "$defs": {name: parts[name] for name in sorted(used)},
    }


def sky() -> dict[str, Any]:
    """The schema of a SkyPilot task."""
    task, resources, storage = (
        bare(schema)
        for schema in (
            schemas.get_task_schema(),
            schemas.get_resources_schema(),
            schemas.get_storage_schema(),
        )
    )
    task["properties"].pop("config")
    task["properties"]["resources"] = resources
    task["properties"]["file_mounts"] = {
        "type": "object",
        "additionalProperties": {"anyOf": [{"type": "string"}, storage]},
    }
    for choice in task["properties"]["resources"]["properties"]["job_recovery"]["anyOf"]:
        if choice["type"] == "object":
            choice["additionalProperties"] = False  # more is for plugins
    return {"$comment": "SkyPilot 0.14.1, Apache-2.0; made by tools/launch_schemas.py", **task}


if __name__ == "__main__":
    for name, simplified in {"jobset": jobset(), "sky": sky()}.items():
        text = json.dumps(simplified, sort_keys=True, separators=(",", ":"))
        (HERE / f"{name}.schema.json").write_text(text + "\n")
        print(name, len(text))
