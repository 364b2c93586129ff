"""Predicted time of a train step on TPUs.

The parts of a step:

    compute    the estimated time of every block (`block_costs`), times the number of equal blocks,
               times the number of accumulation steps
    gathers    parameter all-gathers along data and fsdp, by link bandwidth (`links`)
    sums       gradient reductions along data and fsdp (all-reduce and reduce-scatter)
    exposed    all other collectives: halo exchanges and resharding of activations
    update     optimizer, EMA and recorded norms (`block_costs.update_cost`)

    step = max(compute, gathers) + sums + exposed + update

The formula assumes that all-gathers are overlapped with compute and that gradient reductions are
not. This was observed in steps of sr_256 compiled at the default level for v5e:16x16 and v5p:4x4x8
(`overlap`, `plan --exact`): 99 % of the all-gather time was overlapped, and no gradient reduction.
If gradient reductions were overlapped as well, a step would take max(compute, gathers + sums) +
exposed + update.

For GPUs there is no step time: XLA:GPU provides no cycle estimates.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from imagen_jax import sharding
from imagen_jax.hardware.topology import Topology
from imagen_jax.planning import cost, hlo, whole_step
from imagen_jax.planning.block_costs import BlockCost
from imagen_jax.training.step import TrainProgram

MODULES_LISTED = 10
SECONDS_PER_HOUR = 3600


def shapes_on_a_chip(program: TrainProgram) -> Counter[tuple[int, ...]]:
    """The shapes of the parameters' shards on one chip, and the number of parameters with each."""
    return Counter(
        leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(program.abstract.params)
    )


def predict(
    program: TrainProgram,
    topology: Topology,
    flops: float,
    blocks: Sequence[BlockCost],
    update: float,
    traffic: Sequence[whole_step.Traffic],
) -> dict[str, Any]:
    """The time of a step and of its parts, see the docstring of this module.

    Args:
        program: the train step.
        topology: the hardware.
        flops: model FLOPs of a step on one chip.
        blocks: costs of all blocks.
        update: seconds of the parameter update.
        traffic: the collectives of a step.

    Returns a dict with

        step_s, compute_s, gathers_s, sums_s, exposed_traffic_s, update_s   see the module
        at_best_s                   the step if gradient reductions were overlapped as well
        in_turn_s                   the step if nothing were overlapped
        mfu                         model FLOPs over peak FLOPs
        images_per_s_per_chip       throughput
        kinds_s                     compute_s by kind of instruction
        roofline_share_of_compute   share of compute_s for which the compiler has no estimate
    """
    times = program.accumulation
    compute = times * sum(block.seconds * len(block.paths) for block in blocks)
    gathers, sums, exposed = (sum(t.seconds for t in rows) for rows in _by_purpose(traffic))
    step = max(compute, gathers) + sums + exposed + update
    images = next(iter(program.batch.values())).shape[0]
    kinds = Counter()
    for block in blocks:
        calls = times * len(block.paths)
        kinds.update({kind: calls * seconds for kind, seconds in block.kinds.items()})
    unestimated = times * sum(block.unestimated * len(block.paths) for block in blocks)
    return {
        "step_s": step,
        "compute_s": compute,
        "gathers_s": gathers,
        "sums_s": sums,
        "exposed_traffic_s": exposed,
        "update_s": update,
        "at_best_s": max(compute, gathers + sums) + exposed + update,
        "in_turn_s": compute + gathers + sums + exposed + update,
        "mfu": flops / topology.chip.peak_flops / step,
        "images_per_s_per_chip": images / step / topology.chips,
        "kinds_s": dict(kinds.most_common()),
        "roofline_share_of_compute": unestimated / compute,
    }


def blocks_bytes(program: TrainProgram, blocks: Sequence[BlockCost]) -> float:
    """Bytes that the blocks of a step read and write in a chip's memory."""
    return program.accumulation * sum(block.bytes * len(block.paths) for block in blocks)


def memory_traffic(topology: Topology, size: float) -> dict[str, float]:
    """Bytes read and written in a chip's memory per step, and their time at full bandwidth."""
    return {"bytes": size, "seconds": size / topology.chip.memory_bandwidth}


def check(module: hlo.Module, topology: Topology, time: Mapping[str, Any]) -> dict[str, float]:
    """Compares the sum of the blocks with a whole step compiled at the default level.

    Returns {"whole_s", "parts_s"}, both without collectives and kernels. The whole step includes
    what no block has: the loss, the noise, resampling, and the update as the compiler fuses it.
    """
    whole = sum(item.seconds for item in cost.items(module, topology.chip))
    kernels = time["kinds_s"].get(cost.KERNEL, 0.0)
    return {"whole_s": whole, "parts_s": time["compute_s"] - kernels + time["update_s"]}


def overlap(traffic: Sequence[whole_step.Traffic]) -> dict[str, float]:
    """Shares of all-gather and of gradient-reduction time that are overlapped with compute.

    `traffic` is that of a step compiled at the default level.
    """
    gathers, sums, _ = _by_purpose(traffic)
    share = lambda rows: sum(t.beside for t in rows) / max(sum(t.seconds for t in rows), 1e-12)
    return {"gathers_beside": share(gathers), "sums_beside": share(sums)}


def _by_purpose(
    traffic: Sequence[whole_step.Traffic],
) -> tuple[list[whole_step.Traffic], list[whole_step.Traffic], list[whole_step.Traffic]]:
    """(parameter all-gathers, gradient reductions, all other collectives)."""
    along_batch = [t for t in traffic if set(t.axes) <= set(sharding.BATCH_AXES)]
    gathers = [t for t in along_batch if t.kind == "all-gather"]
    sums = [t for t in along_batch if t.kind in ("reduce-scatter", "all-reduce")]
    return gathers, sums, [t for t in traffic if t not in gathers and t not in sums]


def expensive_modules(
    blocks: Sequence[BlockCost], accumulation: int, count: int = MODULES_LISTED
) -> list[dict[str, Any]]:
    """The modules with the most compute time. Equal modules of equal blocks are one row.

    Returns dicts with "place" (module path), "others" (number of equal modules in addition to it),
    "seconds" per step and "share" of the compute time.
    """
    total = sum(block.seconds * len(block.paths) for block in blocks)
    seconds_of: Counter[tuple[str, int]] = Counter()
    for block in blocks:
        first, others = block.paths[0], len(block.paths) - 1
        for inside, seconds in block.inside.items():
            # In the forward pass the path starts with the class name, in the backward pass not.
            inner = inside.partition("/")[2] if inside[:1].isupper() else inside
            path = "/".join(filter(None, (first, inner)))
            seconds_of[path, others] += seconds * len(block.paths)
        if kernel := block.kinds.get(cost.KERNEL):
            seconds_of[f"{first}/attend", others] += kernel * len(block.paths)
    return [
        {
            "place": path,
            "others": others,
            "seconds": accumulation * seconds,
            "share": seconds / total,
        }
        for (path, others), seconds in seconds_of.most_common(count)
    ]


def expense(
    time: Mapping[str, float], topology: Topology, steps: int, price: float
) -> dict[str, float]:
    """Hours and chip-hours of `steps` steps, and their cost if a chip-hour has a price."""
    hours = steps * time["step_s"] / SECONDS_PER_HOUR
    chip_hours = hours * topology.chips
    money = {"money": chip_hours * price} if price else {}
    return {"steps": steps, "hours": hours, "chip_hours": chip_hours} | money
