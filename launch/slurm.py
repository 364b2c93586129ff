"""SLURM, for GPU clusters: one sbatch script in which srun starts one process per node.

Several jobs share one allocation side by side. One process per node instead of one per GPU: a host
reads its part of each batch once, and `data.workers` means the same as on a TPU host. JAX's own
variables give each process its index, because JAX would read one process per GPU from SLURM's.

The job is requeued at its time limit, when preempted and after a failure (at most --retries times,
except for exit codes that are not retried), and continues from its newest checkpoint.
`--dependency=singleton` makes SLURM run at most one job of a name.
"""

import hashlib
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from imagen_jax import exit_codes
from launch import machines, status
from launch.job import NAME_LENGTH, Job, ask, exports, refuse

SAVE_S = 300  # before the time limit, the processes get a signal to save and end
# Options that the script depends on and --sbatch may not set.
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
PORTS = range(61_440, 65_536)  # the job's number selects one, as in jax
# The end of the script: waits for all steps and requeues the job. A failure that is retried takes
# precedence over one that is not.
END = """\
final() {{ case "$1" in {final}) return 0 ;; *) return 1 ;; esac; }}  # exit codes not to retry
worst=0
for step in "${{steps[@]}}"; do
  while true; do
    wait "$step"; code=$?
    kill -0 "$step" 2>/dev/null || break  # a signal ends wait, not the step
  done
  if [ "$code" -ne 0 ] && {{ [ "$worst" -eq 0 ] || final "$worst"; }}; then worst=$code; fi
done
# SLURM's own count includes the requeues at the time limit and after preemptions.
failures={failures} crashes=()
[ ! -f "$failures" ] || mapfile -t crashes < "$failures"
again=$asked
if [ "$asked" -eq 0 ] && [ "$worst" -ne 0 ] && ! final "$worst" \\
    && [ "${{#crashes[@]}}" -lt {retries} ]; then
  echo "exit code $worst" >> "$failures"; again=1
fi
if [ "$again" -eq 1 ]; then scontrol requeue "$SLURM_JOB_ID" && sleep 60; fi
exit "$worst"
"""


def define_flags(values: flags.FlagValues) -> None:
    """The options of --where slurm."""
    flags.DEFINE_string("partition", "", "partition of the job", flag_values=values)
    flags.DEFINE_string("account", "", "account to charge", flag_values=values)
    flags.DEFINE_string(
        "time",
        "",
        "time limit of one run of the job, in sbatch's format; the job is requeued at the limit",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "sbatch",
        [],
        "OPTION[=VALUE]: any other option of sbatch, such as --sbatch=qos=high",
        flag_values=values,
    )


def check(jobs: Sequence[Job], options: flags.FlagValues) -> None:
    """Raises ValueError for options and jobs that SLURM cannot run."""
    for job in jobs:
        if job.unmounted:
            raise ValueError(
                f"{job.unmounted} is in a bucket: on SLURM give directories that all nodes share"
            )
        if job.topology.chip.platform != "cuda":
            raise ValueError(
                f"--topology {job.topology} is not supported: SLURM clusters have GPUs here; give"
                " NODESxGPUS such as h100:32x8"
            )
    if len({machines.of(job.topology).chips for job in jobs}) > 1:
        raise ValueError(
            "the stages need different numbers of GPUs per node: give the same number, because"
            " they share one allocation"
        )
    for text in options.sbatch:
        _check_sbatch(text)
    if options.time and seconds(options.time) <= SAVE_S:
        raise ValueError(
            f"--time {options.time} leaves no time to train: give more than {SAVE_S} s, which are"
            " reserved for saving"
        )


def _check_sbatch(text: str) -> None:
    """Raises ValueError if a value of --sbatch is malformed or set by launch."""
    name, equals, _ = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z-]*(=.+)?", text) or not (
        equals or name in (*WITHOUT_VALUE, *OWN)
    ):
        raise ValueError(
            f"--sbatch={text} is not OPTION=VALUE, such as --sbatch=constraint=h100, nor one of"
            f" {', '.join(WITHOUT_VALUE)}"
        )
    if name in OWN:
        raise ValueError(f"--sbatch={text}: launch sets {name} itself")
    if name in ("partition", "account", "time"):
        raise ValueError(f"--sbatch={text}: give --{name}")


