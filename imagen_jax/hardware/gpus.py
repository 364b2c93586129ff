"""Descriptions of GPUs for XLA, which let it compile for a GPU that this machine does not have.

The format is a text protocol buffer, `GpuTargetConfigProto`.
"""

import dataclasses
from collections.abc import Mapping

from imagen_jax.hardware.chips import Chip

GUIDE = "docs.nvidia.com/cuda/cuda-programming-guide, compute capabilities"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet and the table of its compute capability. Sizes are in bytes.

    Fields:
        title: device name as the driver reports it.
        capability: compute capability (major, minor).
        cores: number of streaming multiprocessors (SM).
        fp32_units: fp32 units per SM.
        clock_ghz: boost clock.
        l2: L2 cache.
        shared: shared memory per SM.
        shared_per_block: shared memory that one block may request.
        source: where the numbers are from.
        threads: resident threads per SM.
    """

    title: str
    capability: tuple[int, int]
    cores: int
    fp32_units: int
    clock_ghz: float
    l2: int
    shared: int
    shared_per_block: int
    source: str
    threads: int = 2048


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(
        title="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        fp32_units=64,
        clock_ghz=1.41,
        l2=40 << 20,
        shared=164 << 10,
        shared_per_block=163 << 10,
        source=f"NVIDIA A100 architecture white paper; {GUIDE}",
    ),
    "h100": Gpu(
        title="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        fp32_units=128,
        clock_ghz=1.98,
        l2=50 << 20,
        shared=228 << 10,
        shared_per_block=227 << 10,
        source=f"NVIDIA H100 architecture white paper; {GUIDE}",
    ),
    "h200": Gpu(
        title="NVIDIA H200",
        capability=(9, 0),
        cores=132,
        fp32_units=128,
        clock_ghz=1.98,
        l2=50 << 20,
        shared=228 << 10,
        shared_per_block=227 << 10,
        source=f"NVIDIA H200 data sheet; {GUIDE}",
    ),
    "rtx4090": Gpu(
        title="NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        cores=128,
        fp32_units=128,
        clock_ghz=2.52,
        l2=72 << 20,
        shared=100 << 10,
        shared_per_block=99 << 10,
        source=f"NVIDIA Ada GPU architecture white paper, Appendix A; {GUIDE}",
        threads=1536,
    ),
}
# The same for the compute capabilities 8.0, 8.9 and 9.0.
LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
    "shared_memory_per_block": 48 << 10,
}
# The versions in the CUDA 12 wheels of jax 0.10.
SOFTWARE = "dnn_version_info { major: 9 minor: 8 }\nruntime_version { major: 12 minor: 9 }"


def target(chip: Chip) -> str:
    """The target description of a GPU."""
    gpu = GPUS[chip.name]
    fields = LIMITS | {
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fp32_units,
        "threads_per_core_limit": gpu.threads,
        "clock_rate_ghz": gpu.clock_ghz,
        "l2_cache_size": gpu.l2,
        "shared_memory_per_core": gpu.shared,
        "shared_memory_per_block_optin": gpu.shared_per_block,
        "memory_bandwidth": int(chip.memory_bandwidth),
        "device_memory_size": int(chip.memory),
    }
    lines = "\n".join(f"  {name}: {value}" for name, value in fields.items())
    major, minor = gpu.capability
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{\n{lines}\n{capability}\n}}\nplatform_name:"
        f' "CUDA"\ndevice_description_str: "{gpu.title}"\n{SOFTWARE}\n'
    )
