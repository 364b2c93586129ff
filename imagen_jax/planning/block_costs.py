"""Estimates the time of each block of a train step, and of the parameter update, on TPUs.

The estimates are those of the TPU compiler. Compiling a whole step at the default level takes tens
of minutes; a block takes seconds. Each distinct block is compiled once, at the shapes that one chip
computes, several in parallel, and the result is cached.

The program of a block is its forward and backward pass, with the recomputation of `model.remat`, on
a mesh of the `model` and `spatial` axes only. Along `data` and `fsdp` all chips compute the same
program on different rows.
"""

import concurrent.futures
import dataclasses
import functools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagen_jax import sharding
from imagen_jax.hardware.topology import Topology, smallest_shape
from imagen_jax.hardware.topology import parse as parse_topology
from imagen_jax.planning import cost, hlo, kernels
from imagen_jax.planning.blocks import Block, block_program, find_blocks
from imagen_jax.planning.compile_pool import compile_pool
from imagen_jax.planning.cost_cache import cached
from imagen_jax.stage import Stage, create_stage
from imagen_jax.training.optim import learning_rate, make_optimizer
from imagen_jax.training.state import TrainState
from imagen_jax.training.step import make_update

MODULES_KEPT = 12  # number of modules per block in the report, the most expensive ones
# The cached fields of a compiled program, see `BlockCost`.
COST_FIELDS = {
    "seconds": float,
    "bytes": float,
    "kinds": dict,
    "unestimated": float,
    "inside": dict,
}


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """The cost of one call of a block on one chip, forward and backward.

    Fields:
        paths: module paths of all equal blocks.
        seconds: estimated time, Pallas kernels included, collectives excluded.
        flops: model FLOPs, three times those of the forward pass.
        bytes: HBM traffic, reads and writes.
        kinds: seconds by kind of instruction (`cost.Item.kind`).
        unestimated: the part of `seconds` from a roofline model, where the compiler gives no
            estimate.
        inside: seconds by module inside the block.
    """

    paths: tuple[str, ...]
    seconds: float
    flops: float
    bytes: float
    kinds: dict[str, float]
    unestimated: float
    inside: dict[str, float]


def resolved_mesh(config: Mapping[str, Any], topology: Topology) -> dict[str, int]:
    """The size of each mesh axis of a config on a topology. Raises as `sharding.mesh_sizes`."""
    slices = topology.slices if topology.chip.platform == "tpu" else 1
    return sharding.mesh_sizes(config["mesh"], topology.chips, slices)


def rows_per_chip(config: Mapping[str, Any], topology: Topology) -> int:
    """The number of images that one chip computes at once.

    This is the batch divided by data x fsdp and by the number of accumulation steps.
    """
    sizes = resolved_mesh(config, topology)
    shards = sizes["data"] * sizes["fsdp"]
    return config["data"]["batch_size"] // shards // config["optim"]["accumulation"]


def check_columns(config: Mapping[str, Any], topology: Topology) -> None:
    """Raises ValueError unless model x spatial divides the chips of the slice of a block.

    A block is compiled for the smallest slice with at least model x spatial chips. The
    compiler crashes on some other numbers of chips.
    """
    sizes = resolved_mesh(config, topology)
    columns = sizes["model"] * sizes["spatial"]
    chips = smallest(topology, columns).chips
    if chips % columns:
        raise ValueError(
            f"mesh.model x mesh.spatial = {columns} does not divide the {chips} chips of the"
            " smallest TPU slice that holds it, so step times cannot be predicted; use --notime for"
            " a plan without times"
        )


def block_mesh(topology: Topology, sizes: Mapping[str, int]) -> Mesh:
    """The submesh of the `model` and `spatial` axes, which computes one shard of the batch."""
    block_sizes = {"data": 1, "fsdp": 1, "model": sizes["model"], "spatial": sizes["spatial"]}
    chips = block_sizes["model"] * block_sizes["spatial"]
    return sharding.make_mesh(block_sizes, topology.devices()[:chips])


def smallest(topology: Topology, chips: int) -> Topology:
    """The smallest slice with at least `chips` chips and with inter-chip links (4 chips or more).

    A chip's program depends only on the chips that share its rows, not on the rest of the run.
    """
    shape = smallest_shape(topology.chip, max(4, chips))
    return dataclasses.replace(topology, shape=shape, slices=1)


