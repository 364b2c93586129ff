"""What Pallas kernels cost on a TPU: the instruction bundles of their compiled schedule, times the
steps of their grid.

The compiler gives no estimate for a kernel, but prints its final schedule if asked
(`ask_for_schedules`, before libtpu is loaded). A bundle is issued a cycle. Counted so, a kernel's
time is too high by the branches that a step does not take, and too low by what its loads and stores
of blocks are slower than its arithmetic; loops inside a kernel would be counted once, and there
must be none.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.extend
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagen_jax.hardware.chips import Chip


def ask_for_schedules(directory: str) -> None:
    """Makes libtpu, if it is not loaded yet, write the schedule of everything that this process
    compiles to a directory, an empty one of its own.
    """
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
    os.environ["IMAGEN_JAX_SCHEDULES"] = directory


def calls(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every pallas_call of a traced program with how often it runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation, times
            continue
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for inside in jax.extend.core.jaxprs_in_params(equation.params):
            yield from calls(inside, inner)


def signature(call: Any) -> str:
    """All that the compiled kernel depends on, as text."""
    return (
        f"{call.params['grid_mapping']} {call.params['jaxpr']}"
        f" {[v.aval for v in (*call.invars, *call.outvars)]}"
    )


def cores_at_work(call: Any, chip: Chip) -> int:
    """How many of the chip's cores share a kernel's grid: all, if a dimension that the kernel calls
    parallel divides by them.
    """
    semantics = call.params["compiler_params"].dimension_semantics or ()
    split = any(
        "parallel" in str(kind).lower() and size % chip.cores == 0
        for kind, size in zip(semantics, call.params["grid_mapping"].grid)
    )
    return chip.cores if split else 1


def seconds(call: Any, chip: Chip, mesh: Mesh) -> float:
    """One run of a kernel by one core, compiled alone for the mesh's first device, in a process
    that asked for schedules.
    """
    whole = NamedSharding(Mesh(mesh.devices.flat[:1], "x"), PartitionSpec())
    arguments = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=whole) for v in call.invars
    ]
    directory = Path(os.environ["IMAGEN_JAX_SCHEDULES"])
    jax.jit(lambda *a: call.primitive.bind(*a, **call.params)).lower(*arguments).compile()
    texts = [file.read_text() for file in directory.glob("*schedule-analysis_final_bundles*")]
    for file in directory.iterdir():
        file.unlink()
    found = [
        re.search(r"total scheduled bundles:\s+(\d+)", text)
        for text in texts
        if "tpu_custom_call" in text
    ]
    if not found:
        raise ValueError(
            f"libtpu wrote no schedule of the kernel {call.params['name']}: its flags for that have"
            " changed"
        )
    return (
        max(int(match[1]) for match in found)
        * math.prod(call.params["grid_mapping"].grid)
        / chip.clock
    )
