"""The hosts of a topology and its names in each cloud, with sources.

The names are accelerator types, node labels and runtime images. Chip counts and tori are those of
imagen_jax.hardware.topology.
"""

import dataclasses
import math

from imagen_jax.hardware.topology import Topology

CLOUD = "docs.cloud.google.com/"


@dataclasses.dataclass(frozen=True)
class Names:
    """A chip's names, without counts.

    accelerator_type, runtime: of `gcloud compute tpus`. gke: value of the node label that GKE
    selects by; empty if GKE does not offer the chip. sky: SkyPilot's accelerator.
    """

    accelerator_type: str
    runtime: str
    gke: str
    sky: str


# Runtimes: CLOUD + tpu/docs/runtimes. Labels: CLOUD + kubernetes-engine/docs/concepts/plan-tpus,
# and .../how-to/gpus for GPUs. SkyPilot: `sky gpus list`.
NAMES = {
    "v4": Names("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", "tpu-v4"),
    "v5e": Names("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "tpu-v5litepod"),
    "v5p": Names("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", "tpu-v5p"),
    "v6e": Names("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", "tpu-v6e"),
    "a100": Names("", "", "nvidia-a100-80gb", "A100-80GB"),
    "h100": Names("", "", "nvidia-h100-80gb", "H100"),
    "h200": Names("", "", "nvidia-h200-141gb", "H200"),
    "rtx4090": Names("", "", "", "RTX4090"),
}
# A 2x4 slice of v5e or v6e is one host with eight chips; hosts of larger slices have four (CLOUD +
# tpu/docs/v5e, v6e).
ONE_HOST = 8


@dataclasses.dataclass(frozen=True)
class Machines:
    """`slices` x `hosts` machines with `chips` chips each.

    The nodes of a GPU cluster are one slice.
    """

    slices: int
    hosts: int
    chips: int

    @property
    def total(self) -> int:
        """Number of machines."""
        return self.slices * self.hosts


def of(topology: Topology) -> Machines:
    """The machines of a topology. Raises ValueError if no cloud offers them."""
    if topology.chip.platform == "cuda":
        nodes, gpus = topology.shape
        return Machines(1, topology.slices * nodes, gpus)
    chips = math.prod(topology.shape)
    one_host = len(topology.shape) == 2 and chips <= ONE_HOST
    per_host = chips if one_host else topology.chip.chips_per_host
    if chips % per_host:
        raise ValueError(
            f"--topology {topology}: {chips} chips do not divide into hosts of {per_host}"
        )
    return Machines(topology.slices, chips // per_host, per_host)


def accelerator_type(topology: Topology) -> str:
    """One slice as `gcloud compute tpus` names it: v5litepod-256 (chips), v5p-512 (cores)."""
    return f"{NAMES[topology.chip.name].accelerator_type}-{_count(topology)}"


def sky_accelerator(topology: Topology) -> str:
    """One slice, or the GPUs of one node, as SkyPilot names it: tpu-v5litepod-256:1, H100:8."""
    name = NAMES[topology.chip.name].sky
    if topology.chip.platform == "tpu":
        return f"{name}-{_count(topology)}:1"
    return f"{name}:{topology.shape[1]}"


def _count(topology: Topology) -> int:
    """Size of a slice as clouds count it: chips, or cores if a chip has two."""
    return math.prod(topology.shape) * topology.chip.cores
