"""Cloud TPU, against a stand-in for gcloud whose workers are directories.

The workers' scripts really run there.
"""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imagen_jax import exit_codes
from imagen_jax.hardware.topology import parse
from launch import gcloud as gcloud_tool
from launch import tpu_pod, tpu_worker
from tests.launch.conftest import job, options

ACTIVE = {"create": "", "states": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]}
OPTIONS = ("--zone=us-west4-a", "--project=p", "--spot")
# Counts its runs on each worker, prints, and ends with the code that is listed for that run.
COUNTING = """
import os, pathlib, sys, time
runs = pathlib.Path(sys.argv[1]) / "runs"
runs.mkdir(exist_ok=True)
with open(runs / os.environ["HOME"].replace("/", "_"), "a") as file:
    file.write("run\\n")
    file.flush()
    n = len(open(file.name).readlines())
secret, code = os.environ.get("HF_TOKEN", "-"), pathlib.Path("code_here").read_text()
line = " ".join(["hello", os.environ["WORD"], secret, code, sys.argv[2]]) + "\\n"
os.write(1, line.encode())  # in one piece: the workers write to one pipe
codes = [int(code) for code in sys.argv[3].split(",")]
time.sleep(60 if codes[n - 1] < 0 else 0)
sys.exit(codes[n - 1])
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one file, as the code for the workers."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "code_here").write_text("the code")
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "c"],
    ):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    monkeypatch.setattr(tpu_worker, "ROOT", root)


def counting(tmp_path, codes: str, topology: str = "v5e:4x4", **fields):
    """A job that exits with these codes, one per run."""
    return job(
        "gs://b/r",
        arguments=("-c", COUNTING, str(tmp_path), "it's $HOME", codes),
        topology=parse(topology),
        environment={"WORD": "a 'b' $c"},
        setup=f"mkdir -p ~/bin; export PATH={Path(sys.executable).parent}:$PATH",
        **fields,
    )


def runs(tmp_path) -> list[int]:
    """The number of runs on each worker."""
    return [len(path.read_text().splitlines()) for path in sorted((tmp_path / "runs").iterdir())]


def calls(cloud, word: str) -> list[list[str]]:
    return [
        result
        for line in (cloud / "calls").read_text().splitlines()
        if word in (result := json.loads(line))
    ]


def test_waits_runs_on_every_worker_and_gives_the_machines_back(
    tmp_path, gcloud, checkout, capfd, monkeypatch
):
    """Catches a start before the machines exist, a missed worker and lost quotes.

    Also catches machines that are not deleted, and a secret that is shown.
    """
    monkeypatch.setenv("HF_TOKEN", "hf_'secret")
    cloud = gcloud(ACTIVE)
    assert (
        tpu_pod.supervise(
            counting(tmp_path, "0", "2xv5e:4x4", secrets=("HF_TOKEN",)),
            options("tpu", *OPTIONS),
            poll_s=0,
        )
        == 0
    )
    assert runs(tmp_path) == [1, 1, 1, 1]  # two slices of two workers
    out = capfd.readouterr().out
    assert (
        out.count("hello a 'b' $c hf_'secret the code it's $HOME") == 4
    )  # what the job itself prints
    assert not (cloud / "resource").exists()
    (create,) = calls(cloud, "create")
    assert {
        "--node-count=2",
        "--node-prefix=run-1",
        "--accelerator-type=v5litepod-16",
        "--spot",
        "--project=p",
    } <= set(create)
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    assert "hf_" not in (cloud / "calls").read_text()
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "finished"):
        assert state in out


def test_a_preempted_pod_is_asked_for_again(tmp_path, gcloud, checkout, capfd):
    """Catches a preemption that ends the run, counts as a failure or is waited for."""
    cloud = gcloud(ACTIVE | {"preempt": True}, ACTIVE | {"preempt": True}, ACTIVE)
    assert (
        tpu_pod.supervise(
            counting(tmp_path, "-1,-1,0", retries=0), options("tpu", *OPTIONS), poll_s=0
        )
        == 0
    )
    assert runs(tmp_path) == [3, 3] and len(calls(cloud, "create")) == 3 == len(
        calls(cloud, "delete")
    )
    assert "preempted, its machines were preempted" in capfd.readouterr().out


def test_requests_that_are_never_served_end(tmp_path, gcloud, checkout, capfd):
    """Catches a request that is repeated for ever, or whose reason is not shown."""
    cloud = gcloud({"create": "", "states": ["PROVISIONING", "FAILED"]})
    assert (
        tpu_pod.supervise(counting(tmp_path, "0", retries=1), options("tpu", *OPTIONS), poll_s=0)
        == 1
    )
    assert len(calls(cloud, "create")) == 2 and "no capacity" in capfd.readouterr().out


def test_a_quota_error_is_told_and_not_repeated(tmp_path, gcloud, checkout, capfd):
    """Catches a request beyond the quota that is repeated or ends in a traceback."""
    cloud = gcloud(
        {
            "create": (
                "Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been"
                " exceeded. Limit: 0"
            ),
            "states": [],
        }
    )
    assert tpu_pod.run([counting(tmp_path, "0")], options("tpu", *OPTIONS)) == 2
    out = capfd.readouterr().out
    assert (
        "failed, gcloud could not create" in out
        and "has been exceeded" in out
        and len(calls(cloud, "create")) == 1
    )


@pytest.mark.parametrize(
    "codes, expected, times", [("1,0", 0, 2), ("1,1,1", 1, 3), ("2,0", 2, 1), ("3,0", 3, 1)]
)
def test_a_crash_is_repeated_on_the_same_machines_and_a_mistake_is_not(
    tmp_path, gcloud, checkout, codes, expected, times
):
    """Catches a crash that gives the machines back, and invalid input that is retried."""
    cloud = gcloud(ACTIVE)
    assert (
        tpu_pod.supervise(counting(tmp_path, codes), options("tpu", *OPTIONS), poll_s=0) == expected
    )
    assert runs(tmp_path) == [times, times] and len(calls(cloud, "create")) == 1 == len(
        calls(cloud, "delete")
    )


def test_a_hardware_fault_is_repeated_on_other_machines(tmp_path, gcloud, checkout):
    """Catches a faulty device that computes the next attempt as well."""
    cloud = gcloud(ACTIVE, ACTIVE)
    one_job = counting(tmp_path, f"{exit_codes.HARDWARE},0")
    assert tpu_pod.supervise(one_job, options("tpu", *OPTIONS), poll_s=0) == 0
    assert runs(tmp_path) == [2, 2]
    assert len(calls(cloud, "create")) == 2 == len(calls(cloud, "delete"))


def test_a_second_launcher_takes_up_what_runs(tmp_path, gcloud, checkout, capfd):
    """Catches a launcher that starts the job again on machines that run it."""
    gcloud(ACTIVE)
    workers = tmp_path / "workers"
    workers.mkdir()
    one_job = counting(tmp_path, "0")
    with tpu_worker.written(one_job) as files:
        for name in tpu_worker.files(one_job):
            (workers / name).write_bytes((files / name).read_bytes())
    (workers / "run.sh").write_text(
        "echo run >> count; until [ -f end ]; do sleep 0.05; done; echo 7 > exit"
    )
    watch = lambda attempt: subprocess.Popen(
        ["bash", workers / "watch.sh", attempt], stdout=subprocess.PIPE
    )
    watchers = [watch(attempt) for attempt in "aab"]
    while not (workers / "attempts").exists() or sorted(
        (workers / "attempts").read_text().split()
    ) != ["a", "a", "b"]:
        time.sleep(0.02)
    (workers / "end").touch()
    assert [watcher.wait(timeout=60) for watcher in watchers] == [7, 7, 7]
    assert [watch(attempt).wait(timeout=60) for attempt in "ab"] == [
        7,
        7,
    ], "calls after the end return the exit code"
    assert (workers / "count").read_text() == "run\n"
    assert watch("c").wait(timeout=60) == 7 and (workers / "count").read_text() == "run\nrun\n", (
        "a new attempt runs the job again"
    )


UNAVAILABLE = (
    "HttpError accessing <https://tpu.googleapis.com/>: response: <{'status': '503'}>, Service"
    " Unavailable"
)


def test_questions_that_get_no_answer_are_asked_again(tmp_path, gcloud, checkout, capfd):
    """Catches one failed request that ends the launcher and leaves the machines running.

    Also catches a healthy pod that is deleted because a request failed.
    """
    cloud = gcloud(ACTIVE | {"drops": 1})
    answers = [
        "-",
        UNAVAILABLE,
        "-",
        "-",
        "Reauthentication failed. cannot prompt during non-interactive execution.",
        UNAVAILABLE,
        "-",
        "-",
    ]
    (cloud / "errors").write_text(
        "\n".join([*answers, UNAVAILABLE, "cannot resolve host", UNAVAILABLE])
    )
    assert (
        tpu_pod.supervise(counting(tmp_path, "0", retries=0), options("tpu", *OPTIONS), poll_s=0)
        == 0
    )
    assert runs(tmp_path) == [1, 1] and not (cloud / "resource").exists()
    assert (
        len({tuple(call) for call in calls(cloud, "create")}) == 1
        and "503" in capfd.readouterr().out
    )
    (cloud / "errors").write_text("PERMISSION_DENIED: no access to project p")
    with pytest.raises(ValueError, match="PERMISSION_DENIED"):
        tpu_pod.supervise(counting(tmp_path, "0"), options("tpu", *OPTIONS), poll_s=0)


@pytest.mark.parametrize("codes, times", [("0", 1), ("1,0", 2)])
def test_a_lost_connection_is_made_again_and_the_job_runs_once(
    tmp_path, gcloud, checkout, monkeypatch, codes, times
):
    """Catches lost connections that add up to a crash.

    Also catches a job that runs again, or whose exit code is lost, if it ends while disconnected.
    """
    monkeypatch.setattr(tpu_pod, "RECONNECTS", 2)
    gcloud(ACTIVE | {"drops": 4})
    assert (
        tpu_pod.supervise(counting(tmp_path, codes, retries=1), options("tpu", *OPTIONS), poll_s=0)
        == 0
    )
    assert runs(tmp_path) == [times, times]


@pytest.mark.parametrize("there", [False, True])
def test_machines_that_ssh_never_reaches(tmp_path, gcloud, checkout, monkeypatch, there):
    """Catches unreachable machines that are paid for without end.

    Also catches the deletion of machines that run another launcher's job.
    """
    monkeypatch.setattr(tpu_pod, "RECONNECTS", 2)
    cloud = gcloud(ACTIVE | {"unreachable": True})
    one_job, chosen = counting(tmp_path, "0", retries=0), options("tpu", *OPTIONS)
    if there:
        subprocess.run(gcloud_tool.Commands(one_job, chosen).create(), check=True)
    assert tpu_pod.supervise(one_job, chosen, poll_s=0) == 1
    assert (cloud / "resource").exists() == there


def test_an_installation_that_fails_is_tried_again(tmp_path, gcloud, checkout):
    """Catches uv's exit code 2 taken for invalid input, which would give the pod back."""
    cloud = gcloud(ACTIVE)
    one_job = counting(tmp_path, "0", retries=1)
    one_job = dataclasses.replace(
        one_job, setup=f"[ -f ~/tried ] || {{ touch ~/tried; exit 2; }}\n{one_job.setup}"
    )
    assert tpu_pod.supervise(one_job, options("tpu", *OPTIONS), poll_s=0) == 0
    assert runs(tmp_path) == [1, 1] and len(calls(cloud, "create")) == 1
