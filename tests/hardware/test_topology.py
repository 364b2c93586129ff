"""Names of topologies, and the data sheets that predictions rest on."""

import math
from unittest import mock

import jax
import pytest

from imagen_jax.hardware import chips, gpus, topology

TOPOLOGIES = {
    "v5e:16x16": ("v5e", (16, 16), 1, 256),
    "v5litepod-256": ("v5e", (16, 16), 1, 256),
    "v5e-8": ("v5e", (2, 4), 1, 8),
    "v5litepod-1": ("v5e", (1, 1), 1, 1),
    "v6e-256": ("v6e", (16, 16), 1, 256),
    "v4-512": ("v4", (4, 8, 8), 1, 256),
    "v5p:4x4x12": ("v5p", (4, 4, 12), 1, 192),
    "v5p-256": ("v5p", (4, 4, 8), 1, 128),
    "2xv5p-256": ("v5p", (4, 4, 8), 2, 256),
    "2xv5e:4x4": ("v5e", (4, 4), 2, 32),
    "h100-64": ("h100", (8, 8), 1, 64),
    "h100:4": ("h100", (1, 4), 1, 4),
    "a100:32x8": ("a100", (32, 8), 1, 256),
    "rtx4090:1": ("rtx4090", (1, 1), 1, 1),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_names_as_people_write_them(name):
    """Catches cores counted as chips (v4-512 has 256 chips), slices left out of the count, and an
    unknown alias.
    """
    parsed = topology.parse(name)
    assert (parsed.chip.name, parsed.shape, parsed.slices, parsed.chips) == TOPOLOGIES[name]


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5e:3x5", "no such slice of v5e; use one of 1x1, 2x2"),
        ("0xv5e:4x4", "0 slices"),
        ("v5e:32x32", "no such slice"),
        ("v4:4x4x6", "or another multiple of 4x4x4"),
        ("h100:2x16", "up to 8"),
        ("h100:8x8x8", "nodes x GPUs"),
        ("v5e", "use a name such as v5e:16x16"),
        ("v9-8", "unknown chip 'v9'; use one of v4, v5e"),
        ("v5e-100", "no slice of 100 v5e chips"),
        ("v5p:16x16", "has 3 dimensions, such as 8x16x16"),
        ("h100-12", "do not fill whole nodes of 8"),
    ],
)
def test_other_names_are_explained(name, message):
    """Catches a compiler error in place of the valid names."""
    with pytest.raises(ValueError, match=message):
        topology.parse(name)


def test_clocks():
    """Catches miscounted matrix units: the clocks that follow from the peaks must be those of the
    TPU papers and pages, 0.94 GHz to 1.75 GHz.
    """
    clocks = {
        chip.name: round(chip.clock / 1e9, 2) for chip in chips.CHIPS if chip.platform == "tpu"
    }
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}


# The limit that libtpu 0.0.42 prints when a program needs more memory, in GiB.
COMPILER_LIMITS = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}


def test_memory_limits_of_tpus():
    """Catches GB read as 10^9 bytes (a limit above the capacity), and a limit that is not the
    compiler's. The page of v5p rounds its capacity down to whole GiB.
    """
    tpus = {chip.name: chip for chip in chips.CHIPS if chip.platform == "tpu"}
    assert {name: chip.memory_limit / chips.GIB for name, chip in tpus.items()} == COMPILER_LIMITS
    for chip in tpus.values():
        assert 0.95 * chip.memory < chip.memory_limit < chip.memory + chips.GIB
        assert chip.memory % chips.GIB == 0


def test_memory_limits_of_gpus():
    """Catches a limit above the capacity, which leaves no room for context and workspaces."""
    for chip in chips.CHIPS:
        assert chip.platform == "tpu" or 0.9 * chip.memory < chip.memory_limit < chip.memory


def test_facts_are_complete():
    """Catches a chip without a source, and units that are wrong by a factor of a thousand."""
    for chip in chips.CHIPS:
        assert chip.source and 1e11 < chip.peak_flops < 1e16 and 1e11 < chip.memory_bandwidth < 1e13
        assert (
            1e10 < chip.memory_limit < 2e11
            and 1e10 < chip.link_bandwidth < 1e12
            and 1e9 < chip.network_bandwidth < 1e11
        )


@pytest.mark.parametrize(
    "platform, kind, peak",
    [
        ("tpu", "TPU v5 lite", 197e12),
        ("tpu", "TPU v5", 459e12),
        ("tpu", "TPU v4", 275e12),
        ("tpu", "TPU v4 lite", math.nan),
        ("gpu", "NVIDIA A100-PCIE-40GB", 312e12),
        ("gpu", "NVIDIA H100 80GB HBM3", 989e12),
        ("gpu", "NVIDIA H100 PCIe", math.nan),
        ("gpu", "NVIDIA H100 NVL", math.nan),
        ("gpu", "NVIDIA H200 NVL", math.nan),
        ("gpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", math.nan),
        ("gpu", "NVIDIA GeForce RTX 4090", 165.2e12),
        ("gpu", "NVIDIA GeForce RTX 4090 D", math.nan),
    ],
)
def test_peaks_of_devices(platform, kind, peak):
    """Catches the peak of the SXM card used for another card of its generation or for a MIG slice.
    MFU would be too low.
    """
    device = mock.Mock(spec=jax.Device, platform=platform, device_kind=kind)
    flops, source = chips.peak_flops(device)
    assert flops == pytest.approx(peak, nan_ok=True) and (kind in source) == math.isnan(peak)


def test_gpus_are_described():
    """Catches a GPU in the table that cannot be planned for, and wrong units of memory and
    bandwidth.
    """
    for chip in chips.CHIPS:
        if chip.platform == "cuda":
            described = gpus.target(chip)
            assert (
                f"memory_bandwidth: {int(chip.memory_bandwidth)}\n" in described
                and f"device_memory_size: {int(chip.memory)}\n" in described
            )
            assert described.count("{") == described.count("}") == 4


def test_threads_of_a_multiprocessor():
    """Catches the threads of the A100 and H100 taken for compute capability 8.9, which has fewer:
    kernels would be tiled for an SM that does not exist.
    """
    for name, threads in {"a100": 2048, "h100": 2048, "rtx4090": 1536}.items():
        assert f"threads_per_core_limit: {threads}\n" in gpus.target(chips.by_name(name))


@pytest.mark.parametrize(
    "name, shape", [("h100-64", "1x8x8"), ("a100:32x8", "1x32x8"), ("h100:4", "1x1x4")]
)
def test_gpu_topologies_of_the_compiler(name, shape):
    """Catches the numbers of nodes and of GPUs per node exchanged."""
    assert topology.parse(name)._compiler_name()[1]["topology"] == shape
