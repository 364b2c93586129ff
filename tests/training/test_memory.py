"""The memory in a row of metrics."""

import os

import jax
import numpy as np

from imagen_jax.training.memory import GIB, memory_metrics


class Device:
    def __init__(self, **stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats or None


def test_devices():
    """Catches the memory of the first device, of all together, and a peak of another device."""
    devices = [
        Device(bytes_in_use=2 * GIB, peak_bytes_in_use=3 * GIB),
        Device(bytes_in_use=GIB, peak_bytes_in_use=5 * GIB),
    ]
    metrics = memory_metrics(devices)
    assert metrics["memory/device_gib"] == 2 and metrics["memory/device_peak_gib"] == 5
    metrics = memory_metrics([Device(bytes_in_use=GIB, pool_bytes=2)])
    assert metrics["memory/device_gib"] == 1 and "memory/device_peak_gib" not in metrics
    assert {name.split("_")[0] for name in memory_metrics([Device()])} == {"memory/host"}
    assert memory_metrics().keys() >= memory_metrics(jax.local_devices()[:0]).keys()


def test_host():
    """Catches pages or KiB taken for bytes, and a peak below the present."""
    before = memory_metrics([])
    block = np.ones(300 * 2**20, np.uint8)
    after = memory_metrics([])
    grown = (after["memory/host_gib"] - before["memory/host_gib"]) * GIB
    assert 0.9 * block.nbytes < grown < 1.2 * block.nbytes
    block_gib = block.nbytes / GIB
    del block
    last = memory_metrics([])
    assert last["memory/host_peak_gib"] > 0.95 * after["memory/host_gib"]
    assert last["memory/host_gib"] < after["memory/host_gib"] - 0.9 * block_gib
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert before["memory/host_gib"] * GIB < memory
