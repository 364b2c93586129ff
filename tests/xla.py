"""Flags of XLA for the tests, to be set before jax starts."""

import importlib.metadata

# A third of the compile time; the programs run for milliseconds.
FAST_COMPILE = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # jaxlib 0.11 does not know it


def flags(devices: int = 1) -> str:
    """XLA_FLAGS for a process with this many virtual CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}"
