"""Time of Pallas kernels on a TPU, from the compiler's instruction schedule.

The compiler has no estimate for a kernel, but it can write the kernel's final schedule
(`ask_for_schedules`, before libtpu is loaded). The time is the number of instruction bundles, one
per cycle, times the number of grid steps.

The count is too high by branches that a step does not take. It is too low where loading and storing
blocks takes longer than the arithmetic. Kernels must not contain loops; a loop would count once.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.extend
from jax.interpreters import partial_eval as pe
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagen_jax.hardware.chips import Chip
from imagen_jax.planning.cost_cache import cached


def ask_for_schedules(directory: str) -> None:
    """Makes libtpu write the schedule of everything this process compiles to a directory.

    It has no effect once libtpu is loaded. The directory must be empty and used by this process
    only.
    """
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
    os.environ["IMAGEN_JAX_SCHEDULES"] = directory


def calls(jaxpr: Any, times: int = 1, branch: int = -1) -> Iterator[tuple[Any, int]]:
    """Yields every pallas_call of a traced program and the number of times it runs.

    branch: the branch of each conditional that runs: -1 (a true predicate) or 0 (a false one).
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation, times
            continue
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        params = equation.params
        if equation.primitive.name == "cond":
            params = {"branches": params["branches"][branch]}
        for subprogram in jax.extend.core.jaxprs_in_params(params):
            yield from calls(subprogram, inner, branch)


def total_seconds(jaxpr: Any, chip: Chip, mesh: Mesh, cache: str, branch: int = -1) -> float:
    """Seconds of all kernels of a traced program on one chip.

    Runs in a process that called `ask_for_schedules`.

    Args:
        jaxpr: the program.
        chip: the chip.
        mesh: the mesh of the program.
        cache: directory of cached costs.
        branch: see `calls`.
    """
    # Unused operations, such as recomputation of stored arrays, do not run.
    live = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]
    total = 0.0
    for call, times in calls(live, branch=branch):
        key = f"{chip.name} {signature(call)}"
        compute = lambda call=call: {"seconds": seconds(call, chip, mesh)}
        one = cached(cache, key, {"seconds": float}, compute)["seconds"]
        total += times * one / cores_at_work(call, chip)
    return total


def signature(call: Any) -> str:
    """Text that determines the compiled kernel, for use as a cache key."""
    return (
        f"{call.params['grid_mapping']} {call.params['jaxpr']}"
        f" {[v.aval for v in (*call.invars, *call.outvars)]}"
    )


def cores_at_work(call: Any, chip: Chip) -> int:
    """The number of the chip's cores that share the kernel's grid.

    All cores work if they divide a dimension that the kernel declares parallel, else one.
    """
    semantics = call.params["compiler_params"].dimension_semantics or ()
    split = any(
        "parallel" in str(kind).lower() and size % chip.cores == 0
        for kind, size in zip(semantics, call.params["grid_mapping"].grid)
    )
    return chip.cores if split else 1


def seconds(call: Any, chip: Chip, mesh: Mesh) -> float:
    """Seconds of one run of a kernel on one core.

    The kernel is compiled alone for the first device of the mesh, in a process that called
    `ask_for_schedules`.
    """
    replicated = NamedSharding(Mesh(mesh.devices.flat[:1], "x"), PartitionSpec())
    arguments = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=replicated) for v in call.invars
    ]
    directory = Path(os.environ["IMAGEN_JAX_SCHEDULES"])
    jax.jit(lambda *a: call.primitive.bind(*a, **call.params)).lower(*arguments).compile()
    texts = [file.read_text() for file in directory.glob("*schedule-analysis_final_bundles*")]
    for file in directory.iterdir():
        file.unlink()
    bundles = [
        int(re.search(r"total scheduled bundles:\s+(\d+)", text)[1])
        for text in texts
        if "tpu_custom_call" in text
    ]
    if not bundles:
        raise ValueError(
            f"libtpu wrote no schedule for the kernel {call.params['name']}; its flags may have"
            " changed in this version. Use --notime for a plan without times"
        )
    return max(bundles) * math.prod(call.params["grid_mapping"].grid) / chip.clock