def seconds(limit: str) -> float:
    """Seconds of a time limit in sbatch's format; 0 means no limit.

    limit: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ValueError for another format.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        raise ValueError(
            f"--time {limit} is not a time limit of sbatch: give minutes, H:M:S, D-H or D-H:M:S,"
            " such as 90, 12:00:00 or 1-12"
        )
    days, *parts = [int(part) if part else None for part in match.groups()]
    first, second, third = parts
    if days is None and third is None:  # M or M:S
        total = 60 * first + (second or 0)
    else:
        total = 86_400 * (days or 0) + 3600 * first + 60 * (second or 0) + (third or 0)
    return total or math.inf


def name_of(jobs: Sequence[Job]) -> str:
    """The name of the SLURM job; several jobs in one allocation share a name."""
    if len(jobs) == 1:
        return jobs[0].name
    digest = hashlib.sha256(" ".join(sorted(job.name for job in jobs)).encode()).hexdigest()[:6]
    return f"{'-'.join(job.title for job in jobs)[: NAME_LENGTH - 7]}-{digest}"


def script(jobs: Sequence[Job], options: flags.FlagValues) -> str:
    """The sbatch script of one job, or of several in parallel on separate nodes."""
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
    """The script after its directives."""
    lines = [
        "set -uo pipefail",
        f"cd {shlex.quote(os.getcwd())}",
        'nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))',
        "steps=() asked=0",
        "# Near the time limit SLURM signals this shell alone. scancel signals the processes: srun",
        "# would kill them before they have saved.",
        "trap 'asked=1; scancel --signal=TERM \"$SLURM_JOB_ID\"' TERM",
    ]
    first = 0
    for job, size in zip(jobs, sizes):
        lines += _step(job, size, first, shared=len(jobs) > 1)
        first += size.total
    failures = f'{shlex.quote(str(jobs[0].record))}/slurm-"$SLURM_JOB_ID".failures'
    end = END.format(
        failures=failures,
        retries=max(job.retries for job in jobs),
        final="|".join(map(str, sorted(exit_codes.FINAL))),
    )
    return [*lines, *end.splitlines()]


def _step(job: Job, size: machines.Machines, first: int, shared: bool) -> list[str]:
    """Lines that start one job in the background, on the nodes from index `first` on.

    shared: whether other jobs use other nodes of the allocation.
    """
    port = f"$(({PORTS.start} + SLURM_JOB_ID % {len(PORTS)}))"
    setup = [f"{{ {job.setup}", f"}} || exit {exit_codes.INVALID}"] if job.setup else []
    srun = [
        f"exec srun --nodes={size.total} --ntasks={size.total} --ntasks-per-node=1 \\",
        f"  --gpus-per-node={size.chips} --cpu-bind=none --kill-on-bad-exit=1 --label \\",
    ]
    output = ""
    if shared:
        nodes = f'"$(IFS=,; echo "${{nodes[*]:{first}:{size.total}}}")"'
        srun.append(f"  --nodelist={nodes} \\")
        output = f" >> {shlex.quote(str(job.record / 'output.log'))} 2>&1"
    command = shlex.join(job.command(sys.executable))
    return [
        "(",
        *exports(job.environment),
        f'export JAX_COORDINATOR_ADDRESS="${{nodes[{first}]}}:{port}"',
        f"export JAX_NUM_PROCESSES={size.total}",
        *setup,
        *srun,
        "  bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec \"$@\"' bash \\",
        f"  {command} < /dev/null{output}",
        ") &",
        "steps+=($!)",
    ]


render = script


def find(job: Job, options: flags.FlagValues) -> str:
    """The state of this user's job, identified by its comment.

    running, waiting (also when requeued) or "" if there is none.
    """
    done = ask(("squeue", "--me", "--noheader", "--format=%T %k"), TOOL)
    refuse(done, "squeue")
    states = [
        line.split()[0]
        for line in done.stdout.splitlines()
        if job.name in line.partition(" ")[2].strip().split(",")
    ]
    if not states:
        return ""
    return "running" if {"RUNNING", "COMPLETING"} & set(states) else "waiting"


def submit(jobs: Sequence[Job], options: flags.FlagValues) -> int:
    """Submits one script for all jobs with sbatch."""
    text = script(jobs, options)
    path = jobs[0].record / SCRIPT
    path.write_text(text)
    done = ask(("sbatch", "--parsable", str(path)), TOOL)
    refuse(done, "sbatch")
    number = done.stdout.strip().partition(";")[0]
    for job in jobs:
        status.write_state(job, "slurm", "submitted", f"job {number}")
    print(
        f"{name_of(jobs)}: submitted as job {number}; scancel {number} ends it; output:"
        f" {jobs[0].record}/slurm-{number}.out"
    )
    return 0
