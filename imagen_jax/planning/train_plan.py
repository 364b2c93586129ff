"""The plan of a training run: memory, FLOPs, communication, step time, sampler and cost."""

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from imagen_jax import sharding, stage_sizes
from imagen_jax.hardware.topology import Topology
from imagen_jax.planning import (
    advice,
    block_costs,
    cost,
    online_plan,
    plan_report,
    step_time,
    text_costs,
    whole_step,
)
from imagen_jax.stage import create_stage
from imagen_jax.text_inputs import text_inputs
from imagen_jax.training.step import TrainProgram, forward_flops

HOPELESS = 1.5  # advice whose estimate is above this multiple of the limit is not compiled
log = logging.getLogger("imagen_jax.plan")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a plan includes.

    Fields:
        cache: directory of cached block costs.
        processes: number of blocks to compile at once.
        exact: compile at the compiler's default level.
        time: predict the step time (TPUs only).
        sampler: compile the sampler as well.
        search: compile the advised configs until one fits.
        price: price of a chip-hour, or 0.
        captions: numbers of captions for which stored text features and text.online are compared.
        caption_tokens: their mean length in tokens.
        encoders: text encoders of the comparison, as in `text.online_encoder`, or "" for those of
            the config.
    """

    cache: Path
    processes: int
    exact: bool
    time: bool
    sampler: bool
    search: bool
    price: float
    captions: tuple[int, ...] = ()
    caption_tokens: float = 0.0
    encoders: str = ""


def plan_training(
    config: Mapping[str, Any], topology: Topology, options: Options
) -> dict[str, Any]:
    """The plan of a config on a topology.

    If it does not fit, the plan includes advice. With `search`, the advised configs are compiled in
    turn, and the result is the plan of the first that fits.
    """
    plan = examine(config, topology, options)
    if fits(plan):
        return plan
    limit = plan["memory"]["limit"]
    tried: list[dict[str, Any]] = []
    # The estimates are made once, for the search and for the report.
    to_try, to_report = itertools.tee(advice.advice(config, topology, plan))
    for row in to_try if options.search else ():
        if row["estimated_peak"] > HOPELESS * limit:
            continue
        log.info("trying %s", plan_report.options(row["overrides"]))
        other = examine(advice.overridden(config, row["overrides"]), topology, options)
        tried.append(row | {"peak": needed(other)})
        if fits(other):
            requested = plan["memory"] | {"fits": False, "peak": needed(plan)}
            return other | {"overrides": row["overrides"], "tried": tried, "asked": requested}
    return plan | {"advice": advice.up_to_first_that_fits(to_report, limit), "tried": tried}


def fits(plan: Mapping[str, Any]) -> bool:
    """Whether a run fits: its train step, and its sampler if it samples grids."""
    return plan["memory"]["fits"] and plan.get("sampler", plan["memory"])["fits"]


def needed(plan: Mapping[str, Any]) -> int:
    """The memory that a run needs, in bytes per chip."""
    return max(plan["memory"]["peak"], plan.get("sampler", plan["memory"])["peak"])


def examine(config: Mapping[str, Any], topology: Topology, options: Options) -> dict[str, Any]:
    """The plan of one config: memory first; if it fits, communication, time and sampler."""
    encoders = text_encoders(config, options)
    program = whole_step.make_program(config, topology)
    with_times = options.time and topology.chip.platform == "tpu"
    if with_times:
        block_costs.check_columns(config, topology)
    log.info(
        "%s on %s: compiling the whole step for %d chips", config["name"], topology, topology.chips
    )
    memory, module = whole_step.step_memory(program, topology, options.exact)
    plan = describe(config, topology, program, memory, options.exact)
    online = encode(config, topology, program, encoders, options) if encoders else {}
    if config["text"]["online"]:
        plan["online"] = online
        plan["memory"] = online_plan.with_encoders(plan["memory"], online)
    if module is None:
        return plan
    traffic = whole_step.traffic(module, program, topology)
    plan["collectives"] = [dataclasses.asdict(row) for row in traffic]
    if with_times:
        plan |= times(config, topology, program, plan, traffic, options)
        if options.exact:
            check = step_time.check(module, topology, plan["time"])
            plan["check"] = check | step_time.overlap(traffic)
    elif topology.chip.platform != "tpu":
        plan["memory_traffic"] = step_time.memory_traffic(topology, cost.memory_bytes(module))
    if options.captions:
        plan["text_costs"] = compare_text(config, topology, encoders, online, plan, options)
    if options.sampler and config["train"]["sample_every"]:
        plan["sampler"] = sampler(config, topology, program, plan["memory"]["parts"], options.exact)
    if options.sampler and program.stage.train_size != program.stage.image_size:
        plan["whole_images"] = whole_images(config, topology, program, options.exact)
    return plan


def text_encoders(config: Mapping[str, Any], options: Options) -> list[online_plan.Encoder]:
    """The text encoders to plan: of a config with text.online, or of a comparison.

    Raises ValueError if a comparison lacks an encoder or its sizes, see also
    `online_plan.find_encoders`.
    """
    if not (config["text"]["online"] or options.captions):
        return []
    given = options.encoders or config["text"]["online_encoder"]
    if options.captions and not text_inputs(config):
        raise ValueError(f"--captions is for a stage with text; {config['name']} has none")
    if options.captions and not given:
        raise ValueError(
            "--captions needs the text encoder of the stage: give --text_encoder NAME, such as xxl"
        )
    encoders = online_plan.find_encoders(config, given)
    unknown = [encoder.given for encoder in encoders if encoder.network is None]
    if options.captions and unknown:
        raise ValueError(
            f"--captions: the sizes of the text encoder {unknown[0]} are unknown; give a directory"
            " with its config.json"
        )
    return encoders


def encode(
    config: Mapping[str, Any],
    topology: Topology,
    program: TrainProgram,
    encoders: list[online_plan.Encoder],
    options: Options,
) -> dict[str, Any]:
    """`online_plan.plan_online` of a batch on the mesh of the training."""
    rows, cache = config["data"]["batch_size"], str(options.cache)
    return online_plan.plan_online(encoders, topology, program.mesh, rows, cache)


def compare_text(
    config: Mapping[str, Any],
    topology: Topology,
    encoders: list[online_plan.Encoder],
    online: Mapping[str, Any],
    plan: Mapping[str, Any],
    options: Options,
) -> dict[str, Any]:
    """`text_costs.compare` with the step time of a plan, if it has one."""
    time = plan.get("time")
    step = time["step_s"] - time.get("encode_s", 0.0) if time else None
    tokens, cache = options.caption_tokens, str(options.cache)
    return text_costs.compare(
        config, topology, encoders, online, options.captions, tokens, step, cache, options.price
    )


def times(
    config: Mapping[str, Any],
    topology: Topology,
    program: TrainProgram,
    plan: Mapping[str, Any],
    traffic: list[whole_step.Traffic],
    options: Options,
) -> dict[str, Any]:
    """The predicted times of a plan: "memory_traffic", "time", "places" and "cost".

    plan: with the "flops" of a step, and "online" for encoders that run in the training.
    """
    blocks = []
    for block in block_costs.block_costs(config, topology, options.cache, options.processes):
        blocks.append(block)
        log.info(
            "%2d  %-28s %8.2f ms, %3.0f %% of peak FLOP/s",
            len(blocks),
            block.paths[0],
            1e3 * block.seconds,
            100 * block.flops / block.seconds / topology.chip.peak_flops,
        )
    blocks.sort(key=lambda block: block.paths)  # they arrive in the order of completion
    log.info("parameter update: optimizer and EMA, one compilation per shape")
    shapes = step_time.shapes_on_a_chip(program)
    update, update_bytes = block_costs.update_cost(
        config, topology, shapes, options.cache, options.processes
    )
    flops = plan["flops"]["per_chip_and_step"]
    encoding = plan["online"]["seconds"] if "online" in plan else 0.0
    time = step_time.predict(program, topology, flops, blocks, update, traffic, encoding)
    steps = config["train"]["steps"]
    size = step_time.blocks_bytes(program, blocks) + update_bytes
    return {
        "memory_traffic": step_time.memory_traffic(topology, size),
        "time": time,
        "places": step_time.expensive_modules(blocks, program.accumulation),
        "cost": step_time.expense(time, topology, steps, options.price),
    }


def describe(
    config: Mapping[str, Any],
    topology: Topology,
    program: TrainProgram,
    memory: whole_step.Memory,
    exact: bool,
) -> dict[str, Any]:
    """The part of a plan that needs no compiled text: sizes, FLOPs and memory.

    Memory, FLOPs and times of a plan are those of the step on the images with the most pixels.
    """
    stage = create_stage(config)
    flops = 3 * forward_flops(stage, stage.largest_bucket)
    images = config["data"]["batch_size"]
    mesh = config["mesh"]
    return {
        "config": config["name"],
        "topology": str(topology),
        "chip": topology.chip.name,
        "platform": topology.chip.platform,
        "chips": topology.chips,
        "mesh": dict(program.mesh.shape),
        "batch": images,
        "buckets": [stage_sizes.size_text(bucket) for bucket in stage.buckets],
        "planned_size": stage_sizes.size_text(stage.largest_bucket),
        "accumulation": program.accumulation,
        "remat": config["model"]["remat"],
        "not_split": sharding.badly_split(
            program.abstract.params, program.mesh, mesh["rules"], mesh["fsdp_min_elements"]
        ),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params)),
        "flops": {
            "per_image": flops,
            "per_step": flops * images,
            "per_chip_and_step": flops * images / topology.chips,
        },
        "memory": {
            "fits": memory.fits,
            "peak": memory.peak,
            "limit": memory.limit,
            "level": whole_step.optimization_level(topology, exact),
            "parts": memory.parts | {"temporaries": memory.temporaries},
        },
    }


def sampler(
    config: Mapping[str, Any],
    topology: Topology,
    program: TrainProgram,
    parts: Mapping[str, int],
    exact: bool,
) -> dict[str, Any]:
    """The memory for sampling a grid during training, in bytes per chip.

    "beside": the parameters, optimizer state, batch, EMA tracks and text encoders of the training,
    which stay in memory. "peak": the peak of the sampler plus "beside".
    """
    rows = config["train"]["sample_rows"]
    log.info("compiling the sampler for a grid of %d images", rows)
    lowered = whole_step.lower_sampler(program, rows)
    _, sampler_peak = whole_step.compile_text(lowered, topology, exact)
    resident = ("parameters", "optimizer", "batch", "EMA tracks", online_plan.WEIGHTS)
    training = sum(size for part, size in parts.items() if part in resident)
    peak = sampler_peak + training
    return {
        "rows": rows,
        "steps": config["sampling"]["steps"],
        "peak": peak,
        "beside": training,
        "fits": peak <= topology.chip.memory_limit,
    }


def whole_images(
    config: Mapping[str, Any], topology: Topology, program: TrainProgram, exact: bool
) -> dict[str, Any]:
    """The memory of sampling full-size images, for a stage that trains on crops.

    No training state is in memory then, so this does not affect whether the run fits.
    """
    size = program.stage.image_size
    log.info("compiling the sampler for full images of %d pixels", size)
    lowered = whole_step.lower_whole_images(config, program)
    _, peak = whole_step.compile_text(lowered, topology, exact)
    return {
        "size": size,
        "rows": program.mesh.shape["data"] * program.mesh.shape["fsdp"],
        "peak": peak,
        "fits": peak <= topology.chip.memory_limit,
    }
