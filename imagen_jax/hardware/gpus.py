"""What XLA has to be told of a GPU that is not there to compile for it: its target description, a
text protocol buffer (`GpuTargetConfigProto`).
"""

import dataclasses
from collections.abc import Mapping

from imagen_jax.hardware.chips import Chip

GUIDE = "docs.nvidia.com/cuda/cuda-programming-guide, compute capabilities"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet and the table of its compute capability have it. Sizes in bytes, the
    clock in GHz.
    """

    title: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    units: int  # fp32, a core
    clock_ghz: float  # boost
    l2: int
    shared: int  # memory a core
    shared_most: int  # a block may ask for
    source: str


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        108,
        64,
        1.41,
        40 << 20,
        164 << 10,
        163 << 10,
        f"NVIDIA A100 architecture white paper; {GUIDE}",
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        132,
        128,
        1.98,
        50 << 20,
        228 << 10,
        227 << 10,
        f"NVIDIA H100 architecture white paper; {GUIDE}",
    ),
    "h200": Gpu(
        "NVIDIA H200",
        (9, 0),
        132,
        128,
        1.98,
        50 << 20,
        228 << 10,
        227 << 10,
        f"NVIDIA H200 data sheet; {GUIDE}",
    ),
}
# The same in every compute capability from 8.0 to 9.0.
LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
    "shared_memory_per_block": 48 << 10,
}
# of the CUDA 12 wheels of jax 0.10
SOFTWARE = "dnn_version_info { major: 9 minor: 8 }\nruntime_version { major: 12 minor: 9 }"


def target(chip: Chip) -> str:
    """The target description of a GPU."""
    gpu = GPUS[chip.name]
    fields = LIMITS | {
        "core_count": gpu.cores,
        "fpus_per_core": gpu.units,
        "clock_rate_ghz": gpu.clock_ghz,
        "l2_cache_size": gpu.l2,
        "shared_memory_per_core": gpu.shared,
        "shared_memory_per_block_optin": gpu.shared_most,
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
