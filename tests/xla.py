"""Flags of XLA for the tests, to be set before jax starts."""

import importlib.metadata

# A third of the compile time; the programs run for milliseconds.
FAST_COMPILE = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # jaxlib 0.11 does not know the first. The second saves a quarter of the rest: small programs
    # need no parallel code generation.
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
    FAST_COMPILE += " --xla_cpu_parallel_codegen_split_count=1"


def flags(devices: int = 1) -> str:
    """XLA_FLAGS for a process with this many virtual CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}"
