"""Facts of the device and of compiled programs, and medians of times."""

import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tools.accelerator.task import is_out_of_memory

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "diffusers")
SPARE = 0.98  # share of the allocator's memory that a compiled program may need


def about() -> dict[str, Any]:
    """The device and the versions of the libraries."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "memory_bytes": memory_limit(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The installed libraries among LIBRARIES."""
    installed = {}
    for name in LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def memory_limit() -> int | None:
    """Bytes that this process may allocate on its device; None if unknown."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def memory_peak() -> int | None:
    """Peak bytes that this process has allocated on its device; None if unknown."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def compiled_bytes(compiled: Any) -> dict[str, int]:
    """The compiler's figures of a program: its peak memory and its total allocation."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    held = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    allocated = held + analysis.temp_size_in_bytes
    peak = getattr(analysis, "peak_memory_in_bytes", 0) or allocated
    return {"compiler_peak_bytes": int(peak), "compiler_allocated_bytes": int(allocated)}


def fits(analysis: dict[str, int]) -> bool:
    """Whether a program of these `compiled_bytes` fits the device; True if unknown."""
    limit = memory_limit()
    return not analysis or limit is None or max(analysis.values()) <= SPARE * limit


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call, waiting for its arrays."""
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def median(times: list[float]) -> dict[str, float]:
    """Median and extremes of times in seconds."""
    middle = statistics.median(times)
    return {"seconds": middle, "fastest": min(times), "slowest": max(times), "repeats": len(times)}


def wait_for(gate: str) -> float:
    """Waits for the file `gate`; the time.monotonic() until which this process may measure.

    Ends the process if the process that opens the gate has ended.
    """
    parent = os.getppid()
    while gate and not Path(gate).exists():
        if os.getppid() != parent:
            sys.exit("the process that opens the gate has ended")
        time.sleep(0.05)
    return time.monotonic() + (float(Path(gate).read_text()) if gate else 0.0)


def tried(call: Callable[[], Any]) -> tuple[Any, str]:
    """(result, "") of a call, or (None, message) if memory ran out."""
    try:
        return call(), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None, str(error).splitlines()[0][:200]
