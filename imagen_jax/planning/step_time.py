"""Predicted time of a train step on TPUs.

The parts of a step:

    compute    the estimated time of every block (`block_costs`), times the number of identical
               blocks, times the number of accumulation steps
    gathers    parameter all-gathers along data and fsdp, by link bandwidth (`links`)
    reductions gradient reductions along data and fsdp (all-reduce and reduce-scatter)
    exposed    all other collectives, assumed not overlapped: halo exchanges and resharding of
               activations
    update     optimizer, EMA and logged norms (`block_costs.update_cost`)

    encoding   captions encoded in the training, with text.online (`online_plan`)

    step = max(compute, gathers) + reductions + exposed + update + encoding

The formula assumes that all-gathers are overlapped with compute and that gradient reductions are
not. Both were observed in steps of sr_256 compiled at the default level for v5e:16x16 and
v5p:4x4x8 (`overlap`, `plan --exact`): 99 % of the all-gather time was overlapped, and none of the
gradient-reduction time. If gradient reductions were overlapped as well, a step would take
max(compute, gathers + reductions) + exposed + update.

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
    """{shape: number of parameters whose shard on one chip has this shape}."""
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
    encoding: float = 0.0,
) -> dict[str, Any]:
    """The time of a step and of its parts (see the docstring of this module).

    Args:
        program: the train step.
        topology: the hardware.
        flops: model FLOPs per step and chip.
        blocks: costs of all blocks.
        update: seconds of the parameter update.
        traffic: the collectives of a step.
        encoding: seconds of encoding the captions of a batch.

    Returns a dict with

        step_s, compute_s, gathers_s, exposed_traffic_s, update_s   see the module docstring
        encode_s                    the encoding, if there is any
        sums_s                      the reductions of the module docstring
        at_best_s                   the step if gradient reductions were overlapped as well
        in_turn_s                   the step if nothing were overlapped
        mfu                         model FLOPs over peak FLOPs
        images_per_s_per_chip       throughput
        kinds_s                     compute_s, split by kind of instruction
        roofline_share_of_compute   share of compute_s for which the compiler has no estimate
    """
    micro_batches = program.accumulation
    compute = micro_batches * sum(block.seconds * len(block.paths) for block in blocks)
    gathers, reductions, exposed = (
        sum(t.seconds for t in collectives) for collectives in _by_purpose(traffic)
    )
    rest = exposed + update + encoding
    step = max(compute, gathers) + reductions + rest
    images = next(iter(program.batch.values())).shape[0]
    kinds = Counter()
    for block in blocks:
        calls = micro_batches * len(block.paths)
        kinds.update({kind: calls * seconds for kind, seconds in block.kinds.items()})
    unestimated = micro_batches * sum(block.unestimated * len(block.paths) for block in blocks)
    return {
        "step_s": step,
        "compute_s": compute,
        "gathers_s": gathers,
        "sums_s": reductions,
        "exposed_traffic_s": exposed,
        "update_s": update,
        "at_best_s": max(compute, gathers + reductions) + rest,
        "in_turn_s": compute + gathers + reductions + rest,
        "mfu": flops / topology.chip.peak_flops / step,
        "images_per_s_per_chip": images / step / topology.chips,
        "kinds_s": dict(kinds.most_common()),
        "roofline_share_of_compute": unestimated / compute,
    } | ({"encode_s": encoding} if encoding else {})


def blocks_bytes(program: TrainProgram, blocks: Sequence[BlockCost]) -> float:
    """Memory traffic of all blocks in a step, in bytes per chip."""
    return program.accumulation * sum(block.bytes * len(block.paths) for block in blocks)


def memory_traffic(topology: Topology, size: float) -> dict[str, float]:
    """A step's memory traffic per chip in bytes, and its time at full bandwidth in seconds.

    size: the traffic in bytes.
    """
    return {"bytes": size, "seconds": size / topology.chip.memory_bandwidth}


def check(module: hlo.Module, topology: Topology, time: Mapping[str, Any]) -> dict[str, float]:
    """Compares the sum of the blocks with a whole step compiled at the default level.

    Returns {"whole_s", "parts_s"}, both without collectives and kernels. "parts_s" is the time of
    the blocks and of the separately compiled update. Only the whole step contains the loss, the
    noise, resampling and the update as fused by the compiler.
    """
    whole = sum(item.seconds for item in cost.items(module, topology.chip))
    kernels = time["kinds_s"].get(cost.KERNEL, 0.0)
    return {"whole_s": whole, "parts_s": time["compute_s"] - kernels + time["update_s"]}


def overlap(traffic: Sequence[whole_step.Traffic]) -> dict[str, float]:
    """Shares of all-gather and of gradient-reduction time that are overlapped with compute.

    traffic: the collectives of a step compiled at the default level.
    """
    gathers, reductions, _ = _by_purpose(traffic)

    def share(collectives: Sequence[whole_step.Traffic]) -> float:
        seconds = sum(t.seconds for t in collectives)
        return sum(t.overlapped for t in collectives) / max(seconds, 1e-12)

    return {"gathers_beside": share(gathers), "sums_beside": share(reductions)}


def _by_purpose(
    traffic: Sequence[whole_step.Traffic],
) -> tuple[list[whole_step.Traffic], list[whole_step.Traffic], list[whole_step.Traffic]]:
    """(parameter all-gathers, gradient reductions, all other collectives)."""
    along_batch = [t for t in traffic if set(t.axes) <= set(sharding.BATCH_AXES)]
    gathers = [t for t in along_batch if t.kind == "all-gather"]
    reductions = [t for t in along_batch if t.kind in ("reduce-scatter", "all-reduce")]
    return gathers, reductions, [t for t in traffic if t not in [*gathers, *reductions]]


def expensive_modules(blocks: Sequence[BlockCost], accumulation: int) -> list[dict[str, Any]]:
    """The modules with the most compute time. Identical modules of identical blocks are merged.

    Returns dicts with "place" (module path), "others" (number of further identical modules),
    "seconds" per step and "share" of the compute time.
    """
    total = sum(block.seconds * len(block.paths) for block in blocks)
    seconds_of: Counter[tuple[str, int]] = Counter()
    for block in blocks:
        block_path, others = block.paths[0], len(block.paths) - 1
        for module, seconds in block.inside.items():
            # Forward paths start with the class name; backward paths do not.
            submodule = module.partition("/")[2] if module[:1].isupper() else module
            path = "/".join(filter(None, (block_path, submodule)))
            seconds_of[path, others] += seconds * len(block.paths)
        if kernel := block.kinds.get(cost.KERNEL):
            seconds_of[f"{block_path}/attend", others] += kernel * len(block.paths)
    return [
        {
            "place": path,
            "others": others,
            "seconds": accumulation * seconds,
            "share": seconds / total,
        }
        for (path, others), seconds in seconds_of.most_common(MODULES_LISTED)
    ]


def expense(
    time: Mapping[str, float], topology: Topology, steps: int, price: float
) -> dict[str, float]:
    """Hours and chip-hours of `steps` steps, and their cost if a chip-hour has a price."""
    hours = steps * time["step_s"] / SECONDS_PER_HOUR
    chip_hours = hours * topology.chips
    cost_entry = {"money": chip_hours * price} if price else {}
    return {"steps": steps, "hours": hours, "chip_hours": chip_hours} | cost_entry