def block_costs(
    config: Mapping[str, Any], topology: Topology, cache: Path, processes: int
) -> Iterator[BlockCost]:
    """Yields the cost of every block of a config's train step, in the order of completion.

    Args:
        config: the config of a stage.
        topology: the hardware.
        cache: directory of cached costs; blocks that are in it are not compiled again.
        processes: number of blocks that are compiled at once; each needs 2 to 4 GB.

    Raises ValueError as `resolved_mesh` and `create_stage` do.
    """
    stage = create_stage(config)
    rows = rows_per_chip(config, topology)
    count = len(find_blocks(stage, rows))
    cache.mkdir(parents=True, exist_ok=True)
    sizes = resolved_mesh(config, topology)
    # Resolve -1 for the whole run; on the smaller slice it would give other sizes.
    resolved = {**config, "mesh": {**config["mesh"], **sizes}}
    block_topology = smallest(topology, sizes["model"] * sizes["spatial"])
    arguments = (json.dumps(resolved), str(block_topology), rows)
    with (
        tempfile.TemporaryDirectory(prefix="schedules") as schedules,
        compile_pool(processes) as pool,
        compile_pool(1, schedules) as kernel_pool,
    ):
        costs = {pool.submit(_cost_of, *arguments, i, str(cache)): i for i in range(count)}
        kernel_seconds = [
            kernel_pool.submit(_kernels_of, *arguments, i, str(cache)) for i in range(count)
        ]
        for done in concurrent.futures.as_completed(costs):
            yield with_kernels(done.result(), kernel_seconds[costs[done]].result())


def with_kernels(block: BlockCost, seconds: float) -> BlockCost:
    """The cost with the time of its Pallas kernels added."""
    kinds = block.kinds | ({cost.KERNEL: seconds} if seconds else {})
    return dataclasses.replace(block, seconds=block.seconds + seconds, kinds=kinds)


def update_cost(
    config: Mapping[str, Any],
    topology: Topology,
    shapes: Mapping[tuple[int, ...], int],
    cache: Path,
    processes: int,
) -> tuple[float, float]:
    """(seconds, bytes in device memory) of one chip's share of the parameter update.

    The update consists of gradient clipping, optimizer, EMA and logged norms. Each shape is
    compiled once, as the update of a single parameter: the whole update has thousands of small
    operations and takes minutes to compile.

    Args:
        config, topology, cache, processes: as for `block_costs`.
        shapes: number of parameters by per-chip shape.
    """
    cache.mkdir(parents=True, exist_ok=True)
    arguments = (json.dumps(config), str(smallest(topology, 1)))
    with compile_pool(processes) as pool:
        tasks = {shape: pool.submit(_update_of, *arguments, shape, str(cache)) for shape in shapes}
        costs = [(count, *tasks[shape].result()) for shape, count in shapes.items()]
    seconds = sum(count * seconds for count, seconds, _ in costs)
    return seconds, sum(count * size for count, _, size in costs)


@functools.lru_cache(maxsize=2)
def _prepared(config: str, name: str, rows: int) -> tuple[Stage, list[Block], Mesh | None]:
    """(stage, blocks, mesh) for a topology's name; "" stands for one device of any kind."""
    settings = json.loads(config)
    mesh = block_mesh(parse_topology(name), settings["mesh"]) if name else None
    stage = create_stage(settings, mesh)
    return stage, find_blocks(stage, rows), mesh


def _cost_of(config: str, name: str, rows: int, index: int, cache: str) -> BlockCost:
    """The cost of one block without its kernels. Runs in a worker process.

    Args:
        config: the config as JSON.
        name: the topology's name.
        rows: images per chip.
        index: of the block, in `find_blocks`.
        cache: directory of cached costs.
    """
    stage, blocks, mesh = _prepared(config, name, rows)
    block, topology = blocks[index], parse_topology(name)
    _, both, shapes = block_program(stage, block)
    flops = _forward_flops(config, rows, index, shapes[:3])
    shardings = _shardings(block.paths[0], shapes, mesh, json.loads(config)["mesh"])
    lowered = lower(both, shapes, shardings)
    return BlockCost(paths=block.paths, flops=3 * flops, **_compiled_cost(lowered, topology, cache))


def _forward_flops(config: str, rows: int, index: int, shapes: tuple[Any, ...]) -> float:
    """FLOPs of a block's forward pass, counted in the program for a single device."""
    stage, blocks, _ = _prepared(config, "", rows)
    forward = block_program(stage, blocks[index])[0]
    return jax.jit(forward).lower(*shapes).cost_analysis()["flops"]


