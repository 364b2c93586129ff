"""How long one stage of the cascade takes to draw, at the paper's size, with random bf16 weights.

A few steps are timed and multiplied: every step of a sampler costs the same.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tools.accelerator import measuring, models, package

STEPS, REPEATS = 8, 3


def run(emit: Callable, model: str, batches: Sequence[int], tiny: bool) -> None:
    """Times STEPS guided steps of a stage for each batch, halved until it fits."""
    emit("about", **measuring.about())
    config = models.stage_config(model, tiny)
    stage = package.create_stage(config)
    params = models.stage_parameters(stage, jnp.bfloat16)
    sampling = dict(config["sampling"])
    full, sampling["steps"] = sampling["steps"], STEPS
    for wanted in batches:
        rows = wanted
        while rows >= 1:
            found, message = measuring.tried(lambda: timed(stage, params, sampling, rows))
            if found:
                emit("drawn", wanted=wanted, batch=rows, **extrapolated(found, wanted, rows, full))
                break
            emit("too_large", batch=rows, message=message)
            rows //= 2


def timed(stage: package.Stage, params: Any, sampling: dict[str, Any], rows: int) -> dict[str, Any]:
    """Seconds of one program that draws `rows` images with few steps."""
    shapes = {k: v for k, v in stage.batch_shapes(rows).items() if k.startswith("text")}
    if stage.lowres_size:
        shapes["lowres"] = ((rows, stage.lowres_size, stage.lowres_size, 3), jnp.uint8)
    batch = jax.device_put(models.synthetic_batch(shapes))
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), rows)
    draw = lambda p, k, b: package.to_uint8(stage.sample(p, k, b, sampling))
    started = time.monotonic()
    compiled = jax.jit(draw).lower(params, keys, batch).compile()
    compile_s = time.monotonic() - started
    jax.block_until_ready(compiled(params, keys, batch))
    times = [measuring.seconds_of(lambda: compiled(params, keys, batch)) for _ in range(REPEATS)]
    return measuring.median(times) | {"compile_s": compile_s, "guidance": sampling["w"]}


def extrapolated(found: dict[str, Any], wanted: int, rows: int, full: int) -> dict[str, Any]:
    """The times with those of all steps, for `wanted` images drawn `rows` at once."""
    batch_s = found["seconds"] * full / STEPS * wanted / rows
    memory = {"peak_bytes": measuring.memory_peak(), "steps": STEPS, "full_steps": full}
    return found | memory | {"full_seconds": batch_s, "images_per_s": wanted / batch_s}
