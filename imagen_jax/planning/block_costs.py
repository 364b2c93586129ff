"""What a train step computes, block by block, by the TPU compiler's own estimates: each block
compiled at the shapes one chip gives it.

A whole step at the compiler's default level takes tens of minutes; a block takes seconds, equal
blocks are compiled once, several at the same time, and what was compiled before is read from a
file. A block's program is its forward and backward pass with the recomputation that `model.remat`
asks for, on a mesh of the `model` and `spatial` axes alone: along `data` and `fsdp` chips differ in
nothing but their rows.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.interpreters import partial_eval as pe
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagen_jax import sharding
from imagen_jax.hardware import topology
from imagen_jax.models.attention import Attention, FeedForward
from imagen_jax.models.blocks import ResBlock
from imagen_jax.models.remat import checkpointed
from imagen_jax.planning import cost, hlo, kernels
from imagen_jax.planning.block_calls import block_calls
from imagen_jax.stage import Stage, create_stage
from imagen_jax.storage import write_json
from imagen_jax.training.optim import learning_rate, make_optimizer
from imagen_jax.training.state import TrainState
from imagen_jax.training.step import make_update

NO_INPUT_GRADIENT = ("stem", "conditioning")  # nothing before them is trained
CHECKPOINTED = {
    "none": (),
    "matrix": (ResBlock,),
    "block": (ResBlock, Attention, FeedForward),
}  # what each `model.remat` is applied to
VERSION = 2  # of what is cached
PATIENCE_S = 5  # after SIGTERM, which often goes to all processes, the first one ends first
MEASURED = {
    "seconds": float,
    "bytes": float,
    "kinds": dict,
    "unestimated": float,
    "inside": dict,
}  # of a block, see `BlockCost`
log = logging.getLogger("imagen_jax.planning.block_costs")
Tree = Any


@dataclasses.dataclass(frozen=True)
class Block:
    """A module of the network, the shapes it is called with, and the places where an equal one
    stands.
    """

    module: Any
    args: tuple[Any, ...]
    params: Tree
    places: tuple[str, ...]

    @property
    def has_input_gradient(self) -> bool:
        return not self.places[0].startswith(NO_INPUT_GRADIENT)


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """Seconds of one call of a block on one chip, forward and backward. `flops` are the model's
    own: three times the forward pass.

    `bytes`: read and written in device memory. `kinds`: seconds by kind of instruction;
    `unestimated`: those by the roofline; `inside`: seconds by place within the block.
    """

    places: tuple[str, ...]
    seconds: float
    flops: float
    bytes: float
    kinds: dict[str, float]
    unestimated: float
    inside: dict[str, float]


def find_blocks(stage: Stage, b: int) -> list[Block]:
    """Every block that the loss of `b` images calls, equal ones together: the bare ones, whatever
    `model.remat` wraps them in.
    """
    stage = dataclasses.replace(stage, model=stage.model.clone(remat="none"))
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in stage.batch_shapes(b).items()}
    params = jax.eval_shape(stage.init, jax.random.key(0))
    loss = lambda p, x, key: stage.per_sample_loss(p, x, stage.draw(key, b), key)
    found: dict[str, Block] = {}
    for path, (module, args) in block_calls(
        lambda: jax.eval_shape(loss, params, batch, jax.random.key(0))
    ).items():
        own = functools.reduce(lambda tree, name: tree[name], path.split("/"), params)
        key = repr((module, args, path.startswith(NO_INPUT_GRADIENT)))
        before = found[key].places if key in found else ()
        found[key] = Block(module, args, own, (*before, path))
    return list(found.values())


def block_program(stage: Stage, block: Block) -> tuple[Any, Any, tuple[Any, ...]]:
    """(forward, forward and backward, shapes of their arguments): the outputs, and the gradients
    from gradients of the outputs.

    Kernels come and their gradients go in the network's compute type, as the rest of the step
    gathers and reduces them.
    """
    leaves, tree = jax.tree.flatten(block.args)
    is_array = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]
    varies = [
        a and jnp.issubdtype(leaf.dtype, jnp.floating) and block.has_input_gradient
        for a, leaf in zip(is_array, leaves)
    ]
    fixed = [a and not v for a, v in zip(is_array, varies)]
    pick = lambda flags: tuple(leaf for leaf, flag in zip(leaves, flags) if flag)

    def forward(params: Tree, varying: tuple[Any, ...], constant: tuple[Any, ...]) -> list[Any]:
        varying, constant = iter(varying), iter(constant)
        given = [
            next(varying) if v else next(constant) if f else leaf
            for leaf, v, f in zip(leaves, varies, fixed)
        ]
        out = block.module.apply(
            {"params": params},
            *jax.tree.unflatten(tree, given),
            rngs={"dropout": jax.random.key(0)},
        )
        return [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    remat = functools.partial(
        checkpointed,
        stage.model.remat if isinstance(block.module, CHECKPOINTED[stage.model.remat]) else "none",
    )

    def both(
        params: Tree, varying: tuple[Any, ...], constant: tuple[Any, ...], gradients: list[Any]
    ):
        out, backward = jax.vjp(remat(lambda p, v: forward(p, v, constant)), params, varying)
        return out, backward(gradients)

    dtype = stage.model.dtype
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, dtype if len(p.shape) > 1 else p.dtype),
        block.params,
    )
    shapes = (params, pick(varies), pick(fixed))
    return forward, both, (*shapes, jax.eval_shape(forward, *shapes))


def mesh_sizes(config: Mapping[str, Any], place: topology.Topology) -> dict[str, int]:
    """The size of each axis of a config's mesh on a topology. Raises ValueError as
    `sharding.mesh_sizes`.
    """
    return sharding.mesh_sizes(
        config["mesh"], place.chips, place.slices if place.chip.platform == "tpu" else 1
    )


def check_columns(config: Mapping[str, Any], place: topology.Topology) -> None:
    """Raises ValueError if a row of the batch is computed on a number of chips that no small slice
    is made of: the compiler crashes on some.
    """
    sizes = mesh_sizes(config, place)
    columns = sizes["model"] * sizes["spatial"]
    if _smallest(place, columns).chips % columns:
        raise ValueError(
            f"mesh.model x mesh.spatial = {columns}: blocks on so many chips cannot be timed;"
            " --notime plans the rest"
        )


def block_mesh(place: topology.Topology, sizes: Mapping[str, int]) -> Mesh:
    """The part of the run's mesh that one row of a batch is computed on."""
    part = {"data": 1, "fsdp": 1, "model": sizes["model"], "spatial": sizes["spatial"]}
    return sharding.make_mesh(part, place.devices()[: part["model"] * part["spatial"]])


