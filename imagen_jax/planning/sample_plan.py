"""The plan of a cascade: memory of each stage, images per second, and the cost of N pictures."""

import concurrent.futures
import dataclasses
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from imagen_jax import cascade, sampling_parameters, schema, sharding, stage_sizes
from imagen_jax.hardware.topology import Topology
from imagen_jax.planning import encoder_plan, sample_cost, whole_step
from imagen_jax.planning.compile_pool import compile_pool
from imagen_jax.planning.sample_report import encoder_rows
from imagen_jax.planning.step_time import SECONDS_PER_HOUR
from imagen_jax.row_batches import rows_per_batch
from imagen_jax.stage import Stage, check_interval, check_sampling, create_stage
from imagen_jax.stage_sizes import Size
from imagen_jax.storage import check_object
from imagen_jax.text import feature_file
from imagen_jax.text.encoder_list import parse_encoders
from imagen_jax.text_inputs import UNNAMED, longest_input
from imagen_jax.weights import exports
from imagen_jax.weights.checkpoint import META, opened
from imagen_jax.weights.leaves import read_document

log = logging.getLogger("imagen_jax.plan")


@dataclasses.dataclass(frozen=True)
class Options:
    """The contents of a plan.

    Fields:
        cache: directory of cached costs.
        processes: number of programs to compile at once.
        pictures: number of pictures to report hours for.
        time: predict times; on TPUs this compiles at the compiler's default level, not at O0.
        price: price of a chip-hour, or 0.
        size: of the pictures of the last stage; None for squares.
    """

    cache: Path
    processes: int
    pictures: int
    time: bool
    price: float
    size: Size | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """One stage of the planned cascade.

    Fields:
        name: the section of the cascade config, such as "sr_1".
        source: the checkpoint or the config file that describes its network.
        config: the stage's complete config.
        sampling: the section `sampling` of the cascade config.
        stage: created for the mesh.
        params, shardings: the parameters as shapes, and their shardings on the mesh.
        size: of the pictures.
    """

    name: str
    source: str
    config: Mapping[str, Any]
    sampling: Mapping[str, Any]
    stage: Stage
    params: Any
    shardings: Any
    size: Size

    @property
    def bytes(self) -> int:
        """The parameters on one device."""
        return sampling_parameters.bytes_per_device(self.params, self.shardings)


def checkpoint_config(path: str) -> dict[str, Any]:
    """The training config in a checkpoint or an export. Raises as `checkpoint.load_params`."""
    file = Path(cascade.resolve(path)).absolute()
    if file.is_file():
        meta = exports.read_export(file)[1]
    else:
        with opened(file) as directory:
            meta = read_document(directory / META)["meta"]
    check_object(path, meta, {"config": dict}, "use a checkpoint of imagen_jax.train")
    return schema.complete(meta["config"], f"config of {path}")


def find_parts(
    config: Mapping[str, Any],
    mesh: Any,
    read_config: Callable[[str], dict[str, Any]],
    size: Size | None = None,
) -> list[Part]:
    """The stages of a complete cascade config, up to the first one without a network.

    read_config: the value of a field `config` -> the stage's complete config. size: of the pictures
    of the last stage; None for squares. Raises ValueError if the first stage has no network, sizes
    of consecutive stages differ, or a stage cannot draw at `size`.
    """
    parts: list[Part] = []
    for name in cascade.STAGES:
        section = config[name]
        source = section["checkpoint"] or section["config"]
        if not source:
            break
        read = checkpoint_config if section["checkpoint"] else read_config
        parts.append(_part(name, source, read(source), section["sampling"], mesh))
    if not parts:
        raise ValueError(
            f"stage {cascade.STAGES[0]} has neither a checkpoint nor a config: give"
            f" --config.{cascade.STAGES[0]}.checkpoint=PATH or"
            f" --config.{cascade.STAGES[0]}.config=FILE"
        )
    sizes = [0, *(part.stage.image_size for part in parts)]
    for part, given in zip(parts, sizes):
        if part.stage.lowres_size != given:
            raise ValueError(
                f"{part.name}: {part.source} expects low-res images of {part.stage.lowres_size}"
                f" pixels, but gets {given}: give stages of one cascade"
            )
    sizes = stage_sizes.of_stages([part.stage for part in parts], size)
    return [dataclasses.replace(part, size=own) for part, own in zip(parts, sizes)]


