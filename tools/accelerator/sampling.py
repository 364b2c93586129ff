"""Times sampling of one stage of the cascade at the paper's size, with random bf16 weights.

A few steps are timed and multiplied: every step of a sampler costs the same.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tools.accelerator import measuring, models, package

STEPS, REPEATS = 8, 3


def run(emit: Callable, model: str, batches: Sequence[int], tiny: bool, gate: str = "") -> None:
    """Times STEPS guided steps of a stage for each batch, halved until it fits.

    The program of the first batch is compiled before the file `gate` opens the device.
    """
    emit("about", **measuring.about())
    config = models.stage_config(model, tiny)
    stage = package.create_stage(config)
    sampling = dict(config["sampling"])
    full, sampling["steps"] = sampling["steps"], STEPS
    first = measuring.tried(lambda: compiled(stage, sampling, batches[0]))[0]
    measuring.wait_for(gate)
    params = models.stage_parameters(stage, jnp.bfloat16)
    for wanted in batches:
        rows = wanted
        while rows >= 1:
            program, first = first or (lambda: compiled(stage, sampling, rows)), None
            timing, message = measuring.tried(lambda: timed(stage, params, program, rows))
            if timing:
                timing["guidance"] = sampling["w"]
                emit("drawn", wanted=wanted, batch=rows, **extrapolated(timing, wanted, rows, full))
                break
            emit("too_large", batch=rows, message=message)
            rows //= 2


def inputs(stage: package.Stage, rows: int) -> dict[str, Any]:
    """Shapes and dtypes of the inputs for `rows` images."""
    shapes = stage.batch_shapes(rows, stage.largest_bucket)
    shapes = {k: v for k, v in shapes.items() if k.startswith("text")}
    if stage.lowres_size:
        shapes["lowres"] = ((rows, stage.lowres_size, stage.lowres_size, 3), jnp.uint8)
    return shapes


def keys_of(rows: int) -> jax.Array:
    """One key for each image."""
    return jax.random.split(jax.random.key(0, impl="threefry2x32"), rows)


def compiled(stage: package.Stage, sampling: dict[str, Any], rows: int) -> tuple[Any, float]:
    """(program that samples `rows` images with few steps, seconds of its compilation)."""
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in inputs(stage, rows).items()}
    keys = jax.eval_shape(lambda: keys_of(rows))
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    params = jax.eval_shape(lambda: models.parameters(shapes, jnp.bfloat16))
    size = stage.image_size, stage.image_size
    sample = lambda p, k, b: package.to_uint8(stage.sample(p, k, b, sampling, size))
    started = time.monotonic()
    program = jax.jit(sample).lower(params, keys, batch).compile()
    return program, time.monotonic() - started


def timed(stage: package.Stage, params: Any, pair: Any, rows: int) -> dict[str, Any]:
    """Seconds of a call of a program.

    pair: (program, seconds of its compilation), or a call that returns them.
    """
    program, compile_s = pair() if callable(pair) else pair
    batch = jax.device_put(models.synthetic_batch(inputs(stage, rows)))
    keys = keys_of(rows)
    jax.block_until_ready(program(params, keys, batch))
    times = [measuring.seconds_of(lambda: program(params, keys, batch)) for _ in range(REPEATS)]
    return measuring.median(times) | {"compile_s": compile_s}


def extrapolated(timing: dict[str, Any], wanted: int, rows: int, full: int) -> dict[str, Any]:
    """The times, extrapolated to all steps and to `wanted` images in batches of `rows`."""
    batch_s = timing["seconds"] * full / STEPS * wanted / rows
    memory = {"peak_bytes": measuring.memory_peak(), "steps": STEPS, "full_steps": full}
    return timing | memory | {"full_seconds": batch_s, "images_per_s": wanted / batch_s}
