"""SLURM, for GPU clusters: one sbatch script, in which srun starts one process a node; several jobs
share one allocation side by side.

One process a node, not one a GPU: a host reads its part of each batch once, and `data.workers`
means the same as on a TPU host. Each is told its place by JAX's own variables, because what JAX
makes of SLURM's is one process a GPU.

The job stays in the queue until the training is finished: at its time limit, when preempted, and
after a failure (--retries times) it is queued again and goes on from its newest checkpoint.
`--dependency=singleton` keeps SLURM itself from running two jobs of one name.
"""

import argparse
import hashlib
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence

from launch import machines, status
from launch.job import NAME_LENGTH, USAGE_ERROR, Job, ask, exports, in_bucket, refuse

SAVE_S = 300  # before the time limit the processes are told to save and end
# What this script depends on, so that --sbatch may not say otherwise.
OWN = (
    "job-name",
    "comment",
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "output",
    "open-mode",
    "requeue",
    "no-requeue",
    "dependency",
    "signal",
)
WITHOUT_VALUE = (  # sbatch's manual
    "contiguous",
    "exclusive",
    "get-user-env",
    "hold",
    "ignore-pbs",
    "nice",
    "no-kill",
    "overcommit",
    "oversubscribe",
    "propagate",
    "quiet",
    "reboot",
    "spread-job",
    "use-min-nodes",
    "verbose",
)
TOOL = "run this on a login node of the cluster"
SCRIPT = "job.sbatch"
PORTS = range(61_440, 65_536)  # one for each job, by its number, as jax does it


def define_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--where slurm")
    group.add_argument("--partition", default="")
    group.add_argument("--account", default="")
    group.add_argument(
        "--time",
        default="",
        help=(
            "limit of one run of the job, as sbatch takes it; the job is queued again when it is"
            " over"
        ),
    )
    group.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION[=VALUE]",
        help="any other of sbatch, such as --sbatch=qos=high",
    )


def check(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    for job in jobs:
        if in_bucket(job.workdir) or job.unmounted:
            raise ValueError(
                f"{job.unmounted or job.workdir} is in a bucket: on SLURM give directories that all"
                " nodes share"
            )
        if job.topology.chip.platform != "cuda":
            raise ValueError(
                f"--topology {job.topology}: SLURM clusters have GPUs here; give NODESxGPUS such as"
                " h100:32x8"
            )
    if len({machines.of(job.topology).chips for job in jobs}) > 1:
        raise ValueError("jobs that share an allocation use the same number of GPUs of each node")
    for text in options.sbatch:
        name, equals, _ = text.partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*(=.+)?", text) or not (
            equals or name in (*WITHOUT_VALUE, *OWN)
        ):
            raise ValueError(
                f"--sbatch={text} is not OPTION=VALUE, such as --sbatch=constraint=h100, nor one of"
                f" {', '.join(WITHOUT_VALUE)}"
            )
        if name in OWN or name in ("partition", "account", "time"):
            raise ValueError(
                f"--sbatch={text}: "
                + (f"launch sets {name} itself" if name in OWN else f"give --{name}")
            )
    if options.time and seconds(options.time) <= SAVE_S:
        raise ValueError(
            f"--time {options.time} leaves no time to train: {SAVE_S} s before its end the"
            " processes save"
        )


def seconds(limit: str) -> float:
    """Of a time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0 is no limit.
    Raises ValueError for another form.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not found:
        raise ValueError(
            f"--time {limit} is no time limit of sbatch; write minutes, H:M:S, D-H or D-H:M:S, such"
            " as 90, 12:00:00 or 1-12"
        )
    days, *parts = [int(part) if part else None for part in found.groups()]
    first, second, third = parts
    if days is None and third is None:  # M or M:S
        total = 60 * first + (second or 0)
    else:
        total = 86_400 * (days or 0) + 3600 * first + 60 * (second or 0) + (third or 0)
    return total or math.inf


def name_of(jobs: Sequence[Job]) -> str:
    """The job's name: of several jobs in one allocation, that of them all together."""
    if len(jobs) == 1:
        return jobs[0].name
    digest = hashlib.sha256(" ".join(sorted(job.name for job in jobs)).encode()).hexdigest()[:6]
    return f"{'-'.join(job.title for job in jobs)[: NAME_LENGTH - 7]}-{digest}"


def script(jobs: Sequence[Job], options: argparse.Namespace) -> str:
    """The sbatch script of one job, or of several side by side on nodes of their own."""
    sizes = [machines.of(job.topology) for job in jobs]
    directives = {
        "job-name": name_of(jobs),
        "comment": ",".join(job.name for job in jobs),
        "nodes": sum(size.total for size in sizes),
        "ntasks-per-node": 1,
        "gpus-per-node": sizes[0].chips,
        "exclusive": None,
        "mem": 0,
        "output": jobs[0].record / "slurm-%j.out",
        "open-mode": "append",
        "requeue": None,
        "dependency": "singleton",
        "signal": f"B:TERM@{SAVE_S}",
        **{
            name: value
            for name in ("partition", "account", "time")
            if (value := getattr(options, name))
        },
    }
    for text in options.sbatch:
        name, equals, value = text.partition("=")
        directives[name] = value if equals else None
    head = [
        f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(str(value))}")
        for name, value in directives.items()
    ]
    return "\n".join(["#!/bin/bash", *head, *_body(jobs, sizes)]) + "\n"


