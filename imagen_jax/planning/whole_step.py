"""The train step and the sampler compiled whole, for hardware that need not be there: what they
need in memory, and what they send.

Compiled at the compiler's fast level (O0), which takes minutes where the default takes up to
thirty. It knows memory roughly: its peak is 1.35 times the default's for base_64 on v5e:16x16 and
1.02 times for sr_256, but 0.97 times on v5p:4x4x8. `exact` compiles at the default level.
"""

import dataclasses
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from imagen_jax import sharding
from imagen_jax.hardware.topology import Topology
from imagen_jax.planning import hlo, links
from imagen_jax.training import sample_grids
from imagen_jax.training.step import TrainProgram

O0, DEFAULT = "O0", "default"
FAST = {"optimization_level": 9}  # O0; makes no difference on GPUs
GPU_OPTIONS = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
}  # these try programs out on the GPU
UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device. `peak` is the compiler's; `parts` what is known of it, the rest is
    `temporaries`. `limit` is what a program may use.
    """

    peak: int
    limit: int
    parts: dict[str, int]

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    @property
    def temporaries(self) -> int:
        return max(0, self.peak - sum(self.parts.values()))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same mesh axes in one step: bytes of their largest
    arrays, seconds on the links.

    `beside` are those of the seconds in which the program, as it was compiled, goes on computing:
    none at level O0.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    seconds: float
    beside: float = 0.0


def compile_text(lowered: Any, place: Topology, exact: bool) -> tuple[str, int]:
    """(text of the compiled program, peak bytes on a device). A program that does not fit has no
    text, and the peak that the compiler names.

    A GPU's compiler refuses nothing: what it makes has to be compared with the memory there is.
    """
    options = (GPU_OPTIONS if place.chip.platform == "cuda" else {}) | (
        FAST if level(place, exact) == O0 else {}
    )
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        peak = needed_bytes(str(error))
        if peak is None:
            raise
        return "", peak
    return compiled.as_text(), compiled.memory_analysis().peak_memory_in_bytes


def level(place: Topology, exact: bool) -> str:
    """The compiler's level that `compile_text` uses."""
    return O0 if place.chip.platform == "tpu" and not exact else DEFAULT


def needed_bytes(message: str) -> int | None:
    """What a program needs that the compiler refused for want of memory, by its message; None for
    another message.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    used = re.search(r"Used ([\d.]+)([BKMGT]) of", message) or re.search(
        r"\(([\d.]+)([BKMGT])\) exceeds", message
    )
    return int(float(used[1]) * UNITS[used[2]]) if used else None


def state_parts(program: TrainProgram) -> dict[str, int]:
    """Bytes on a device of what a step holds for certain, from shapes and shardings: parameters,
    EMA, optimizer, gradients, batch, activations.

    Gradients are as large as the parameters. Activations are what the traced step keeps for its
    backward pass of the rows that are computed at once, less what the compiler finds cheaper to
    compute again: an upper bound.
    """
    rows = {
        row["part"]: row["bytes_per_device"]
        for row in sharding.bytes_table(program.abstract, program.shardings)
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
    return parts | {"activations": kept_bytes(program)}


def kept_bytes(program: TrainProgram) -> int:
    """Bytes a device keeps of the forward pass, as traced: arrays that have a row for
    each image.
    """
    sizes = program.mesh.shape
    images = next(iter(program.batch.values())).shape[0] // program.accumulation
    batch = {
        name: jax.ShapeDtypeStruct((images, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in program.batch.items()
    }

    def backward(params, batch, key):
        loss = lambda p: jnp.sum(
            program.stage.per_sample_loss(p, batch, program.stage.draw(key, images), key)
        )
        return jax.vjp(loss, params)[1]

    kept = jax.eval_shape(backward, program.abstract.params, batch, jax.random.key(0))
    total = sum(
        math.prod(a.shape) * a.dtype.itemsize
        for a in jax.tree.leaves(kept)
        if a.shape[:1] == (images,)
    )
    return total // (sizes["data"] * sizes["fsdp"] * sizes["spatial"])


def traffic(module: hlo.Module, program: TrainProgram, place: Topology) -> list[Traffic]:
    """The collectives of a compiled step by kind and axes, the slowest first."""
    devices = list(program.mesh.devices.flat)
    sizes = dict(program.mesh.shape)
    count, size, seconds, beside = Counter(), Counter(), Counter(), Counter()
    for collective in hlo.collectives(module, len(devices)):
        key = (collective.kind, links.axes_of(collective.groups, sizes))
        count[key] += collective.times
        size[key] += collective.times * collective.bytes
        seconds[key] += (taken := links.seconds(collective, devices, place))
        beside[key] += collective.beside * taken
    return [
        Traffic(*key, int(count[key]), int(size[key]), seconds[key], beside[key])
        for key, _ in seconds.most_common()
    ]


def lower_sampler(program: TrainProgram, rows: int) -> Any:
    """What draws a sample grid of a training."""
    shapes = program.stage.batch_shapes(rows)
    batch = {
        name: jax.ShapeDtypeStruct(*shapes[name])
        for name in ("text", "text_mask", "lowres")
        if name in shapes
    }
    return sample_grids.draw_program(program.stage, program.mesh, rows).lower(
        program.abstract.ema, batch
    )


def lower_whole_images(program: TrainProgram) -> Any:
    """The sampler at the stage's image size, which of a stage that is trained on crops is larger:
    an image for each part of the mesh that has rows of its own.
    """
    stage, rows = program.stage, program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    shapes = stage.batch_shapes(rows)
    batch = {
        name: jax.ShapeDtypeStruct(*shapes[name])
        for name in ("text", "text_mask")
        if name in shapes
    }
    batch |= (
        {"lowres": jax.ShapeDtypeStruct((rows, stage.lowres_size, stage.lowres_size, 3), jnp.uint8)}
        if stage.lowres_size
        else {}
    )
    over_rows = sharding.batch_sharding(program.mesh)
    draw = lambda ema, keys, batch: stage.sample(ema, keys, batch, stage.sampling)
    shardings = program.shardings.ema, over_rows, over_rows
    jitted = jax.jit(
        draw,
        in_shardings=shardings,
        out_shardings=over_rows,
        compiler_options=sharding.compiler_options(program.mesh),
    )
    return jitted.lower(program.abstract.ema, keys, batch)
