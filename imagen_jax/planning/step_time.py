"""What a run will need and how fast it will be on given hardware, before anything runs: the numbers
that `imagen_jax.plan` reports.

How a step's time is put together, on TPUs:

    compute     every block's own estimate (`block_costs`), times where it stands, times the parts the batch is accumulated in
    gathers     of parameters along data and fsdp, by link bandwidth; they run beside the compute as far as it lasts
    sums        of gradients along data and fsdp; in turn with the compute
    exposed     every other collective: halos, resharded activations; in turn
    update      optimizer, EMA and recorded norms: the compiler's estimate for each shape of parameter, times how many have it

    step = max(compute, gathers) + sums + exposed + update

What runs beside what is read from steps of sr_256 compiled at the default level for v5e:16x16 and
v5p:4x4x8 (`schedule`, `plan --exact`): operations that compute carry 99 % of the gathers, no sum.
At best, had the compiler hidden the sums too, a step takes max(compute, gathers + sums) + exposed +
update.

On GPUs there are no estimates of operations, and only memory, FLOPs and traffic are reported.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from imagen_jax import sharding
from imagen_jax.hardware.topology import Topology
from imagen_jax.models.remat import KINDS as REMAT_KINDS
from imagen_jax.planning import block_costs, cost, hlo, whole_step
from imagen_jax.planning.block_costs import BlockCost
from imagen_jax.training.step import TrainProgram

PLACES = 10
SECONDS_PER_HOUR = 3600


def make_program(config: Mapping[str, Any], place: Topology) -> TrainProgram:
    """The train step of a config on a topology. Raises ValueError if it cannot be cut so."""
    return TrainProgram.create(config, sharding.make_mesh(config["mesh"], place.devices()))


def memory(
    program: TrainProgram, place: Topology, exact: bool
) -> tuple[whole_step.Memory, hlo.Module | None]:
    """What the train step needs on each device, and the compiled program if it fits."""
    text, peak = whole_step.compile_text(program.lower(), place, exact)
    parts = whole_step.state_parts(program)
    held = sum(parts.values()) - parts["activations"]
    parts["activations"] = min(parts["activations"], max(0, peak - held))
    found = whole_step.Memory(peak, int(place.chip.memory_limit), parts)
    return found, hlo.parse(text) if text and found.fits else None


def shapes_on_a_chip(program: TrainProgram) -> Counter[tuple[int, ...]]:
    """The shapes that a device holds of the parameters, and how many of each."""
    return Counter(
        leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(program.abstract.params)
    )


def predict(
    program: TrainProgram,
    place: Topology,
    flops: float,
    blocks: Sequence[BlockCost],
    update: float,
    traffic: Sequence[whole_step.Traffic],
) -> dict[str, Any]:
    """From the FLOPs of a step on a chip and the seconds of its update: {"step_s", its parts,
    "mfu", "images_per_s_per_chip", "kinds", "roofline_share"}; see the head of this file.
    """
    times = program.accumulation
    compute = times * sum(block.seconds * len(block.places) for block in blocks)
    gathers, sums, exposed = (sum(t.seconds for t in rows) for rows in _by_purpose(traffic))
    step = max(compute, gathers) + sums + exposed + update
    images = next(iter(program.batch.values())).shape[0]
    kinds = Counter()
    for block in blocks:
        kinds.update(
            {kind: times * len(block.places) * seconds for kind, seconds in block.kinds.items()}
        )
    unestimated = times * sum(block.unestimated * len(block.places) for block in blocks)
    return {
        "step_s": step,
        "compute_s": compute,
        "gathers_s": gathers,
        "sums_s": sums,
        "exposed_traffic_s": exposed,
        "update_s": update,
        "at_best_s": max(compute, gathers + sums) + exposed + update,
        "in_turn_s": compute + gathers + sums + exposed + update,
        "mfu": flops / place.chip.peak_flops / step,
        "images_per_s_per_chip": images / step / place.chips,
        "kinds_s": dict(kinds.most_common()),
        "roofline_share_of_compute": unestimated / compute,
    }


def blocks_bytes(program: TrainProgram, blocks: Sequence[BlockCost]) -> float:
    """What the blocks of a step read and write in a chip's memory."""
    return program.accumulation * sum(block.bytes * len(block.places) for block in blocks)


def memory_traffic(place: Topology, size: float) -> dict[str, float]:
    """Bytes that a step reads and writes in a chip's memory, and the seconds that they take at its
    full bandwidth.
    """
    return {"bytes": size, "seconds": size / place.chip.memory_bandwidth}


def check(module: hlo.Module, place: Topology, time: Mapping[str, Any]) -> dict[str, float]:
    """Blocks added up against the whole step that was compiled at the default level: {"whole_s",
    "parts_s"}, both without collectives and kernels.

    The whole step has what no block has: the loss, noise, resampling, and the update as the
    compiler fuses it.
    """
    whole = sum(item.seconds for item in cost.items(module, place.chip))
    return {
        "whole_s": whole,
        "parts_s": time["compute_s"] - time["kinds_s"].get(cost.KERNEL, 0.0) + time["update_s"],
    }


