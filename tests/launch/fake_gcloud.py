"""A stand-in for gcloud: queued resources and their workers are directories.

ssh runs commands in the workers' directories, and scp copies files there. FAKE_GCLOUD names the
directory of the state. Its plan.json has one entry per created resource:

    create: "" or an error
    states: reported by describe, one per call; the last one is repeated
    preempt: whether the machines disappear once the job prints something
    drops: number of lost connections to a running job
    unreachable: whether ssh always fails

Each line of the file `errors` replaces one answer of describe, create or delete; "-" keeps the
answer. Options that gcloud 528.0 does not have are refused with its message.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

OPTIONS = {
    "queued-resources create": {
        "zone",
        "project",
        "node-id",
        "node-count",
        "node-prefix",
        "accelerator-type",
        "runtime-version",
        "spot",
    },
    "queued-resources describe": {"zone", "project", "format"},
    "queued-resources delete": {"zone", "project", "force", "quiet"},
    "tpu-vm describe": {"zone", "project", "format"},
    "tpu-vm scp": {"zone", "project", "worker"},
    "tpu-vm ssh": {"zone", "project", "worker", "command"},
}
HERE = Path(os.environ["FAKE_GCLOUD"])
WORKERS = 2


def fail(text: str, code: int = 1) -> None:
    print(f"ERROR: (gcloud) {text}", file=sys.stderr)
    sys.exit(code)


def main(argv: list[str]) -> None:
    with open(HERE / "calls", "a") as file:
        file.write(json.dumps(argv) + "\n")
    words = [word for word in argv if not word.startswith("--")]
    options = dict(
        word.removeprefix("--").partition("=")[::2] for word in argv if word.startswith("--")
    )
    command = " ".join(words[2:4])
    if unknown := options.keys() - OPTIONS[command]:
        fail(f"unrecognized arguments: {sorted(unknown)}", 2)
    rest = words[4:]
    if command.split()[1] in ("describe", "create", "delete") and (HERE / "errors").exists():
        error, *later = (HERE / "errors").read_text().splitlines() or ["-"]
        (HERE / "errors").write_text("\n".join(later))
        if error != "-":
            fail(error)
    {
        "create": create,
        "describe": describe,
        "delete": delete,
        "scp": scp,
        "ssh": ssh,
    }[command.split()[1]](command, rest, options)


def plan() -> dict:
    """The plan of the newest resource."""
    created = json.loads((HERE / "created").read_text()) if (HERE / "created").exists() else 0
    entries = json.loads((HERE / "plan.json").read_text())
    return entries[min(created, len(entries)) - 1] if created else entries[0]


def create(command: str, rest: list[str], options: dict) -> None:
    created = json.loads((HERE / "created").read_text()) if (HERE / "created").exists() else 0
    (HERE / "created").write_text(str(created + 1))
    if plan()["create"]:
        fail(plan()["create"])
    nodes = (
        [options["node-id"]]
        if "node-id" in options
        else [f"{options['node-prefix']}-{i}" for i in range(int(options["node-count"]))]
    )
    for node in nodes:
        for worker in range(WORKERS):
            (HERE / "nodes" / node / str(worker)).mkdir(parents=True)
    (HERE / "resource").write_text(
        json.dumps({"name": rest[0], "nodes": nodes, "states": plan()["states"]})
    )


def resource() -> dict:
    if not (HERE / "resource").exists():
        fail("NOT_FOUND: Requested entity was not found.")
    return json.loads((HERE / "resource").read_text())


def describe(command: str, rest: list[str], options: dict) -> None:
    result = resource()
    if command.startswith("tpu-vm"):
        print(
            json.dumps(
                {"state": "READY" if (HERE / "nodes" / rest[0]).exists() else fail("NOT_FOUND")}
            )
        )
        return
    state, result["states"] = result["states"][0], result["states"][1:] or result["states"]
    (HERE / "resource").write_text(json.dumps(result))
    error = {"failedData": {"error": {"message": "no capacity"}}} if state == "FAILED" else {}
    print(json.dumps({"name": result["name"], "state": {"state": state, **error}}))


def delete(command: str, rest: list[str], options: dict) -> None:
    assert "force" in options and "quiet" in options
    resource()
    (HERE / "resource").unlink()
    shutil.rmtree(HERE / "nodes")


def workers(node: str) -> list[Path]:
    return [HERE / "nodes" / node / str(worker) for worker in range(WORKERS)]


def scp(command: str, rest: list[str], options: dict) -> None:
    node, _, directory = rest[-1].partition(":")
    if plan().get("unreachable"):
        fail("[/usr/bin/scp] exited with return code [255].", 255)
    for home in workers(node):
        for file in rest[:-1]:
            shutil.copy(file, home / directory)


def ssh(command: str, rest: list[str], options: dict) -> None:
    assert options["worker"] == "all"
    if plan().get("unreachable"):
        fail("[/usr/bin/ssh] exited with return code [255].", 255)
    running = [
        subprocess.Popen(
            ["bash", "-c", options["command"]], cwd=home, env=os.environ | {"HOME": str(home)}
        )
        for home in workers(rest[0])
    ]
    dropped = len((HERE / "dropped").read_text()) if (HERE / "dropped").exists() else 0
    if "watch.sh" in options["command"] and (
        plan().get("preempt") or dropped < plan().get("drops", 0)
    ):
        logs = [
            home / options["command"].split()[1].rpartition("/")[0] / "log"
            for home in workers(rest[0])
        ]
        while not all(log.exists() and log.read_text() for log in logs):
            time.sleep(0.02)
        if not plan().get("preempt"):
            (HERE / "dropped").write_text("." * (dropped + 1))
            for process in running:
                process.kill()
            fail("[/usr/bin/ssh] exited with return code [255].", 255)
        result = resource() | {"states": ["SUSPENDED"]}
        (HERE / "resource").write_text(json.dumps(result))
        for process, log in zip(running, logs):
            os.killpg(int((log.parent / "pid").read_text()), 9)
            process.wait()
        fail("[/usr/bin/ssh] exited with return code [255].", 255)
    codes = [process.wait() for process in running]
    sys.exit(next((code for code in codes if code), 0))


if __name__ == "__main__":
    main(sys.argv[1:])
