"""Flags of XLA for the tests, to be set before jax starts."""

# A third of the compile time; the programs run for milliseconds.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def flags(devices: int = 1) -> str:
    """XLA_FLAGS for a process with this many virtual CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}"
