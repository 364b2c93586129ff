"""Memory of this process and of its devices, for the rows of metrics."""

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

GIB = 2**30


def memory_metrics(devices: Sequence[Any] | None = None) -> dict[str, float]:
    """Memory in GiB; a name is missing where the system or the backend does not tell.

    `memory/host_gib`, `memory/host_peak_gib`: resident memory of this process, without those of its
    data workers. `memory/device_gib`, `memory/device_peak_gib`: allocated memory of the device that
    has most of it. Does not wait for a device.

    devices: None for those of this process.
    """
    metrics = {}
    if (resident := _resident()) is not None:
        metrics["memory/host_gib"] = resident / GIB
        metrics["memory/host_peak_gib"] = max(resident, _peak()) / GIB
    found = jax.local_devices() if devices is None else devices
    stats = [device.memory_stats() or {} for device in found]
    names = {"memory/device_gib": "bytes_in_use", "memory/device_peak_gib": "peak_bytes_in_use"}
    for name, key in names.items():
        if values := [one[key] for one in stats if key in one]:
            metrics[name] = max(values) / GIB
    return metrics


def _resident() -> int | None:
    """Resident bytes of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    """The most resident bytes that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