def schedule(traffic: Sequence[whole_step.Traffic]) -> dict[str, float]:
    """Of gathers of parameters and sums of gradients in a step compiled at the default level: the
    share of the seconds that runs beside what computes.
    """
    gathers, sums, _ = _by_purpose(traffic)
    share = lambda rows: sum(t.beside for t in rows) / max(sum(t.seconds for t in rows), 1e-12)
    return {"gathers_beside": share(gathers), "sums_beside": share(sums)}


def _by_purpose(
    traffic: Sequence[whole_step.Traffic],
) -> tuple[list[whole_step.Traffic], list[whole_step.Traffic], list[whole_step.Traffic]]:
    """(gathers of parameters, sums of gradients, the rest)."""
    along_batch = [t for t in traffic if set(t.axes) <= set(sharding.BATCH_AXES)]
    gathers = [t for t in along_batch if t.kind == "all-gather"]
    sums = [t for t in along_batch if t.kind in ("reduce-scatter", "all-reduce")]
    return gathers, sums, [t for t in traffic if t not in gathers and t not in sums]


def places(blocks: Sequence[BlockCost], times: int, count: int = PLACES) -> list[dict[str, Any]]:
    """The places that cost most, in the model's names; equal blocks together: {"place", "others":
    how many more, "seconds", "share" of compute}.
    """
    total = sum(block.seconds * len(block.places) for block in blocks)
    found: Counter[tuple[str, int]] = Counter()
    for block in blocks:
        for inside, seconds in block.inside.items():
            own = (
                inside.partition("/")[2] if inside[:1].isupper() else inside
            )  # the backward pass has no class name before it
            found["/".join(filter(None, (block.places[0], own))), len(block.places) - 1] += (
                seconds * len(block.places)
            )
        if kernel := block.kinds.get("kernel"):
            found[f"{block.places[0]}/attend", len(block.places) - 1] += kernel * len(block.places)
    return [
        {"place": place, "others": others, "seconds": times * s, "share": s / total}
        for (place, others), s in found.most_common(count)
    ]


def expense(
    time: Mapping[str, float], place: Topology, steps: int, price: float
) -> dict[str, float]:
    """Hours and chip-hours of the config's steps, and money if a chip-hour has a price."""
    hours = steps * time["step_s"] / SECONDS_PER_HOUR
    return {"steps": steps, "hours": hours, "chip_hours": hours * place.chips} | (
        {"money": hours * place.chips * price} if price else {}
    )


def alternatives(config: Mapping[str, Any], place: Topology) -> list[dict[str, Any]]:
    """Overrides that need less memory, in the order to try them: first what costs least speed.

    More recomputation; state over more chips, whose gathers run beside the compute; the batch in
    parts, which adds no traffic that nothing hides; image height over chips, which does; half the
    batch, which is another training.
    """
    model, optim, rows = config["model"], config["optim"], config["data"]["batch_size"]
    sizes = block_costs.mesh_sizes(config, place)
    at = REMAT_KINDS.index(model["remat"])
    remat = {"model.remat": REMAT_KINDS[-1]} if at + 1 < len(REMAT_KINDS) else {}
    chips = sizes["data"] * sizes["fsdp"]
    slices = place.slices if place.chip.platform == "tpu" else 1
    more_fsdp = [
        sizes["fsdp"] * 2**i for i in range(1, 12) if chips // slices % (sizes["fsdp"] * 2**i) == 0
    ]
    fsdp = [remat | resized(config, sizes, fsdp=size) for size in more_fsdp]
    least = [remat, *fsdp[-1:]]  # what the rest is tried with
    parts = [optim["accumulation"] * 2**i for i in range(1, 8)]
    parts = [n for n in parts if rows % n == 0 and rows // n % chips == 0]
    splits = [
        n
        for n in (2, 4, 8)
        if sizes["spatial"] == 1 and chips // slices % n == 0 and rows % (chips // n) == 0
    ]
    found = [{"model.remat": kind} for kind in REMAT_KINDS[at + 1 :]] + fsdp
    found += [state | {"optim.accumulation": n} for n in parts for state in least]
    found += [
        remat
        | resized(config, sizes, spatial=n, fsdp=math.gcd(sizes["fsdp"], chips // slices // n))
        for n in splits
    ]
    return found + [
        state | {"data.batch_size": rows // n}
        for n in (2, 4, 8)
        if rows % (n * chips) == 0
        for state in least
    ]


def fewer_samples(config: Mapping[str, Any], shards: int) -> list[dict[str, int]]:
    """Overrides that draw a sample grid of fewer images on each of so many devices: half as many
    each time.
    """
    most, found = -(-config["train"]["sample_rows"] // shards), []
    while most > 1:
        most = -(-most // 2)
        found.append({"train.sample_rows": most * shards})
    return found


def resized(config: Mapping[str, Any], sizes: Mapping[str, int], **changed: int) -> dict[str, int]:
    """Overrides of a mesh of these sizes in which some are changed and `data` is what is left."""
    wanted = {**sizes, **changed, "data": -1}
    return {
        f"mesh.{axis}": size
        for axis, size in wanted.items()
        if axis in changed or (config["mesh"][axis] == -1) != (size == -1)
    }


def overridden(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config with fields replaced: {"mesh.fsdp": 32}."""
    out = {
        part: dict(value) if isinstance(value, Mapping) else value for part, value in config.items()
    }
    for field, value in overrides.items():
        part, name = field.split(".")
        out[part][name] = value
    return out
