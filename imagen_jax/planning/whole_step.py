"""Memory and collectives of the train step and the sampler, from the whole compiled program.

By default programs are compiled at the compiler's fast level (O0), which takes minutes; the default
level takes up to thirty. Its peak memory is approximate: compared with the default level it is 1.35
times as high for base_64 on v5e:16x16, 1.02 times for sr_256 there, and 0.97 times on v5p:4x4x8.
`exact` compiles at the default level.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imagen_jax import cascade, sampling_parameters, sharding
from imagen_jax.hardware.topology import Topology
from imagen_jax.planning import hlo, links
from imagen_jax.stage import Params, Stage
from imagen_jax.stage_sizes import Size, square
from imagen_jax.training import sample_grids
from imagen_jax.training.state import bytes_table
from imagen_jax.training.step import TrainProgram

O0, DEFAULT = "O0", "default"
FAST = {"optimization_level": 9}  # level O0; has no effect for GPUs
# Autotuning would run programs on a GPU.
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a program in bytes per device.

    Fields:
        peak: the compiler's peak.
        limit: bytes that a program may use.
        parts: the parts of the peak that are known from shapes and shardings.
    """

    peak: int
    limit: int
    parts: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak <= self.limit

    @property
    def temporaries(self) -> int:
        """The rest of the peak, which belongs to no known part."""
        return max(0, self.peak - sum(self.parts.values()))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same mesh axes in one step.

    Fields:
        kind: such as "all-gather".
        axes: the mesh axes.
        count: number of executions.
        bytes: of their largest arrays, on each chip.
        seconds: on the links.
        overlapped: the part of `seconds` that is overlapped with compute; 0 at level O0.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    seconds: float
    overlapped: float = 0.0


def make_program(config: Mapping[str, Any], topology: Topology) -> TrainProgram:
    """The train step of a config on a topology. Raises ValueError if the mesh does not fit."""
    return TrainProgram.create(config, sharding.make_mesh(config["mesh"], topology.devices()))


def compile_text(lowered: Any, topology: Topology, exact: bool) -> tuple[str, int]:
    """Compiles a program: (text of the compiled program, peak bytes per device).

    If the TPU compiler refuses a program because it does not fit, the text is "" and the peak is
    the one in the error message. GPU compilers refuse nothing; compare the peak with the limit.
    """
    options = (GPU_OPTIONS if topology.chip.platform == "cuda" else {}) | (
        FAST if optimization_level(topology, exact) == O0 else {}
    )
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        peak = needed_bytes(str(error))
        if peak is None:
            raise
        return "", peak
    return compiled.as_text(), compiled.memory_analysis().peak_memory_in_bytes


def optimization_level(topology: Topology, exact: bool) -> str:
    """The compiler level of `compile_text`: "O0" or "default"."""
    return O0 if topology.chip.platform == "tpu" and not exact else DEFAULT


