"""Measures the train step of one network at the largest batch that fits.

The batch is on the device and synthetic; text features are given, no text encoder runs.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from tools.accelerator import analytic, kernels, measuring, models, package

RUNGS = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
UNKNOWN = 16  # the first batch where the device's memory is not known
FILL = 0.8  # share of the memory that the analytic estimate may fill; processes beside hold some
STEPS, EARLY = 20, 5
AGAIN = 1.5  # times the seconds of the first batch size that a second one may need


def run(
    emit: Callable,
    model: str,
    tiny: bool,
    gate: str = "",
    known: dict[str, Any] | None = None,
    batch: int = 0,
    fields: dict[str, Any] | None = None,
    attention: str = "",
) -> None:
    """Measures `model` at the largest batch that fits, or at `batch` only, without a profile.

    Compiles first, then waits for the file `gate` to name the seconds that it has from then on.
    `known` are its `analytic.facts`, if another process has them; `fields` replace fields of the
    model's config; `attention` "cudnn" replaces the attention function.
    """
    emit("about", **measuring.about())
    fields = fields or {}
    with attention_of(attention):
        if known is None:
            config, program = create(model, tiny, 1, fields)
            known = analytic.facts(config, program)
            emit("facts", model=model, **known)
        rows = batch or first_batch(known, tiny)
        config, program = create(model, tiny, rows, fields)
        started = time.monotonic()
        lowered = program.lower()
        trace_s = time.monotonic() - started
        end = 0.0

        def opened():
            nonlocal end
            end = measuring.wait_for(gate)

        started = time.monotonic()
        best = measured(emit, program, lowered, trace_s, known, not batch, opened)
        took = time.monotonic() - started
        while not best and not batch and (rows := smaller(rows)):
            best = at_batch(emit, model, tiny, rows, known, fields, profile=True)
        if not best:
            raise MemoryError(f"out of memory with a batch of {max(rows, 1)}")
        larger = 0 if batch else larger_batch(best, known)
        if larger and end - time.monotonic() > AGAIN * took:
            at_batch(emit, model, tiny, larger, known, fields, profile=False)


def create(
    model: str, tiny: bool, rows: int, fields: dict[str, Any]
) -> tuple[dict[str, Any], package.TrainProgram]:
    """(config, train program) of a network on the first device."""
    config = models.stage_config(model, tiny, rows, **fields)
    mesh = package.make_mesh(config["mesh"], jax.devices()[:1])
    return config, package.TrainProgram.create(config, mesh)


def first_batch(known: dict[str, Any], tiny: bool) -> int:
    """The largest rung that fits according to the shapes."""
    limit = measuring.memory_limit()
    if tiny:
        return 2
    if not limit:
        return UNKNOWN
    room = FILL * limit - known["held_bytes"]
    return next((rows for rows in RUNGS if rows * known["image_bytes"] <= room), 1)


def smaller(rows: int) -> int:
    """The largest rung of at most half as many rows; 0 after 1."""
    return next((rung for rung in RUNGS if rung <= rows // 2), 0)


def larger_batch(best: dict[str, Any], known: dict[str, Any]) -> int:
    """A larger rung that fits according to the compiler's figures of the first; 0 if none."""
    limit, peak = measuring.memory_limit(), best.get("compiler_allocated_bytes")
    if not (limit and peak):
        return 0
    held = known["held_bytes"] - known["parts"]["gradients"]
    an_image = max(1, peak - held) / best["batch"]
    rung = next((rows for rows in RUNGS if held + rows * an_image <= measuring.SPARE * limit), 0)
    return rung if rung > best["batch"] else 0


def at_batch(
    emit: Callable,
    model: str,
    tiny: bool,
    rows: int,
    known: dict[str, Any],
    fields: dict[str, Any],
    profile: bool,
) -> dict[str, Any] | None:
    """Traces and measures another batch size."""
    _, program = create(model, tiny, rows, fields)
    started = time.monotonic()
    lowered = program.lower()
    trace_s = time.monotonic() - started
    return measured(emit, program, lowered, trace_s, known, profile)