def _part(
    name: str, source: str, config: Mapping[str, Any], sampling: Mapping[str, Any], mesh: Any
) -> Part:
    check_sampling(sampling)
    stage = create_stage(config, mesh)
    if stage.reads_text:
        check_interval(sampling, stage.schedule)
    size = stage_sizes.square(stage.image_size)
    params, _ = whole_step.sampling_inputs(stage, 1, size)
    shardings = sampling_parameters.parameter_shardings(params, mesh, config["mesh"])
    return Part(name, source, config, sampling, stage, params, shardings, size)


def plan_cascade(
    config: Mapping[str, Any],
    topology: Topology,
    options: Options,
    read_config: Callable[[str], dict[str, Any]],
) -> dict[str, Any]:
    """The plan of sampling with a complete cascade config on a topology.

    read_config: see `find_parts`.
    """
    mesh = sharding.make_mesh(config["mesh"], topology.devices())
    parts = find_parts(config, mesh, read_config, options.size)
    rows = rows_per_batch(config["batch_size"], mesh)
    limit = int(topology.chip.memory_limit)
    parameters = sum(part.bytes for part in parts)
    resident = len(parts) == 1 or parameters <= cascade.RESIDENT_SHARE * limit
    options.cache.mkdir(parents=True, exist_ok=True)
    plan = {
        "topology": str(topology),
        "chip": topology.chip.name,
        "platform": topology.chip.platform,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "batch": rows,
        "pictures": options.pictures,
        "level": _level(topology, options.time),
        "limit": limit,
        "resident": resident,
        "parameters": parameters,
        "stages": [None] * len(parts),
    }
    encoders = encoder_memories(config, parts, topology, str(options.cache))
    plan["encoder"], plan["encoders"] = encoders.pop(UNNAMED, None), encoders
    for i, compiled, kernel in compiled_stages(parts, mesh, topology, rows, options):
        part = parts[i]
        others = parameters - part.bytes if resident else 0
        row = describe(part, mesh, rows, compiled["peak"], others, limit)
        if options.time and compiled["guided"]:
            share = row["guided"] / row["evaluations"]
            flops = row["flops_per_image"] * rows / topology.chips
            row["time"] = sample_cost.batch_time(compiled, kernel, share, flops, topology.chip)
            row["cost"] = cost_of(row["time"]["seconds"], rows, topology, options)
        plan["stages"][i] = row
        log.info("%s: %.2f GiB per chip", part.name, row["peak"] / 2**30)
    if all("time" in row for row in plan["stages"]):
        seconds = sum(row["time"]["seconds"] for row in plan["stages"])
        plan["cost"] = cost_of(seconds, rows, topology, options)
    return plan


def fits(plan: Mapping[str, Any]) -> bool:
    """Whether every stage and the text encoder fit."""
    return all(row["fits"] for row in [*plan["stages"], *encoder_rows(plan)])


def _level(topology: Topology, time: bool) -> str:
    return whole_step.optimization_level(topology, exact=time)


def compiled_stages(
    parts: Sequence[Part], mesh: Any, topology: Topology, rows: int, options: Options
) -> Iterator[tuple[int, dict[str, Any], tuple[float, float]]]:
    """Yields (index of a stage, `sample_cost.compiled_cost`, `sample_cost.kernel_seconds`).

    Stages are compiled in parallel, and come in the order of completion.
    """
    cache, level = str(options.cache), _level(topology, options.time)
    reduced, sizes, batch = sample_cost.smallest(topology, mesh.shape, rows)
    name = str(reduced)
    requests = [
        json.dumps(
            {
                "config": part.config,
                "sampling": part.sampling,
                "mesh": sizes,
                "rows": batch,
                "index": cascade.STAGES.index(part.name),
                "size": part.size,
            }
        )
        for part in parts
    ]
    with_kernels = options.time and topology.chip.platform == "tpu"
    with (
        tempfile.TemporaryDirectory(prefix="schedules") as schedules,
        compile_pool(min(options.processes, len(parts))) as pool,
        compile_pool(1, schedules) as kernel_pool,
    ):
        for part in parts:
            log.info("%s (%s): compiling the sampling program", part.name, part.config["name"])
        tasks = {
            pool.submit(sample_cost.compiled_cost, request, name, level, cache): i
            for i, request in enumerate(requests)
        }
        kernels = [
            kernel_pool.submit(sample_cost.kernel_seconds, request, name, cache)
            for request in (requests if with_kernels else ())
        ]
        for done in concurrent.futures.as_completed(tasks):
            i = tasks[done]
            yield i, done.result(), kernels[i].result() if with_kernels else (0.0, 0.0)