def needed_bytes(message: str) -> int | None:
    """The memory that a refused program needs, from the compiler's error message.

    Returns None for other messages.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    used = re.search(r"Used ([\d.]+)([BKMGT]) of", message) or re.search(
        r"\(([\d.]+)([BKMGT])\) exceeds", message
    )
    return int(float(used[1]) * UNITS[used[2]]) if used else None


def state_parts(program: TrainProgram) -> dict[str, int]:
    """The memory that a train step certainly holds, in bytes per device.

    The parts are parameters, EMA, optimizer, gradients, batch and activations. Gradients are as
    large as the parameters. Activations are the arrays that the traced step stores for its backward
    pass; this is an upper bound, because the compiler recomputes some of them.
    """
    rows = {
        row["part"]: row["bytes_per_device"]
        for row in bytes_table(program.abstract, program.shardings)
    }
    batch = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in program.batch.values()
    )
    parts = {
        "parameters": rows["params"],
        "EMA": rows["ema"],
        "optimizer": rows["opt_state"],
        "gradients": rows["params"],
        "batch": batch,
    }
    if "ema_tracks" in rows:
        parts["EMA tracks"] = rows["ema_tracks"]
    return parts | {"activations": activation_bytes(program)}


def step_memory(
    program: TrainProgram, topology: Topology, exact: bool
) -> tuple[Memory, hlo.Module | None]:
    """The memory of a train step on each device, and the compiled program if it fits."""
    text, peak = compile_text(program.lower(), topology, exact)
    parts = state_parts(program)
    state = sum(parts.values()) - parts["activations"]
    parts["activations"] = min(parts["activations"], max(0, peak - state))
    memory = Memory(peak, int(topology.chip.memory_limit), parts)
    return memory, hlo.parse(text) if text and memory.fits else None


def activation_bytes(program: TrainProgram) -> int:
    """Bytes per device of the arrays with one row per image that the backward pass stores, as
    traced.
    """
    sizes, stage = program.mesh.shape, program.stage
    size = stage.largest_bucket
    images = next(iter(program.batch.values())).shape[0] // program.accumulation
    batch = {
        name: jax.ShapeDtypeStruct((images, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in program.batch.items()
    }

    def backward(params, batch, key):
        loss = lambda p: jnp.sum(
            stage.per_sample_loss(p, batch, stage.draw(key, images, size), key)
        )
        return jax.vjp(loss, params)[1]

    stored = jax.eval_shape(backward, program.abstract.params, batch, jax.random.key(0))
    total = sum(
        math.prod(a.shape) * a.dtype.itemsize
        for a in jax.tree.leaves(stored)
        if a.shape[:1] == (images,)
    )
    return total // (sizes["data"] * sizes["fsdp"] * sizes["spatial"])


def traffic(module: hlo.Module, program: TrainProgram, topology: Topology) -> list[Traffic]:
    """The collectives of a compiled step by kind and mesh axes, the slowest first."""
    devices = list(program.mesh.devices.flat)
    sizes = dict(program.mesh.shape)
    count, size, seconds, overlapped = Counter(), Counter(), Counter(), Counter()
    for collective in hlo.collectives(module, len(devices)):
        key = (collective.kind, links.axes_of(collective.groups, sizes))
        duration = links.seconds(collective, devices, topology)
        count[key] += collective.times
        size[key] += collective.times * collective.bytes
        seconds[key] += duration
        overlapped[key] += collective.overlapped * duration
    return [
        Traffic(*key, int(count[key]), int(size[key]), seconds[key], overlapped[key])
        for key, _ in seconds.most_common()
    ]


def lower_sampler(program: TrainProgram, rows: int) -> Any:
    """The lowered program that samples a grid of `rows` images during training."""
    shapes = program.stage.batch_shapes(rows, square(program.stage.train_size))
    batch = {
        name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items() if name != "image"
    }
    return sample_grids.sample_program(program.stage, program.mesh, rows).lower(
        program.abstract.ema, batch
    )


def lower_whole_images(config: Mapping[str, Any], program: TrainProgram) -> Any:
    """The lowered sampling program of a stage after training, one image for each shard.

    The full size is larger than the training size for a stage that trains on crops.
    """
    rows = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    stage, mesh = program.stage, program.mesh
    size = square(stage.image_size)
    jitted, arguments = images_program(stage, config["mesh"], mesh, stage.sampling, rows, 0, size)
    return jitted.lower(*arguments)


def images_program(
    stage: Stage,
    section: Mapping[str, Any],
    mesh: Mesh,
    sampling: Mapping[str, Any],
    rows: int,
    index: int,
    size: Size,
) -> tuple[Any, tuple[Any, ...]]:
    """(`cascade.sample_program` of a stage, its arguments for `rows` images of `size` as shapes).

    stage: created for `mesh`.
    section: the section `mesh` of the stage's training config, see
        `sampling_parameters.parameter_shardings`.
    sampling, index, size: see `cascade.sample_program`.
    """
    params, batch = sampling_inputs(stage, rows, size)
    shardings = sampling_parameters.parameter_shardings(params, mesh, section)
    program = cascade.sample_program(stage, mesh, shardings, sampling, index, size)
    return program, (params, batch)


def sampling_inputs(
    stage: Stage, rows: int, size: Size
) -> tuple[Params, dict[str, jax.ShapeDtypeStruct]]:
    """The arguments of `cascade.sample_program` as shapes; allocates nothing.

    size: of the images.
    """
    params = sampling_parameters.for_sampling(jax.eval_shape(stage.init, jax.random.key(0)), stage)
    shapes = stage.batch_shapes(rows, size)
    shapes |= {"seed": ((rows,), jnp.uint32)}
    batch = {
        name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items() if name != "image"
    }
    return params, batch