def measured(
    emit: Callable,
    program: package.TrainProgram,
    lowered: Any,
    trace_s: float,
    known: dict[str, Any],
    profile: bool,
    before_timing: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """Compiles and times one batch size; its last record, or None if it does not fit."""
    rows = next(iter(program.batch.values())).shape[0]
    started = time.monotonic()
    compiled, message = measuring.tried(lowered.compile)
    memory = measuring.compiled_bytes(compiled) if compiled else {}
    took = {"trace_s": trace_s, "compile_s": time.monotonic() - started}
    figures = {"batch": rows} | took | memory
    emit("compiled", **figures)
    if compiled is None or not measuring.fits(memory):
        emit("too_large", batch=rows, message=message)
        return None
    before_timing()
    result, message = measuring.tried(lambda: timed(emit, program, compiled, figures, known))
    if result is None:
        emit("too_large", batch=rows, message=message)
        return None
    state, batch, record = result
    if profile:
        try:
            emit("kernels", batch=rows, **traced(compiled, state, batch))
        except Exception as error:  # the times above stand without a profile
            emit("no_kernels", batch=rows, message=f"{type(error).__name__}: {error}"[:300])
    return record


def timed(
    emit: Callable,
    program: package.TrainProgram,
    compiled: Any,
    figures: dict[str, Any],
    known: dict[str, Any],
) -> tuple[Any, Any, dict[str, Any]]:
    """(state, batch, record) after STEPS timed steps; an early record is written on the way."""
    rows = figures["batch"]
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in program.batch.items()}
    shardings = {name: leaf.sharding for name, leaf in program.batch.items()}
    batch = jax.device_put(models.synthetic_batch(shapes), shardings)
    state = models.train_state(program)
    for _ in range(2):
        state, metrics = compiled(state, batch)
    loss, times = float(metrics["loss"]), []
    record = {}
    while len(times) < STEPS:
        started = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - started)
        if len(times) in (EARLY, STEPS):
            record = figures | measuring.median(times) | {"loss": loss}
            record |= rates(rows, record["seconds"], known)
            emit("step", **record)
    return state, batch, record


def rates(rows: int, seconds: float, known: dict[str, Any]) -> dict[str, Any]:
    """Images/s, MFU and memory of a step."""
    device = jax.devices()[0]
    figures: dict[str, Any] = {
        "images_per_s": rows / seconds,
        "peak_bytes": measuring.memory_peak(),
    }
    peak, source = package.peak_flops(device)
    flops = known["flops_per_image"]
    figures |= {"flops_per_image": flops, "mfu": rows * flops / seconds / peak, "peak": source}
    parts = known["held_bytes"] + rows * known["image_bytes"]
    return figures | {"parameters": known["parameters"], "analytic_bytes": parts}


def traced(compiled: Any, state: Any, batch: Any, steps: int = 3) -> dict[str, Any]:
    """The most expensive kernels of a few steps."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(steps):
                state, metrics = compiled(state, batch)
            jax.block_until_ready(metrics)
        return kernels.table(directory, steps)


def attention_of(kind: str) -> Any:
    """A context in which attention uses cuDNN's fused kernel ("cudnn") or is unchanged ("").

    The kernel stores no attention weights, so nothing is recomputed around it. Text keys follow the
    pixels and are padded at their end, so the number of valid keys identifies them.
    """
    if not kind:
        return contextlib.nullcontext()

    def attend(q, keys, heads):
        split = lambda a: a.reshape(*a.shape[:2], heads, a.shape[2] // heads)
        k, v = (jnp.concatenate([group[i] for group in keys], axis=1) for i in (0, 1))
        count = lambda k, valid: k.shape[1] if valid is None else jnp.sum(valid, axis=1)
        lengths = sum(count(k, valid) for k, _, valid in keys) + jnp.zeros(len(q), jnp.int32)
        out = jax.nn.dot_product_attention(
            split(q), split(k), split(v), key_value_seq_lengths=lengths, implementation=kind
        )
        return out.reshape(q.shape)

    return mock.patch.object(package.stages, "attention_on", lambda mesh, remat: attend)