def describe(
    part: Part, mesh: Any, rows: int, peak: int, others: int, limit: int
) -> dict[str, Any]:
    """The part of a stage's plan that needs no times.

    Args:
        part: the stage.
        mesh: the mesh.
        rows: images per batch.
        peak: the compiler's peak in bytes per device.
        others: bytes per device of the parameters of the other stages that stay on the devices.
        limit: bytes per device that a program may use.
    """
    count, guided = sample_cost.evaluations(part.sampling, part.stage)
    flops = sample_cost.evaluation_flops(part.config, part.size) * (count + guided)
    return {
        "stage": part.name,
        "name": part.stage.name,
        "source": part.source,
        "size": list(part.size),
        "method": part.sampling["method"],
        "steps": part.sampling["steps"],
        "evaluations": count,
        "guided": guided,
        "flops_per_image": flops,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(part.params)),
        "parameter_bytes": part.bytes,
        "other_parameters": others,
        "peak": peak + others,
        "fits": peak + others <= limit,
        "largest_batch": largest_batch(peak, part.bytes, others, limit, rows, mesh),
    }


def largest_batch(peak: int, parameters: int, others: int, limit: int, rows: int, mesh: Any) -> int:
    """About the largest batch that fits, 0 if none does.

    It assumes that everything but the parameters grows with the number of rows per device.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    per_row = max(1, peak - parameters) / (rows // shards)
    return max(0, math.floor((limit - others - parameters) / per_row)) * shards


def cost_of(seconds: float, rows: int, topology: Topology, options: Options) -> dict[str, float]:
    """Throughput, and the cost of all pictures, from the time of a batch.

    The last batch is padded, so it takes as long as the others.
    """
    hours = math.ceil(options.pictures / rows) * seconds / SECONDS_PER_HOUR
    chip_hours = hours * topology.chips
    money = {"money": chip_hours * options.price} if options.price else {}
    rate = {"images_per_s_per_chip": rows / seconds / topology.chips}
    return rate | {"hours": hours, "chip_hours": chip_hours} | money


def encoder_memories(
    config: Mapping[str, Any], parts: Sequence[Part], topology: Topology, cache: str
) -> dict[str, dict[str, Any]]:
    """{name of a text encoder: its memory}, without encoders of unknown sizes.

    One is on the devices at a time. cache: directory of cached costs.
    """
    inputs = [text_input for part in parts for text_input in part.stage.texts]
    given, rows = parse_encoders(config["encoder"]), {}
    for name, encoder in given.items():
        length = longest_input(name, inputs, given)
        row = encoder_memory(dict(config) | {"encoder": encoder}, topology, length, cache)
        rows |= {name: row} if row else {}
    return rows


def encoder_memory(
    config: Mapping[str, Any], topology: Topology, length: int, cache: str
) -> dict[str, Any] | None:
    """Memory of encoding a batch of prompts; None if the encoder's sizes are unknown here.

    config: with one `encoder`.
    length: tokens per prompt, the longest that the stages accept.
    cache: directory of cached costs.
    """
    name, dtype = config["encoder"], config["encoder_dtype"]
    rows = feature_file.texts_per_device(config["batch_size"], topology.chips)
    network = encoder_plan.known_network(name, dtype)
    if network is None:
        log.warning("the sizes of the text encoder %s are unknown; it is not planned", name)
        return None
    log.info("compiling the text encoder %s", name)
    length = min(length, network.config.max_length or length)
    memory = encoder_plan.memory(network, topology, dtype, rows, length, cache)
    return {"name": name, "tokens": length, "rows": rows} | memory