def _body(jobs: Sequence[Job], sizes: Sequence[machines.Machines]) -> list[str]:
    lines = [
        "set -uo pipefail",
        f"cd {shlex.quote(os.getcwd())}",
        'nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))',
        "steps=() asked=0",
        (
            "# Near the time limit this shell alone is told. The processes are told by scancel, for"
            " srun would kill them before they have saved."
        ),
        "trap 'asked=1; scancel --signal=TERM \"$SLURM_JOB_ID\"' TERM",
    ]
    first = 0
    for job, size in zip(jobs, sizes):
        lines += [
            "(",
            *exports(job.environment),
            (
                f'export JAX_COORDINATOR_ADDRESS="${{nodes[{first}]}}:$(({PORTS.start} +'
                f' SLURM_JOB_ID % {len(PORTS)}))"'
            ),
        ]
        lines += [
            f"export JAX_NUM_PROCESSES={size.total}",
            *([f"{{ {job.setup}", f"}} || exit {USAGE_ERROR}"] if job.setup else []),
        ]
        placed = (
            f' --nodelist="$(IFS=,; echo "${{nodes[*]:{first}:{size.total}}}")"'
            if len(jobs) > 1
            else ""
        )
        tasks = (
            f"--nodes={size.total} --ntasks={size.total} --ntasks-per-node=1"
            f" --gpus-per-node={size.chips}"
        )
        output = f" >> {shlex.quote(str(job.record / 'output.log'))} 2>&1" if len(jobs) > 1 else ""
        lines += [
            f"exec srun {tasks} --cpu-bind=none --kill-on-bad-exit=1 --label{placed} \\",
            (
                "  bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec \"$@\"' bash"
                f" {shlex.join(job.command(sys.executable))} < /dev/null{output}"
            ),
            ") &",
            "steps+=($!)",
        ]
        first += size.total
    retries = max(job.retries for job in jobs)
    return lines + [
        "worst=0",
        'for step in "${steps[@]}"; do',
        "  while true; do",
        '    wait "$step"; code=$?',
        '    kill -0 "$step" 2>/dev/null || break  # a signal ends wait, not the step',
        "  done",
        (
            f'  if [ "$code" -ne 0 ] && {{ [ "$worst" -eq 0 ] || [ "$worst" -eq {USAGE_ERROR} ];'
            " }; then worst=$code; fi  # a crash before a mistake"
        ),
        "done",
        "# SLURM's own count has the requeues at the time limit and after preemptions in it.",
        f'failures={shlex.quote(str(jobs[0].record))}/slurm-"$SLURM_JOB_ID".failures crashes=()',
        '[ ! -f "$failures" ] || mapfile -t crashes < "$failures"',
        "again=$asked",
        (
            f'if [ "$asked" -eq 0 ] && [ "$worst" -ne 0 ] && [ "$worst" -ne {USAGE_ERROR} ] && ['
            f' "${{#crashes[@]}}" -lt {retries} ]; then'
        ),
        '  echo "exit code $worst" >> "$failures"; again=1',
        "fi",
        'if [ "$again" -eq 1 ]; then scontrol requeue "$SLURM_JOB_ID" && sleep 60; fi',
        'exit "$worst"',
    ]


def render(jobs: Sequence[Job], options: argparse.Namespace) -> str:
    return script(jobs, options)


def find(job: Job, options: argparse.Namespace) -> str:
    """The state of this user's job, known by its comment: running, or waiting, which a job that is
    queued again is too; "" if there is none.
    """
    done = ask(("squeue", "--me", "--noheader", "--format=%T %k"), TOOL)
    refuse(done, "squeue")
    states = [
        line.split()[0]
        for line in done.stdout.splitlines()
        if job.name in line.partition(" ")[2].strip().split(",")
    ]
    return (
        ""
        if not states
        else "running"
        if "RUNNING" in states or "COMPLETING" in states
        else "waiting"
    )


def submit(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Hands the script to sbatch, once for all jobs."""
    text = script(jobs, options)
    path = jobs[0].record / SCRIPT
    path.write_text(text)
    done = ask(("sbatch", "--parsable", str(path)), TOOL)
    refuse(done, "sbatch")
    number = done.stdout.strip().partition(";")[0]
    for job in jobs:
        status.record(job, "slurm", "submitted", f"job {number}")
    print(
        f"{name_of(jobs)}: submitted as job {number}; scancel {number} ends it; what it prints:"
        f" {jobs[0].record}/slurm-{number}.out"
    )
    return 0