@functools.lru_cache(maxsize=2)
def _prepared(config: str, name: str, rows: int) -> tuple[Stage, list[Block], Mesh]:
    """(stage, blocks, mesh) for the compiler; without a topology's name, for one device of any
    kind.
    """
    settings = json.loads(config)
    mesh = block_mesh(topology.parse(name), settings["mesh"]) if name else None
    stage = create_stage(settings, mesh)
    return stage, find_blocks(stage, rows), mesh


def _cost_of(config: str, name: str, rows: int, index: int, cache: str) -> BlockCost:
    """One block's cost, compiled unless `cache` has it. Runs in a process of its own, so its
    arguments are plain.
    """
    stage, blocks, mesh = _prepared(config, name, rows)
    block, place = blocks[index], topology.parse(name)
    _, both, shapes = block_program(stage, block)
    plain, plain_blocks, _ = _prepared(config, "", rows)
    forward = block_program(plain, plain_blocks[index])[0]
    flops = 3 * jax.jit(forward).lower(*shapes[:3]).cost_analysis()["flops"]
    lowered = lower(
        both, shapes, _shardings(block.places[0], shapes, mesh, json.loads(config)["mesh"])
    )
    found = _cached(
        cache,
        f"{place.chip.name} {lowered.as_text()}",
        MEASURED,
        lambda: _measure(hlo.parse(lowered.compile().as_text()), place),
    )
    return BlockCost(places=block.places, flops=flops, **found)


def lower(program: Any, shapes: tuple[Any, ...], shardings: tuple[Any, ...]) -> Any:
    """A block's program with layouts left to the compiler: within the network a feature map comes
    in the layout the block before it likes.
    """
    free = jax.tree.map(lambda sharding: Format(Layout.AUTO, sharding), shardings)
    params, varying, _, outputs = free
    return jax.jit(program, in_shardings=free, out_shardings=(outputs, (params, varying))).lower(
        *shapes
    )


