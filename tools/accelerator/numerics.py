"""Checks the device's numerics: bf16 against fp32, and its sampler against a CPU's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tools.accelerator import measuring, models, package

BF16_TOLERANCE = 0.05  # relative error of a network's output, in the Frobenius norm
SAMPLER_TOLERANCE = 1e-3  # largest difference of a pixel in [-1, 1]
SAMPLER_STEPS = 8
ROWS = 2


def run(emit: Callable, check: str, model: str, tiny: bool) -> None:
    """Runs a check: "bf16" (of `model`) or "sampler" (of the embedded base)."""
    emit("about", **measuring.about())
    if check == "bf16":
        emit("check", **bf16(model, tiny))
    else:
        for method in ("ddim", "ancestral"):
            emit("check", **sampler(method))


def bf16(model: str, tiny: bool) -> dict[str, Any]:
    """The relative difference between a network's outputs in bf16 and in fp32."""
    outputs = []
    for dtype in ("float32", "bfloat16"):
        stage = package.create_stage(models.stage_config(model, tiny, dtype=dtype))
        shapes = stage.batch_shapes(ROWS, stage.largest_bucket)
        cond = stage.cond(jax.device_put(models.synthetic_batch(shapes)))
        if stage.lowres_size:
            cond["lowres_logsnr"] = jnp.array([3.0, -1.0])
        z = models.hashed(shapes["image"][0], 1)
        params = models.stage_parameters(stage)
        apply = jax.jit(lambda p, z, cond, s=stage: s.denoiser(p)(z, jnp.array([1.0, -2.0]), cond))
        with jax.default_matmul_precision("highest"):
            outputs.append(np.asarray(apply(params, z, cond), np.float64))
    fp32, low = outputs
    error = np.linalg.norm(low - fp32) / np.linalg.norm(fp32)
    return judged(f"{model} in bf16 against fp32", error, BF16_TOLERANCE)


def sampler(method: str) -> dict[str, Any]:
    """The largest pixel difference between the embedded base sampled here and on a CPU, in fp32."""
    config = package.config("base_64", "demo")
    sampling = config["sampling"] | {"method": method, "steps": SAMPLER_STEPS, "w": 3.0}
    stage, params = package.embedded_base(sampling)
    size = stage.largest_bucket
    shapes = {k: v for k, v in stage.batch_shapes(ROWS, size).items() if k.startswith("text")}
    batch = models.synthetic_batch(shapes)
    batch["text"] = np.where(batch["text_mask"][..., None], batch["text"], 0)
    samples = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            here = jax.device_put((params, batch), device)
            keys = jax.random.split(jax.random.key(1, impl="threefry2x32"), ROWS)
            sample = jax.jit(lambda p, k, b: stage.sample(p, k, b, sampling, size))
            samples.append(np.asarray(sample(here[0], keys, here[1]), np.float64))
    error = np.abs(samples[0] - samples[1]).max()
    return judged(f"{method}, {SAMPLER_STEPS} steps, against the CPU", error, SAMPLER_TOLERANCE)


def judged(name: str, error: float, tolerance: float) -> dict[str, Any]:
    """A check's record."""
    return {
        "check": name,
        "error": float(error),
        "tolerance": tolerance,
        "passed": bool(error <= tolerance),
    }
