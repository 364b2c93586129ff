"""The memory and the time of one stage's sampling program, compiled for hardware that is not here.

The program is the one that `sample` runs (`cascade.sample_program`), at its number of steps. A loop
body counts once per step. With a guidance interval, the program has a conditional: its branches
evaluate the network on twice the rows (guided) or on the rows alone (plain). It is costed once with
each branch, and the two costs are averaged by the share of guided evaluations.

    TPUs    seconds = max(compute, overlapped collectives) + exposed collectives
            compute: the compiler's cycles, and the schedules of Pallas kernels
    GPUs    seconds = max(FLOPs / peak, bytes / bandwidth, collectives), a lower bound:
            XLA:GPU provides no cycle estimates
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imagen_jax import sharding
from imagen_jax.diffusion.guidance import Guidance
from imagen_jax.hardware.chips import Chip
from imagen_jax.hardware.topology import Topology
from imagen_jax.hardware.topology import parse as parse_topology
from imagen_jax.planning import block_costs, cost, hlo, kernels, links, whole_step
from imagen_jax.planning.cost_cache import COMPILERS, cached
from imagen_jax.stage import Stage, create_stage, sampling_rules
from imagen_jax.stage_sizes import Size, square

# What is cached of a compiled program: its peak in bytes per device, and the sums of `_sums` if
# every evaluation is guided, and if none is. Both are empty if it does not fit.
COST_FIELDS = {"peak": float, "guided": dict, "plain": dict}
KERNEL_BODY = re.compile(r"\\22body\\22: \\22[^\\]*\\22")  # in the text of a lowered program
COMPUTE = (cost.MATRIX, cost.ELEMENTWISE, cost.COPY, cost.KERNEL)


def evaluations(sampling: Mapping[str, Any], stage: Stage) -> tuple[int, int]:
    """(network evaluations of one sample, the number of guided ones).

    There is one evaluation at each of the `steps` noise levels: one in each iteration of the loop,
    and one after it.
    """
    rules = sampling_rules(sampling, stage.schedule)
    guidance: Guidance = rules["guidance"]
    levels = rules["grid"](sampling["steps"])
    if guidance.w == 1.0 or not stage.reads_text:
        return len(levels), 0
    inside = len(levels) if guidance.everywhere else int(guidance.inside(levels).sum())
    return len(levels), inside


def evaluation_flops(config: Mapping[str, Any], size: Size | None = None) -> float:
    """FLOPs of one network evaluation for one full-size image, without guidance.

    size: of the image; None for the square of the image size of the stage.

    They are counted in the program for a single device, without the projections of the text, which
    run once per sample.
    """
    stage = create_stage(config)
    size = size or square(stage.image_size)
    params, batch = whole_step.sampling_inputs(stage, 1, size)
    z, logsnr = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32), jnp.zeros(1)

    def prepare(params, batch):
        cond = stage.cond(batch) | ({"lowres_logsnr": logsnr} if stage.lowres_size else {})
        return stage.with_text_values(params, cond, size)

    def evaluate(params, z, cond):
        return stage.denoiser(params)(z, logsnr, cond)

    cond = jax.eval_shape(prepare, params, batch)
    return float(jax.jit(evaluate).lower(params, z, cond).cost_analysis()["flops"])


def smallest(
    topology: Topology, sizes: Mapping[str, int], rows: int
) -> tuple[Topology, dict[str, int], int]:
    """The smallest topology whose chips run the same program: (topology, mesh sizes, batch size).

    Along `data` all chips compute the same program on different rows, without communication. So a
    program is compiled for fsdp x model x spatial chips, or for the smallest TPU slice that has a
    multiple of them.

    Args:
        topology: the hardware.
        sizes: the size of each mesh axis.
        rows: the number of rows of a batch.
    """
    columns = sizes["fsdp"] * sizes["model"] * sizes["spatial"]
    if topology.chip.platform == "tpu":
        reduced = block_costs.smallest(topology, columns)
    elif columns <= topology.shape[-1]:
        reduced = dataclasses.replace(topology, shape=(1, columns), slices=1)
    else:
        return topology, dict(sizes), rows
    if reduced.chips % columns:
        return topology, dict(sizes), rows
    data = reduced.chips // columns
    return reduced, {**sizes, "data": data}, rows // sizes["data"] * data


def compiled_cost(request: str, name: str, level: str, cache: str) -> dict[str, Any]:
    """The `COST_FIELDS` of a stage's program. Runs in a worker process.

    Args:
        request: JSON with `config` of the stage, `sampling`, `mesh` (the sizes), `rows` per batch,
            the `index` of the stage, and the `size` of its images (null: squares).
        name: the topology's name.
        level: the compiler's level, `whole_step.O0` or `whole_step.DEFAULT`.
        cache: directory of cached costs.
    """
    topology = parse_topology(name)
    program, _ = traced(request, topology)
    lowered = program.lower()

    def compute() -> dict[str, Any]:
        exact = level == whole_step.DEFAULT
        text, peak = whole_step.compile_text(lowered, topology, exact)
        if not text:
            return {"peak": peak, "guided": {}, "plain": {}}
        module, sizes = hlo.parse(text), json.loads(request)["mesh"]
        guided, plain = (_sums(module, topology, sizes, smaller) for smaller in (False, True))
        return {"peak": peak, "guided": guided, "plain": plain}

    key = f"sampling {topology} {level} {program_text(program, lowered)}"
    return cached(cache, key, COST_FIELDS, compute, COMPILERS[topology.chip.platform])


def program_text(program: Any, lowered: Any) -> str:
    """Text that determines a traced and lowered program.

    The lowered text of a Pallas kernel contains the files and lines of the code that calls it. It
    is replaced by the kernel's signature.
    """
    calls = [kernels.signature(call) for call, _ in kernels.calls(program.jaxpr.jaxpr)]
    return "\n".join([KERNEL_BODY.sub("", lowered.as_text()), *calls])


def kernel_seconds(request: str, name: str, cache: str) -> tuple[float, float]:
    """Seconds of all Pallas kernels of a batch: (every evaluation guided, none guided).

    Runs in a worker process that called `kernels.ask_for_schedules`.
    """
    topology = parse_topology(name)
    program, mesh = traced(request, topology)
    guided, plain = (
        kernels.total_seconds(program.jaxpr.jaxpr, topology.chip, mesh, cache, branch)
        for branch in (-1, 0)
    )
    return guided, plain


def _sums(
    module: hlo.Module, topology: Topology, sizes: Mapping[str, int], smaller: bool
) -> dict[str, float]:
    """The time of a compiled program on each device, in parts, and its memory traffic.

    smaller: see `hlo.Module.run`. Returns seconds by kind of instruction (TPUs only), "unestimated"
    (the part of them from a roofline), "overlapped" and "exposed" seconds of collectives, and
    "bytes".
    """
    mesh = sharding.make_mesh(sizes, topology.devices())
    sums = Counter(bytes=cost.memory_bytes(module, smaller))
    for item in cost.items(module, topology.chip, smaller) if _has_cycles(topology) else ():
        sums[item.kind] += item.seconds
        sums["unestimated"] += 0.0 if item.estimated else item.seconds
    for collective in hlo.collectives(module, mesh.size, smaller):
        kind = "overlapped" if collective.overlapped else "exposed"
        sums[kind] += links.seconds(collective, list(mesh.devices.flat), topology)
    return dict(sums)


def _has_cycles(topology: Topology) -> bool:
    return topology.chip.platform == "tpu"


def batch_time(
    compiled: Mapping[str, Any],
    kernel: tuple[float, float],
    guided_share: float,
    flops: float,
    chip: Chip,
) -> dict[str, Any]:
    """The time of a batch and its parts, in seconds.

    Args:
        compiled: the result of `compiled_cost` for a program that fits.
        kernel: the result of `kernel_seconds`.
        guided_share: share of the evaluations that are guided.
        flops: FLOPs per chip of a batch.
        chip: the chip.

    Returns a dict with "seconds", "is_bound" (True for GPUs: a lower bound), "compute_s" with its
    "kinds_s", "overlapped_s" and "exposed_s" (collectives), "roofline_share_of_compute", and
    "utilization": FLOPs over peak FLOPs.
    """
    guided = Counter(compiled["guided"]) + Counter({cost.KERNEL: kernel[0]})
    plain = Counter(compiled["plain"]) + Counter({cost.KERNEL: kernel[1]})
    parts = {
        name: guided_share * guided[name] + (1 - guided_share) * plain[name] for name in guided
    }
    collectives = {f"{name}_s": parts.get(name, 0.0) for name in ("overlapped", "exposed")}
    if chip.platform == "tpu":
        kinds = {kind: parts[kind] for kind in COMPUTE if parts.get(kind)}
        compute = sum(kinds.values())
        seconds = max(compute, collectives["overlapped_s"]) + collectives["exposed_s"]
    else:
        kinds = {
            "FLOPs at peak": flops / chip.peak_flops,
            "bytes at full bandwidth": parts["bytes"] / chip.memory_bandwidth,
        }
        compute = max(kinds.values())
        seconds = max(compute, sum(collectives.values()))
    return collectives | {
        "seconds": seconds,
        "is_bound": chip.platform != "tpu",
        "compute_s": compute,
        "kinds_s": kinds,
        "roofline_share_of_compute": parts.get("unestimated", 0.0) / compute,
        "utilization": flops / chip.peak_flops / seconds,
    }


def traced(request: str, topology: Topology) -> tuple[Any, Mesh]:
    """(traced program, mesh) of a request, see `compiled_cost`."""
    asked = json.loads(request)
    mesh = sharding.make_mesh(asked["mesh"], topology.devices())
    stage = create_stage(asked["config"], mesh)
    size = tuple(asked["size"]) if asked["size"] else None
    given = asked["sampling"], asked["rows"], asked["index"], size
    program, arguments = whole_step.images_program(stage, asked["config"]["mesh"], mesh, *given)
    return program.trace(*arguments), mesh