def _cached(cache: str, key: str, fields: Mapping[str, type], compute: Callable[[], Any]) -> Any:
    """The costs kept for a key in the directory `cache`, computed if there are none, or anything
    else than these `fields` of numbers.
    """
    versions = (
        f"{VERSION} {importlib.metadata.version('libtpu')} {importlib.metadata.version('jaxlib')}"
    )
    file = Path(cache) / f"{hashlib.sha256(f'{versions} {key}'.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if _are_costs(found := json.loads(file.read_text()), fields):
            return found
    made = compute()
    try:
        write_json(file, made)
    except OSError as error:
        log.warning("a cost is not kept: %s", error)
    return made


def _are_costs(found: Any, fields: Mapping[str, type]) -> bool:
    """Whether this is {name: number, or {name: number}}, as `fields` have it; no number is negative
    or not finite.
    """
    is_number = lambda value: type(value) in (int, float) and 0 <= value < math.inf
    right = {
        float: is_number,
        dict: lambda value: isinstance(value, dict) and all(map(is_number, value.values())),
    }
    return (
        isinstance(found, dict)
        and found.keys() == fields.keys()
        and all(right[kind](found[name]) for name, kind in fields.items())
    )


def _kernels_of(config: str, name: str, rows: int, index: int, cache: str) -> float:
    """Seconds of a block's Pallas kernels, which `_cost_of` leaves out. For a process that asked
    for their schedules.
    """
    stage, blocks, mesh = _prepared(config, name, rows)
    _, both, shapes = block_program(stage, blocks[index])
    chip, total = topology.parse(name).chip, 0.0
    for call, times in kernels.calls(_without_unused(jax.make_jaxpr(both)(*shapes).jaxpr)):
        key = f"{chip.name} {kernels.signature(call)}"
        alone = _cached(
            cache, key, {"seconds": float}, lambda: {"seconds": kernels.seconds(call, chip, mesh)}
        )["seconds"]
        total += times * alone / kernels.cores_at_work(call, chip)
    return total


