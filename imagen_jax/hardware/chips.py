"""Facts about accelerators: peak rates, memory, clock and links, each with its source; and the peak
of the devices that are here.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

GIB = 2**30
CLOUD = "docs.cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind, which on TPUs is a chip (v4 and v5p: both its cores).

    Rates a second. `memory_limit` is what a program may use: of a TPU what its compiler allows, of
    a GPU what its memory is less a reserve for the context, the collectives' buffers and
    convolution workspaces. `links` are links to neighbours, each of `link_bandwidth` bytes a second
    one way; of a GPU its NVLink as one. `network_bandwidth` is a chip's share of what leaves its
    slice or node. `clock` turns the compiler's cycles into seconds: peak_flops over the FLOP that
    the matrix units do a cycle.
    """

    name: str
    device_kinds: tuple[
        str, ...
    ]  # what `jax.Device.device_kind` is: cards of the same generation have other peaks
    platform: str
    peak_flops: float  # dense bf16
    memory: float
    memory_limit: float
    memory_bandwidth: float
    links: int
    link_bandwidth: float
    network_bandwidth: float
    chips_per_host: int
    source: str
    flops_per_cycle: int = 0  # of the matrix units; 0: no cycle estimates for this chip
    # TensorCores of a TPU chip, which share a program's work; names of slices count them where
    # there are two
    cores: int = 1

    @property
    def clock(self) -> float:
        return self.peak_flops / self.flops_per_cycle if self.flops_per_cycle else float("nan")


# Memory limits of TPUs are those of the compiler's own out-of-memory message. Matrix units: 128 x
# 128, 2 FLOP each, four a core, of which v4 and v5p have two; v6e 256 x 256, four (its page says
# two, with which the compiler's estimates of matrix products would be above peak).
CHIPS = (
    Chip(
        "v4",
        ("TPU v4",),
        "tpu",
        275e12,
        32 * GIB,
        30.75 * GIB,
        1200e9,
        6,
        50e9,
        3.1e9,
        4,
        CLOUD + "v4; links: Jouppi et al. 2023, TPU v4, Table 4",
        2 * 4 * 128 * 128 * 2,
        cores=2,
    ),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        "tpu",
        197e12,
        16e9,
        15.75 * GIB,
        819e9,
        4,
        50e9,
        3.1e9,
        4,
        CLOUD + "v5e: 400 GB/s both ways over 4 links, 2 x 100 Gbit/s a host of 8",
        4 * 128 * 128 * 2,
    ),
    Chip(
        "v5p",
        ("TPU v5", "TPU v5p"),
        "tpu",
        459e12,
        95 * GIB,
        95.74 * GIB,
        2765e9,
        6,
        100e9,
        6.25e9,
        4,
        CLOUD + "v5p: 1200 GB/s both ways over 6 links, 50 Gbit/s a chip",
        2 * 4 * 128 * 128 * 2,
        cores=2,
    ),
    Chip(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        "tpu",
        918e12,
        32e9,
        31.25 * GIB,
        1638e9,
        4,
        100e9,
        12.5e9,
        4,
        CLOUD + "v6e: 800 GB/s both ways over 4 links, 4 x 200 Gbit/s a host of 8",
        4 * 256 * 256 * 2,
    ),
    # All cards of the A100 have one peak; planned for are those of 80 GB.
    Chip(
        "a100",
        (
            "NVIDIA A100-SXM4-80GB",
            "NVIDIA A100-SXM4-40GB",
            "NVIDIA A100 80GB PCIe",
            "NVIDIA A100-PCIE-40GB",
        ),
        "cuda",
        312e12,
        80e9,
        74 * GIB,
        2039e9,
        1,
        300e9,
        25e9,
        8,
        "NVIDIA A100 80GB SXM data sheet; network: DGX A100, 8 x 200 Gbit/s",
    ),
    Chip(
        "h100",
        ("NVIDIA H100 80GB HBM3",),
        "cuda",
        989e12,
        80e9,
        74 * GIB,
        3350e9,
        1,
        450e9,
        50e9,
        8,
        "NVIDIA H100 SXM data sheet; network: DGX H100, 8 x 400 Gbit/s",
    ),
    Chip(
        "h200",
        ("NVIDIA H200",),
        "cuda",
        989e12,
        141e9,
        126 * GIB,
        4800e9,
        1,
        450e9,
        50e9,
        8,
        "NVIDIA H200 SXM data sheet; network: DGX H200, 8 x 400 Gbit/s",
    ),
)


def by_name(name: str) -> Chip:
    """The chip of that name. Raises ValueError with the names there are."""
    known = {chip.name: chip for chip in CHIPS}
    if name not in known:
        raise ValueError(f"no facts about a chip {name!r}; known are {', '.join(known)}")
    return known[name]


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """(FLOP/s of one device, where the number is from). A CPU has no published one: its fp32 matrix
    product is timed (0.2 s).

    A device that is not in the table gives (nan, reason): so do an H100 PCIe, which is slower than
    the SXM one, and a part of a GPU (MIG).
    """
    if device.platform == "cpu":
        return _matmul_rate() / jax.local_device_count(), "measured: fp32 matrix product, all cores"
    known = {kind: chip for chip in CHIPS for kind in chip.device_kinds}
    if device.device_kind not in known:
        return float("nan"), f"no published peak for {device.device_kind!r} in hardware/chips.py"
    return known[device.device_kind].peak_flops, "data sheet, dense bf16"


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
