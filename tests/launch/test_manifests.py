"""Manifests for GKE and SkyPilot against their schemas; scripts for SLURM, which are run."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from imagen_jax import exit_codes
from imagen_jax.hardware.topology import parse
from launch import gke, platforms, sky, slurm, status
from tests.launch.conftest import HERE, job, options

SCHEMAS = {
    name: jsonschema.Draft202012Validator(json.loads((HERE / f"{name}.schema.json").read_text()))
    for name in ("jobset", "sky")
}
SECRETS = dict(secrets=("HF_TOKEN",), environment={"WORD": "a 'b' $c"})


def bucket_job(topology: str, **fields):
    """A job whose workdir is in a bucket that it opens itself, and its data below a mount point."""
    one_job = job("gs://b/r", topology=parse(topology), **SECRETS | fields)
    data = "--config.data.path=/mnt/gs/d/x"
    return dataclasses.replace(one_job, arguments=(*one_job.arguments, data))


def jobset(one_job, *more: str) -> dict:
    """The rendered JobSet, validated and parsed."""
    (read,) = yaml.safe_load_all(gke.render([one_job], options("gke", "--image=image:1", *more)))
    SCHEMAS["jobset"].validate(read)
    return read


def sky_task(one_job, *more: str) -> dict:
    """The rendered task, validated and parsed."""
    (read,) = yaml.safe_load_all(sky.render([one_job], options("sky", *more)))
    SCHEMAS["sky"].validate(read)
    return read


def replicated(read: dict) -> tuple[dict, dict, dict]:
    """(replicated job, its job, its container) of a JobSet."""
    (group,) = read["spec"]["replicatedJobs"]
    return (
        group,
        group["template"]["spec"],
        group["template"]["spec"]["template"]["spec"]["containers"][0],
    )


@pytest.mark.parametrize(
    "kind, path",
    [
        ("jobset", ("spec", "replicatedJobs", 0, "template", "spec")),
        ("sky", ("resources",)),
        ("sky", ()),
    ],
)
def test_the_schemas_refuse_what_does_not_exist(kind, path):
    """Catches a schema that accepts everything."""
    read = jobset(bucket_job("v5e:4x4")) if kind == "jobset" else sky_task(bucket_job("v5e:4x4"))
    part = read
    for key in path:
        part = part[key]
    part["parallelismm"] = 1
    with pytest.raises(jsonschema.ValidationError, match="parallelismm"):
        SCHEMAS[kind].validate(read)


@pytest.mark.parametrize(
    "topology, slices, hosts, chips, accelerator, torus",
    [
        ("v5e:16x16", 1, 64, 4, "tpu-v5-lite-podslice", "16x16"),
        ("v5e:2x4", 1, 1, 8, "tpu-v5-lite-podslice", "2x4"),
        ("2xv5p:4x4x8", 2, 32, 4, "tpu-v5p-slice", "4x4x8"),
        ("v4-512", 1, 64, 4, "tpu-v4-podslice", "4x8x8"),
        ("v6e-256", 1, 64, 4, "tpu-v6e-slice", "16x16"),
    ],
)
def test_a_jobset_asks_for_all_hosts_of_a_slice_at_once(
    topology, slices, hosts, chips, accelerator, torus
):
    """Catches pods for a part of a slice, two slices in one node pool, and unknown labels."""
    read = jobset(bucket_job(topology))
    group, inner, container = replicated(read)
    assert (group["replicas"], inner["parallelism"], inner["completions"]) == (slices, hosts, hosts)
    assert (
        container["resources"]["limits"]
        == {"google.com/tpu": chips}
        == container["resources"]["requests"]
    )
    selector = inner["template"]["spec"]["nodeSelector"]
    assert selector == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": torus,
    }
    assert read["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert not {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"} & {
        entry["name"] for entry in container["env"]
    }  # JAX finds its process index by itself


# Messages of a Job that fails by a rule of its podFailurePolicy, as Kubernetes writes them.
FAILED_BY = (
    "Pod default/run-1-slice-0-1-x has condition DisruptionTarget matching FailJob rule at index 0",
    "Container imagen-jax for pod default/run-1-slice-0-1-x failed with exit code 2 matching"
    " FailJob rule at index 1",
)


def test_a_jobset_starts_again_and_does_not_count_preemptions():
    """Catches preemptions that count as failures, and a pod that restarts without the others.

    Also catches exit codes that are retried although the table says otherwise.
    """
    read = jobset(bucket_job("v5e:4x4", retries=4), "--spot")
    _, inner, container = replicated(read)
    policy, pod_rules = read["spec"]["failurePolicy"], inner["podFailurePolicy"]["rules"]
    assert policy["maxRestarts"] == 4
    assert pod_rules[0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    codes = pod_rules[1]["onExitCodes"]
    assert codes["containerName"] == container["name"] and codes["operator"] == "In"
    assert set(codes["values"]) == set(exit_codes.FINAL)
    actions = [
        [
            rule["action"]
            for rule in policy["rules"]
            if rule["onJobFailureReasons"] == ["PodFailurePolicy"]
            and any(re.search(text, message) for text in rule["onJobFailureMessagePatterns"])
        ]
        for message in FAILED_BY
    ]
    assert actions == [["RestartJobSetAndIgnoreMaxRestarts"], ["FailJobSet"]]
    assert inner["backoffLimit"] == 0 and inner["template"]["spec"]["restartPolicy"] == "Never"
    assert (
        inner["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
        and inner["template"]["spec"]["tolerations"]
    )


def test_gpu_pods_find_the_first():
    """Catches pods with the same process index and a coordinator address that no pod has."""
    _, inner, container = replicated(jobset(bucket_job("h100:4x8")))
    environment = {
        entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]
    }
    assert (
        environment["JAX_COORDINATOR_ADDRESS"] == "run-1-slice-0-0.run-1:8476"
        and environment["JAX_NUM_PROCESSES"] == "4"
    )
    assert environment["JAX_PROCESS_ID"] == {
        "fieldRef": {
            "fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        }
    }
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    (alone,) = (
        entry
        for entry in replicated(jobset(bucket_job("h100:8")))[2]["env"]
        if entry["name"].startswith("JAX_")
    )
    assert alone == {"name": "JAX_NUM_PROCESSES", "value": "1"}
    assert inner["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-80gb"
    }


def test_gke_has_no_desktop_cards():
    """Catches a pod that selects nodes by an empty label, and so never starts."""
    with pytest.raises(ValueError, match="GKE does not offer rtx4090: use --where local"):
        jobset(bucket_job("rtx4090:4"))


def test_pods_have_the_buckets_and_the_secrets_by_name(monkeypatch):
    """Catches a bucket that is not mounted, a secret's value in the manifest, and lost quotes."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    one_job = bucket_job("v5e:4x4", setup="echo $PWD")
    read = jobset(one_job, "--service_account=writer")
    _, inner, container = replicated(read)
    pod = inner["template"]
    assert (
        pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
        and pod["spec"]["serviceAccountName"] == "writer"
    )
    volume = next(volume for volume in pod["spec"]["volumes"] if volume["name"] == "bucket-0")
    assert (
        volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
        and volume["csi"]["volumeAttributes"]["bucketName"] == "d"
    )
    mounts = [one for one in container["volumeMounts"] if one["name"].startswith("bucket")]
    assert mounts == [{"name": "bucket-0", "mountPath": "/mnt/gs/d"}]
    assert "hf_secret" not in json.dumps(read)
    assert {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "imagen-jax", "key": "HF_TOKEN"}},
    } in container["env"]
    shown = subprocess.run(
        ["bash", "-c", container["command"][2].replace("exec python3", "printf '%s|'")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.endswith(
        '\n-m|imagen_jax.train|--config.name=it\'s a "$HOME" `x`|--workdir=gs://b/r|'
        "--config.data.path=/mnt/gs/d/x|"
    )


def test_jobsets_are_created_once(tool, tmp_path, monkeypatch, capsys):
    """Catches a running JobSet that is created again, deleted or changed by apply.

    Also catches a failed one that is not started again.
    """
    calls, answer = tmp_path / "calls", tmp_path / "answer"
    tool(
        "kubectl",
        f"import sys; open({str(calls)!r}, 'a').write(sys.argv[1] + ' ');"
        f" print(open({str(answer)!r}).read() if sys.argv[1] == 'get' else '')",
    )
    one_job, given = bucket_job("v5e:4x4", secrets=()), options("gke", "--image=i")
    for state, expected in {
        None: "get get create ",
        "": "get ",
        "Completed": "get ",
        "Failed": "get get delete create ",
    }.items():
        answer.write_text("" if state is None else json.dumps({"status": {"terminalState": state}}))
        calls.write_text("")
        assert platforms.start([one_job], given) == 0
        assert calls.read_text() == expected, state


@pytest.mark.parametrize(
    "topology, nodes, accelerators",
    [("v5e:4x4", 1, "tpu-v5litepod-16:1"), ("h100:4x8", 4, "H100:8")],
)
def test_a_sky_task(topology, nodes, accelerators, monkeypatch):
    """Catches hosts of a slice counted as nodes, and processes that do not find one another.

    Also catches a job that ends with a preemption.
    """
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    read = sky_task(bucket_job(topology, retries=4), "--spot", "--infra=gcp/us-west4")
    assert (read["num_nodes"], read["resources"]["accelerators"]) == (nodes, accelerators)
    assert (
        read["resources"]["use_spot"]
        and read["resources"]["job_recovery"] == {"max_restarts_on_errors": 4}
        and read["resources"]["infra"] == "gcp/us-west4"
    )
    assert read["file_mounts"] == {"/mnt/gs/d": {"source": "gs://d", "mode": "MOUNT"}}
    assert read["envs"] == {"WORD": "a 'b' $c"} and ",gcs]" in read["setup"]
    assert read["secrets"] == {"HF_TOKEN": None} and "hf_secret" not in json.dumps(read)
    run = read["run"].replace(
        "exec python",
        'printf "%s|" "${JAX_COORDINATOR_ADDRESS-}" "${JAX_NUM_PROCESSES-}" "${JAX_PROCESS_ID-}"',
    )
    variables = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "4",
        "SKYPILOT_NODE_RANK": "3",
        "HOME": "/h",
    }
    shown = subprocess.run(
        ["bash", "-c", run], capture_output=True, text=True, check=True, env=os.environ | variables
    ).stdout.split("|")
    assert shown[:3] == (
        ["10.0.0.1:8476", "4", "3"] if topology.startswith("h100") else ["", "", ""]
    )
    assert shown[3:5] == ["-m", "imagen_jax.train"] and "--workdir=gs://b/r" in shown


def test_sky_jobs_are_submitted_once(tool, tmp_path, monkeypatch):
    """Catches a recovering job taken for none, and another job's name taken for this one.

    Also catches a secret's value on the command line.
    """
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    calls, answer = tmp_path / "calls", tmp_path / "answer"
    note = f"open({str(calls)!r}, 'a').write(' '.join(sys.argv))"
    tool(
        "sky",
        f"import sys; print('Fetching', open({str(answer)!r}).read() if sys.argv[2] == 'queue' else"
        f" {note})",
    )
    one_job, given = bucket_job("v5e:4x4"), options("sky")
    for name, starts in {"run-1": False, "run-2": True}.items():
        answer.write_text(json.dumps([{"job_name": name, "status": "RECOVERING"}]))
        calls.write_text("")
        assert platforms.start([one_job], given) == 0
        assert ("jobs launch --yes --detach-run --secret HF_TOKEN" in calls.read_text()) == starts
        assert "hf_secret" not in calls.read_text()


@pytest.fixture
def cluster(tmp_path, tool, no_tools, monkeypatch):
    """A stand-in for SLURM, in which only the script is real."""
    state = tmp_path / "slurm"
    state.mkdir()
    monkeypatch.setenv("FAKE_SLURM", str(state))
    for name in ("sbatch", "run", "srun", "scontrol", "scancel", "squeue"):
        tool(name, (HERE / "fake_slurm.py").read_text())
    return state


# Each task prints its variables. In the job's first run it acts as its argument says, in the second
# run it succeeds.
TASK = """
import os, signal, sys, time
def told(*_):
    print("saved", flush=True)
    sys.exit(0)
names = "JAX_PROCESS_ID JAX_NUM_PROCESSES SLURM_STEP_NODELIST JAX_COORDINATOR_ADDRESS WORD".split()
values = [os.environ[name] for name in names]
line = "task {} of {} on {} {} {} {}\\n".format(*values, sys.argv[1])
os.write(1, line.encode())  # at once: the tasks share a file, and print writes word by word
restart = int(os.environ["SLURM_RESTART_COUNT"])
if restart and sys.argv[2] not in ("mistake", "nan"):
    sys.exit(5 if sys.argv[2] == "wait_crash" and restart == 1 else 0)
signal.signal(signal.SIGTERM, told)
open(os.environ["FAKE_SLURM"] + "/ready_" + os.environ["SLURM_PROCID"], "w").close()
time.sleep(600 if sys.argv[2].startswith("wait") else 0)
sys.exit({"crash": 5, "mistake": 2, "nan": 3, "well": 0}[sys.argv[2]])
"""


def task(workdir, does: str, topology: str = "h100:2x4", **fields):
    return job(
        workdir,
        arguments=("-c", TASK, "it's $HOME", does),
        topology=parse(topology),
        environment={"WORD": "a 'b' $c"},
        **fields,
    )


def submitted(jobs: list, *more: str) -> Path:
    """Submits jobs; the path of their output."""
    assert platforms.start(jobs, options("slurm", *more)) == 0
    subprocess.run(["bash", "-n", str(jobs[0].record / slurm.SCRIPT)], check=True)
    return jobs[0].record / "slurm-17.out"


@pytest.mark.parametrize(
    "does, code, times", [("well", 0, 1), ("crash", 0, 2), ("mistake", 2, 1), ("nan", 3, 1)]
)
def test_a_slurm_job(cluster, tmp_path, does, code, times):
    """Catches unknown sbatch options and tasks without GPUs, variables or quotes.

    Also catches a crash that ends the run, and invalid input that is retried.
    """
    output = submitted(
        [task(tmp_path / "a b", does)],
        "--partition=main",
        "--time=1-00",
        "--sbatch=constraint=h100",
        "--sbatch=contiguous",
    )
    request = json.loads((cluster / "job.json").read_text())
    assert (
        request["nodes"],
        request["ntasks-per-node"],
        request["gpus-per-node"],
        request["time"],
    ) == (
        "2",
        "1",
        "4",
        "1-00",
    ) and "contiguous" in request
    assert subprocess.run(["run"]).returncode == code
    lines = [line for line in output.read_text().splitlines() if line.startswith("task")]
    assert sorted(lines) == sorted(
        f"task {i} of 2 on n0,n1 n0:61457 a 'b' $c it's $HOME" for i in (0, 1) for _ in range(times)
    )


def test_slurm_retries_end(cluster, tmp_path):
    """Catches a job that always fails and is requeued for ever."""
    submitted([task(tmp_path / "a", "mistake", retries=0)])
    script = tmp_path / "a" / "launch" / slurm.SCRIPT
    text = script.read_text()
    final = "|".join(map(str, sorted(exit_codes.FINAL)))
    assert f"in {final})" in text and "-lt 0" in text
    # Invalid input now counts as a crash that is retried once.
    script.write_text(text.replace(f"in {final})", "in 77)").replace("-lt 0", "-lt 1"))
    assert subprocess.run(["run"]).returncode == 2
    assert (tmp_path / "a" / "launch" / "slurm-17.out").read_text().count("task 0") == 2


@pytest.mark.parametrize("does, times", [("wait", 2), ("wait_crash", 3)])
def test_the_time_limit_saves_and_queues_again(cluster, tmp_path, does, times):
    """Catches a time limit that loses steps, ends the run or counts as a crash."""
    output = submitted([task(tmp_path / "a", does, retries=1)])
    running = subprocess.Popen(["run"])
    end = time.monotonic() + 60
    while not all((cluster / f"ready_{i}").exists() for i in (0, 1)) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(int((cluster / "shell").read_text()), signal.SIGTERM)  # --signal=B:TERM@300
    assert running.wait(timeout=60) == 0
    assert output.read_text().count("saved") == 2 and output.read_text().count("task 0") == times


def test_stages_share_one_allocation(cluster, tmp_path):
    """Catches stages that run in sequence or on the same nodes, and a hidden failure."""
    stages = [
        task(tmp_path / name, "well", topology, name=name, stage=name)
        for name, topology in {"base": "h100:2x4", "sr": "h100:1x4"}.items()
    ]
    stages.append(task(tmp_path / "last", "mistake", "h100:1x4", name="last", stage="last"))
    submitted(stages)
    assert json.loads((cluster / "job.json").read_text())["nodes"] == "4"
    assert subprocess.run(["run"]).returncode == 2
    printed = {stage.title: (stage.record / "output.log").read_text() for stage in stages}
    assert [
        sorted(text.split(" on ")[1].split()[0] for text in printed[name].splitlines())
        for name in printed
    ] == [["n0,n1", "n0,n1"], ["n2"], ["n3"]]
    assert [text.split()[6] for text in printed.values()] == ["n0:61457", "n2:61457", "n3:61457"]
    assert slurm.find(stages[2], options("slurm")) == "running"


def test_a_mistake_of_one_stage_does_not_end_another(cluster, tmp_path):
    """Catches a crashed stage that is not restarted because another had invalid input."""
    stages = [
        task(tmp_path / does, does, "h100:1x4", name=does, stage=does)
        for does in ("crash", "mistake")
    ]
    submitted(stages)
    assert subprocess.run(["run"]).returncode == 2
    assert [(stage.record / "output.log").read_text().count("task 0") for stage in stages] == [2, 2]


def test_a_queued_slurm_job_is_not_submitted_again(cluster, tmp_path, capsys):
    """Catches the same command twice that queues two jobs for one workdir."""
    one_job = task(tmp_path / "a", "well")
    submitted([one_job])
    first = (cluster / "job.json").stat().st_mtime_ns
    assert platforms.start([one_job], options("slurm")) == 0
    assert (
        "already running (slurm), not started again" in capsys.readouterr().out
        and (cluster / "job.json").stat().st_mtime_ns == first
    )
    assert status.read(one_job).state == "submitted"


def test_jobs_with_names_that_nothing_quotes_are_quoted():
    """Catches a directory whose space ends an option of sbatch."""
    text = slurm.script([task("/a b/c", "well")], options("slurm"))
    (output,) = [
        shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH --output")
    ]
    assert output == "--output=/a b/c/launch/slurm-%j.out" and sys.executable in text