def lower(program: Any, shapes: tuple[Any, ...], shardings: tuple[Any, ...]) -> Any:
    """Lowers a block's program and leaves the layouts of its arrays to the compiler.

    In the whole network the compiler chooses the layouts at block boundaries. It has the same
    freedom here.
    """
    formats = jax.tree.map(lambda sharding: Format(Layout.AUTO, sharding), shardings)
    params, varying, _, outputs = formats
    out_formats = (outputs, (params, varying))
    return jax.jit(program, in_shardings=formats, out_shardings=out_formats).lower(*shapes)


def _compiled_cost(lowered: Any, topology: Topology, cache: str) -> dict[str, Any]:
    """The `COST_FIELDS` of a lowered program, compiled unless they are in the cache."""
    return cached(
        cache,
        f"{topology.chip.name} {lowered.as_text()}",
        COST_FIELDS,
        lambda: _program_cost(hlo.parse(lowered.compile().as_text()), topology),
    )


def _program_cost(module: hlo.Module, topology: Topology) -> dict[str, Any]:
    """The `COST_FIELDS` of a compiled program."""
    kinds, inside, unestimated, total = Counter(), Counter(), 0.0, 0.0
    for item in cost.items(module, topology.chip):
        total += item.seconds
        kinds[item.kind] += item.seconds
        inside[item.path] += item.seconds
        unestimated += 0.0 if item.estimated else item.seconds
    return {
        "seconds": total,
        "bytes": cost.memory_bytes(module),
        "kinds": dict(kinds),
        "unestimated": unestimated,
        "inside": dict(inside.most_common(MODULES_KEPT)),
    }


def _kernels_of(config: str, name: str, rows: int, index: int, cache: str) -> float:
    """Seconds of one block's Pallas kernels; arguments as for `_cost_of`.

    Runs in a worker process that called `kernels.ask_for_schedules`.
    """
    stage, blocks, mesh = _prepared(config, name, rows)
    _, both, shapes = block_program(stage, blocks[index])
    jaxpr = jax.make_jaxpr(both)(*shapes).jaxpr
    return kernels.total_seconds(jaxpr, parse_topology(name).chip, mesh, cache)


def _shardings(
    path: str, shapes: tuple[Any, ...], mesh: Mesh, settings: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The shardings of a block's arguments.

    Parameters follow the run's rules, feature maps are sharded like images, and all other arrays
    are replicated.
    """
    rules, replicated = settings["rules"], NamedSharding(mesh, PartitionSpec())

    def parameter(inner_path, leaf):
        rule = sharding.rule_of(f"params/{path}/{sharding.path_name(inner_path)}", rules)
        spec = sharding.rule_spec(rules[rule][1], leaf.shape, mesh, settings["fsdp_min_elements"])
        return NamedSharding(mesh, spec)

    others = jax.tree.map(
        lambda leaf: sharding.image_sharding(mesh) if len(leaf.shape) == 4 else replicated,
        shapes[1:],
    )
    return jax.tree_util.tree_map_with_path(parameter, shapes[0]), *others


def _update_of(config: str, name: str, shape: tuple[int, ...], cache: str) -> tuple[float, float]:
    """(seconds, bytes in device memory) of the update of one parameter. Runs in a worker process.

    The update is gradient clipping, optimizer, EMA and logged norms.
    """
    settings, topology = json.loads(config), parse_topology(name)
    optim, steps = settings["optim"], settings["train"]["steps"]
    optimizer = make_optimizer(optim, steps)
    replicated = NamedSharding(Mesh(topology.devices()[:1], "x"), PartitionSpec())
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)
    params, count = {"leaf": array(shape, jnp.float32)}, array((), jnp.int32)
    moments = jax.tree.map(
        lambda leaf: array(leaf.shape, leaf.dtype), jax.eval_shape(optimizer.init, params)
    )
    tracks = (params,) * len(optim["ema_tracks"])
    state = TrainState(
        count, params, ema=params, opt_state=moments, bad_step=count, ema_tracks=tracks
    )
    update = make_update(optimizer, learning_rate(optim, steps), optim)
    lowered = jax.jit(update, donate_argnums=0).lower(state, array((), jnp.float32), params)
    costs = _compiled_cost(lowered, topology, cache)
    return costs["seconds"], costs["bytes"]
