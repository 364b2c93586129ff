"""A stand-in for SLURM: sbatch, srun, scontrol, squeue and scancel.

srun runs tasks on this machine with SLURM's variables. FAKE_SLURM names a directory for the state.
Options that are not in the manuals of sbatch and srun 22.05 are refused.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

SBATCH = set(
    "account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment"
    " constraint container contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu"
    " cpus-per-task deadline delay-boot dependency error exclude exclusive export export-file"
    " extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket"
    " gpus-per-task gres gres-flags hint hold input job-name kill-on-invalid-dep licenses mail-type"
    " mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill"
    " no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node"
    " ntasks-per-socket open-mode output overcommit oversubscribe parsable partition power prefer"
    " priority profile propagate qos quiet reboot requeue reservation signal sockets-per-node"
    " spread-job switches thread-spec threads-per-core time time-min tmp uid use-min-nodes verbose"
    " wait wait-all-nodes wckey wrap".split()
)
SRUN = {
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "gpus-per-node",
    "cpu-bind",
    "kill-on-bad-exit",
    "label",
    "nodelist",
}
HERE = Path(os.environ["FAKE_SLURM"])


def known(words: list[str], options: set[str]) -> dict[str, str]:
    given = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    if unknown := given.keys() - options:
        sys.exit(f"unrecognized option {sorted(unknown)}")
    return given


def sbatch(argv: list[str]) -> None:
    """Queues the job; `run` runs it."""
    lines = Path(argv[-1]).read_text().splitlines()
    words = [
        shlex.split(line.removeprefix("#SBATCH "))[0]
        for line in lines
        if line.startswith("#SBATCH ")
    ]
    given = known([*argv[:-1], *words], SBATCH)
    (HERE / "job.json").write_text(json.dumps({"script": argv[-1], **given}))
    print("17")


def run(argv: list[str]) -> None:
    """Runs the job, again each time it is requeued; exits with its exit code."""
    job = json.loads((HERE / "job.json").read_text())
    count = int(job["nodes"])
    for restart in range(10):
        environment = os.environ | {
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": f"n[0-{count - 1}]",
            "SLURM_RESTART_COUNT": str(restart),
        }
        with open(job["output"].replace("%j", "17"), "a") as output:
            process = subprocess.Popen(
                ["bash", job["script"]], env=environment, stdout=output, stderr=output
            )
            (HERE / "shell").write_text(str(process.pid))
            code = process.wait()
        if not (HERE / "requeue").exists():
            sys.exit(code)
        (HERE / "requeue").unlink()


def srun(argv: list[str]) -> None:
    at = next(i for i, word in enumerate(argv) if not word.startswith("--"))
    options = known(argv[:at], SRUN)
    tasks = int(options["ntasks"])
    nodes = options.get("nodelist", ",".join(f"n{i}" for i in range(tasks)))
    running = []
    for i in range(tasks):
        variables = {
            "SLURM_PROCID": i,
            "SLURM_NTASKS": tasks,
            "SLURM_LOCALID": 0,
            "SLURM_STEP_NODELIST": nodes,
        }
        running.append(
            subprocess.Popen(
                argv[at:], env=os.environ | {name: str(value) for name, value in variables.items()}
            )
        )
        with open(HERE / "tasks", "a") as file:
            file.write(f"{running[-1].pid}\n")
    sys.exit(max(process.wait() for process in running))


def scontrol(argv: list[str]) -> None:
    if argv[:2] == ["show", "hostnames"]:
        first, last = map(int, re.fullmatch(r"n\[(\d+)-(\d+)\]", argv[2]).groups())
        print("\n".join(f"n{i}" for i in range(first, last + 1)))
    else:
        assert argv == ["requeue", "17"]
        (HERE / "requeue").touch()
        os.kill(os.getppid(), signal.SIGKILL)  # the job's shell ends when it is queued again


def scancel(argv: list[str]) -> None:
    assert argv == ["--signal=TERM", "17"]
    for line in (HERE / "tasks").read_text().splitlines():
        os.kill(int(line), signal.SIGTERM)


def squeue(argv: list[str]) -> None:
    assert argv == ["--me", "--noheader", "--format=%T %k"], argv
    if (HERE / "job.json").exists():
        print("RUNNING", json.loads((HERE / "job.json").read_text())["comment"])


if __name__ == "__main__":
    globals()[Path(sys.argv[0]).name](sys.argv[1:])
