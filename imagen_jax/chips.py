"""Peak arithmetic rates, the denominator of MFU."""

import time

import jax
import jax.numpy as jnp

# Dense bf16 FLOP/s of one JAX device, from the vendors' data sheets (Google Cloud "TPU v4/v5e/v5p/v6e"; NVIDIA A100, H100, H200 SXM).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """(FLOP/s of one device, where the number is from). A CPU has no published one: its fp32 matrix product is timed (0.2 s).

    The longest name in the table that the device's kind starts with decides; an unknown device gives (nan, reason).
    """
    if device.platform == "cpu":
        return _matmul_rate() / jax.local_device_count(), "measured: fp32 matrix product, all cores"
    known = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    if not known:
        return float("nan"), f"no published peak for {device.device_kind!r} in chips.PEAK_FLOPS"
    return PEAK_FLOPS[max(known, key=len)], "data sheet, dense bf16"


def _matmul_rate(n: int = 1024) -> float:
    a = jnp.ones((n, n))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best, end = float("inf"), time.perf_counter() + 0.2
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
