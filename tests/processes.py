"""Starts a command as one or several processes over loopback, with virtual CPU devices."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import tiny, xla
from tests.data import synthetic


def start(
    command: Callable[[int], Sequence[str]], output: Path, processes: int, devices: int
) -> list[subprocess.Popen]:
    """Starts the processes on all `devices` together; their logs are `log_of`.

    command: process -> the options of Python.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for i in range(processes):
        env = os.environ | {
            "XLA_FLAGS": xla.flags(devices=devices // processes),
            "PYTHONPATH": str(tiny.ROOT),
        }
        if processes > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(i)}
            env |= {"JAX_NUM_PROCESSES": str(processes)}
        with open(log_of(output, i), "w") as log:
            started.append(
                subprocess.Popen([sys.executable, *command(i)], env=env, stdout=log, stderr=log)
            )
    return started


def train(
    data: Path, workdir: Any, output: Path, processes: int, *options: str
) -> list[subprocess.Popen]:
    """Starts a training of the tiny base model, a device each; a row for every step.

    workdir: may be in a bucket. output: see `start`. options: further ones of the command.
    """
    command = [
        "-m",
        "imagen_jax.train",
        f"--config={tiny.ROOT}/configs/base_64.py:tiny",
        f"--workdir={workdir}",
        f"--config.data.path={data}",
        f"--config.text.dim={synthetic.DIM}",
        "--config.train.log_every=1",
        f"--config.mesh.fsdp={processes}",
        "--config.mesh.fsdp_min_elements=64",
        *options,
    ]
    return start(lambda _: command, output, processes, devices=processes)


def log_of(output: Path, process: int) -> Path:
    """The log of a process: output.PROCESS.log."""
    return output.with_name(f"{output.name}.{process}.log")


def finish(running: Sequence[subprocess.Popen], output: Path, code: int = 0) -> None:
    """Waits until all processes have ended with this exit code."""
    codes = [process.wait(timeout=600) for process in running]
    assert set(codes) == {code}, "\n".join(
        log_of(output, i).read_text()[-3000:] for i in range(len(running))
    )