def _without_unused(jaxpr: Any) -> Any:
    """A traced program less what its results do not need: recomputation of what was kept."""
    return pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _shardings(
    path: str, shapes: tuple[Any, ...], mesh: Mesh, settings: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Of a block's arguments: parameters by the run's rules, feature maps as images, all else
    whole.
    """
    rules, whole = settings["rules"], NamedSharding(mesh, PartitionSpec())

    def parameter(inner, leaf):
        placement = rules[sharding.rule_of(f"params/{path}/{sharding.path_name(inner)}", rules)][1]
        return NamedSharding(
            mesh, sharding.rule_spec(placement, leaf.shape, mesh, settings["fsdp_min_elements"])
        )

    others = jax.tree.map(
        lambda leaf: sharding.image_sharding(mesh) if len(leaf.shape) == 4 else whole, shapes[1:]
    )
    return jax.tree_util.tree_map_with_path(parameter, shapes[0]), *others


def _measure(module: hlo.Module, place: topology.Topology) -> dict[str, Any]:
    kinds, inside, unestimated, total = Counter(), Counter(), 0.0, 0.0
    for item in cost.items(module, place.chip):
        total += item.seconds
        kinds[item.kind] += item.seconds
        inside[item.place] += item.seconds
        unestimated += 0.0 if item.estimated else item.seconds
    return {
        "seconds": total,
        "bytes": cost.memory_bytes(module),
        "kinds": dict(kinds),
        "unestimated": unestimated,
        "inside": dict(inside.most_common(12)),
    }


def _update_of(config: str, name: str, shape: tuple[int, ...], cache: str) -> tuple[float, float]:
    """(seconds, bytes in device memory) to update one parameter of a shape: clipping, optimizer,
    EMA and the norms that are recorded. Runs in a process of its own.
    """
    settings, place = json.loads(config), topology.parse(name)
    optim, steps = settings["optim"], settings["train"]["steps"]
    optimizer = make_optimizer(optim, steps)
    whole = NamedSharding(Mesh(place.devices()[:1], "x"), PartitionSpec())
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    params, count = {"leaf": array(shape, jnp.float32)}, array((), jnp.int32)
    moments = jax.tree.map(
        lambda leaf: array(leaf.shape, leaf.dtype), jax.eval_shape(optimizer.init, params)
    )
    more = (params,) * len(optim["ema_tracks"])
    state = TrainState(
        count, params, ema=params, opt_state=moments, bad_step=count, ema_tracks=more
    )
    update = make_update(optimizer, learning_rate(optim, steps), optim)
    lowered = jax.jit(update, donate_argnums=0).lower(state, array((), jnp.float32), params)
    found = _cached(
        cache,
        f"{place.chip.name} {lowered.as_text()}",
        MEASURED,
        lambda: _measure(hlo.parse(lowered.compile().as_text()), place),
    )
    return found["seconds"], found["bytes"]


def update_cost(
    config: Mapping[str, Any],
    place: topology.Topology,
    shapes: Mapping[tuple[int, ...], int],
    cache: Path,
    processes: int,
) -> tuple[float, float]:
    """(seconds, bytes in device memory) of a chip's part of a step's update, in which no network is
    run. `shapes`: how many parameters have one on a chip.

    Parameters of one shape are compiled once, alone: the whole update is thousands of small
    operations that take the compiler minutes.
    """
    cache.mkdir(parents=True, exist_ok=True)
    arguments = (json.dumps(config), str(_smallest(place, 1)))
    with _pool(processes, "") as pool:
        found = {shape: pool.submit(_update_of, *arguments, shape, str(cache)) for shape in shapes}
        costs = [(times, *found[shape].result()) for shape, times in shapes.items()]
    return sum(times * seconds for times, seconds, _ in costs), sum(
        times * size for times, _, size in costs
    )


def block_costs(
    config: Mapping[str, Any], place: topology.Topology, cache: Path, processes: int
) -> Iterator[BlockCost]:
    """The cost of every block of a config's train step on a topology, in the order they are done.
    Raises ValueError as `TrainProgram.create`.

    `processes` blocks are compiled at once, each in a process that needs 2 to 4 GB. What is in
    `cache` is not compiled again.
    """
    stage = create_stage(config)
    rows = rows_per_chip(config, place)
    count = len(find_blocks(stage, rows))
    cache.mkdir(parents=True, exist_ok=True)
    sizes = mesh_sizes(config, place)
    sized = {
        **config,
        "mesh": {**config["mesh"], **sizes},
    }  # what is left of a smaller slice is something else
    arguments = (json.dumps(sized), str(_smallest(place, sizes["model"] * sizes["spatial"])), rows)
    with (
        tempfile.TemporaryDirectory(prefix="schedules") as schedules,
        _pool(processes, "") as pool,
        _pool(1, schedules) as scheduled,
    ):
        costs = {pool.submit(_cost_of, *arguments, i, str(cache)): i for i in range(count)}
        kernel = {i: scheduled.submit(_kernels_of, *arguments, i, str(cache)) for i in range(count)}
        for done in concurrent.futures.as_completed(costs):
            yield with_kernels(done.result(), kernel[costs[done]].result())


def _smallest(place: topology.Topology, chips: int) -> topology.Topology:
    """The smallest slice that has links and so many chips: what one chip computes does not depend
    on how many there are beside those that share its rows.
    """
    return dataclasses.replace(
        place, shape=topology.smallest_shape(place.chip, max(4, chips)), slices=1
    )


@contextlib.contextmanager
def _pool(processes: int, schedules: str) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes of their own, as the compiler holds a lock and its memory; a directory asks them
    for schedules of kernels.

    An error drops what has not begun; the processes end with this one, however it ends, and take
    their schedules with them.
    """
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _start_process, (schedules,)
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _start_process(schedules: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells when to stop
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGTERM}
    )  # the compiler's handler would print what looks like a crash
    parent = multiprocessing.parent_process()
    for wait in (parent.join, lambda: (signal.sigwait({signal.SIGTERM}), parent.join(PATIENCE_S))):
        threading.Thread(target=_end_after, args=(wait, schedules), daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_compilation_cache_dir", None)
    if schedules:
        kernels.ask_for_schedules(schedules)


def _end_after(wait: Callable[[], Any], schedules: str) -> None:
    """For a thread: ends this process and its schedules, whatever the compiler is doing, when the
    waiting is over.
    """
    wait()
    shutil.rmtree(schedules or os.devnull, ignore_errors=True)
    os._exit(1)


def with_kernels(block: BlockCost, seconds: float) -> BlockCost:
    """The cost with the time of its Pallas kernels added."""
    kinds = block.kinds | ({cost.KERNEL: seconds} if seconds else {})
    return dataclasses.replace(block, seconds=block.seconds + seconds, kinds=kinds)


def rows_per_chip(config: Mapping[str, Any], place: topology.Topology) -> int:
    """Images that one chip computes at once: the batch over data x fsdp, in as many parts as it is
    accumulated in.
    """
    sizes = mesh_sizes(config, place)
    return (
        config["data"]["batch_size"]
        // (sizes["data"] * sizes["fsdp"])
        // config["optim"]["accumulation"]
    )
