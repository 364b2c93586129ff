"""Data sheets of accelerators: peak rates, memory, clock and links, each with its source.

Also the peak rate of the devices of this machine.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

GIB = 2**30
CLOUD = "docs.cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """The data sheet of one JAX device. Sizes are in bytes, rates per second.

    A TPU device is a chip; on v4 and v5p it has two TensorCores.

    Two columns describe memory:

        memory         capacity by the data sheet. TPU pages print GB or GiB and mean GiB (their
                       chips have that many binary gigabytes); NVIDIA's GB are 10^9 bytes.
        memory_limit   bytes that a program may use. TPU: the limit in the out-of-memory message of
                       the compiler, "exceeds available HBM (15.75G)", where G is GiB (libtpu
                       0.0.42). GPU: an estimate, capacity less a reserve for the driver's context,
                       collective buffers and convolution workspaces.

    The limit of v5p is above its capacity, because the page rounds the capacity down to whole GiB.

    Fields:
        name: as in the name of a topology.
        device_kinds: values of `jax.Device.device_kind`; other cards of the generation differ.
        platform: "tpu" or "cuda".
        peak_flops: dense bf16 FLOP/s.
        memory: capacity, see above.
        memory_limit: bytes that a program may use, see above.
        memory_bandwidth: bytes/s of device memory.
        link_bandwidth: bytes/s of one link, one way.
        network_bandwidth: bytes/s, one chip's share of the network between slices or nodes.
        chips_per_host: number of chips of a host or node.
        source: where the numbers are from.
        flops_per_cycle: of all matrix units; 0 if the compiler gives no cycle estimates.
        cores: TensorCores of a TPU chip; with two, slices are named by their number of cores.
    """

    name: str
    device_kinds: tuple[str, ...]
    platform: str
    peak_flops: float
    memory: float
    memory_limit: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    chips_per_host: int
    source: str
    flops_per_cycle: int = 0
    cores: int = 1

    @property
    def clock(self) -> float:
        """Cycles per second, which turn the compiler's cycle estimates into seconds."""
        return self.peak_flops / self.flops_per_cycle if self.flops_per_cycle else float("nan")


def _flops_per_cycle(side: int, units: int) -> int:
    """FLOP per cycle of `units` matrix units of side x side multiply-adds."""
    return units * side * side * 2


# Matrix units: four of 128 x 128 per core on v4, v5e and v5p; four of 256 x 256 on v6e. (Versions
# of the v6e page say two or four. With two, estimates of matrix products would exceed the peak.)
CHIPS = (
    Chip(
        name="v4",
        device_kinds=("TPU v4",),
        platform="tpu",
        peak_flops=275e12,
        memory=32 * GIB,
        memory_limit=30.75 * GIB,
        memory_bandwidth=1200e9,
        link_bandwidth=50e9,
        network_bandwidth=3.1e9,
        chips_per_host=4,
        source=CLOUD + "v4; links: Jouppi et al. 2023, TPU v4, Table 4",
        flops_per_cycle=_flops_per_cycle(128, units=8),
        cores=2,
    ),
    Chip(
        name="v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        platform="tpu",
        peak_flops=197e12,
        memory=16 * GIB,
        memory_limit=15.75 * GIB,
        memory_bandwidth=819e9,
        link_bandwidth=50e9,
        network_bandwidth=3.1e9,
        chips_per_host=4,
        source=CLOUD + "v5e: 400 GB/s both ways over 4 links, 2 x 100 Gbit/s per host of 8",
        flops_per_cycle=_flops_per_cycle(128, units=4),
    ),
    Chip(
        name="v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        platform="tpu",
        peak_flops=459e12,
        memory=95 * GIB,
        memory_limit=95.74 * GIB,
        memory_bandwidth=2765e9,
        link_bandwidth=100e9,
        network_bandwidth=6.25e9,
        chips_per_host=4,
        source=CLOUD + "v5p: 1200 GB/s both ways over 6 links, 50 Gbit/s per chip",
        flops_per_cycle=_flops_per_cycle(128, units=8),
        cores=2,
    ),
    Chip(
        name="v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        platform="tpu",
        peak_flops=918e12,
        memory=32 * GIB,
        memory_limit=31.25 * GIB,
        memory_bandwidth=1638e9,
        link_bandwidth=100e9,
        network_bandwidth=12.5e9,
        chips_per_host=4,
        source=CLOUD + "v6e: 800 GB/s both ways over 4 links, 4 x 200 Gbit/s per host of 8",
        flops_per_cycle=_flops_per_cycle(256, units=4),
    ),
    # All A100 cards have the same peak; plans assume the memory of the 80 GB SXM card.
    Chip(
        name="a100",
        device_kinds=(
            "NVIDIA A100-SXM4-80GB",
            "NVIDIA A100-SXM4-40GB",
            "NVIDIA A100 80GB PCIe",
            "NVIDIA A100-PCIE-40GB",
        ),
        platform="cuda",
        peak_flops=312e12,
        memory=80e9,
        memory_limit=74 * GIB,
        memory_bandwidth=2039e9,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        chips_per_host=8,
        source="NVIDIA A100 80GB SXM data sheet; network: DGX A100, 8 x 200 Gbit/s",
    ),
    Chip(
        name="h100",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        platform="cuda",
        peak_flops=989e12,
        memory=80e9,
        memory_limit=74 * GIB,
        memory_bandwidth=3350e9,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        chips_per_host=8,
        source="NVIDIA H100 SXM data sheet; network: DGX H100, 8 x 400 Gbit/s",
    ),
    Chip(
        name="h200",
        device_kinds=("NVIDIA H200",),
        platform="cuda",
        peak_flops=989e12,
        memory=141e9,
        memory_limit=126 * GIB,
        memory_bandwidth=4800e9,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        chips_per_host=8,
        source="NVIDIA H200 SXM data sheet; network: DGX H200, 8 x 400 Gbit/s",
    ),
    # The peak is that with fp32 accumulation, half of the card's peak with fp16 accumulation.
    Chip(
        name="rtx4090",
        device_kinds=("NVIDIA GeForce RTX 4090",),
        platform="cuda",
        peak_flops=165.2e12,
        memory=24e9,
        memory_limit=21 * GIB,
        memory_bandwidth=1008e9,
        link_bandwidth=32e9,
        network_bandwidth=1.25e9,
        chips_per_host=8,
        source="NVIDIA Ada GPU architecture white paper, Appendix A; links: PCIe 4.0 x16; network:"
        " 10 Gbit/s is assumed",
    ),
)


def by_name(name: str) -> Chip:
    """The chip of this name. Raises ValueError with the valid names."""
    chips = {chip.name: chip for chip in CHIPS}
    if name not in chips:
        raise ValueError(f"unknown chip {name!r}; use one of {', '.join(chips)}")
    return chips[name]


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """The peak FLOP/s of a device, and the source of the number.

    A CPU has no published peak: its fp32 matrix product is timed (0.2 s). A device that is not in
    `CHIPS` gives (nan, reason), for example an H100 PCIe, which is slower than the SXM card, or a
    MIG slice of a GPU.
    """
    if device.platform == "cpu":
        return _matmul_rate() / jax.local_device_count(), "measured: fp32 matrix product, all cores"
    chips = {kind: chip for chip in CHIPS for kind in chip.device_kinds}
    if device.device_kind not in chips:
        return float("nan"), f"no published peak for {device.device_kind!r} in hardware/chips.py"
    return chips[device.device_kind].peak_flops, "data sheet, dense bf16"


def _matmul_rate() -> float:
    """FLOP/s of an fp32 matrix product n x n x n on this machine, the best of 0.2 s."""
    n = 1024
    a = jnp.ones((n, n))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best, end = float("inf"), time.perf_counter() + 0.2
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
