"""Time of collectives on a topology's links: bytes over bandwidth, without latency or congestion.

Inside a TPU slice, a group of chips that extends along several dimensions of the torus uses the
links of all of them at once: two links per dimension that closes into a ring, one per dimension
that does not. Between slices, and between GPU nodes, each chip has its share of the network
bandwidth.
"""

import math
from collections.abc import Sequence
from typing import Any

from imagen_jax.hardware.topology import Topology
from imagen_jax.planning.hlo import Collective

# Bytes that each chip sends per byte of the largest array; in a group of n, times (n - 1) / n.
BYTES_SENT = {
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-reduce": 2.0,
    "all-to-all": 1.0,
    "collective-permute": 1.0,
}
CUBE = 4  # 3D tori (v4, v5p) close into rings if every side is a multiple of this
POD = 16  # 2D tori (v5e, v6e) close along sides of this length


def seconds(collective: Collective, devices: Sequence[Any], topology: Topology) -> float:
    """Seconds of all executions of a collective.

    Args:
        collective: the collective.
        devices: the devices of the mesh, in its order.
        topology: the hardware.
    """
    group = [devices[i] for i in collective.groups[0]]
    if len(group) < 2:
        return 0.0
    return collective.times * sum(
        BYTES_SENT[collective.kind] * share * collective.bytes * (n - 1) / n / bandwidth
        for n, share, bandwidth in _tiers(collective.kind, group, topology)
        if n > 1
    )


def _tiers(kind: str, group: Sequence[Any], topology: Topology) -> list[tuple[int, float, float]]:
    """The levels of a hierarchical collective: inside slices or nodes, then between them.

    Returns (number of participants, their share of the bytes, bandwidth of each) for each level.
    """
    chip = topology.chip
    slices = {_slice_or_node(device, topology) for device in group}
    inner = len(group) // len(slices)
    if kind == "collective-permute":
        bandwidth = chip.network_bandwidth if len(slices) > 1 else chip.link_bandwidth
        return [(2, 2.0, bandwidth)]  # (n - 1) / n of these is 1: all bytes go to one neighbour
    # Data is reduced within a slice before it crosses the network, or gathered after it: each of
    # the `inner` chips sends its share of the bytes.
    return [
        (inner, 1.0, _inner_bandwidth(group, topology)),
        (len(slices), 1.0 / inner, chip.network_bandwidth),
    ]


def _slice_or_node(device: Any, topology: Topology) -> int:
    """The index of a device's slice (TPU) or node (GPU)."""
    return (
        device.id // topology.shape[-1]
        if topology.chip.platform == "cuda"
        else getattr(device, "slice_index", 0)
    )


def _inner_bandwidth(group: Sequence[Any], topology: Topology) -> float:
    """Bandwidth of one chip inside a slice or node, for the dimensions along which the group
    extends.
    """
    if topology.chip.platform == "cuda":
        return topology.chip.link_bandwidth
    first = _slice_or_node(group[0], topology)
    coords = [device.coords for device in group if _slice_or_node(device, topology) == first]
    extents = [len(set(axis)) for axis in zip(*coords)]
    sides = [(extent, side) for extent, side in zip(extents, (*topology.shape, 1)) if extent > 1]
    links = sum(
        2 if extent == side and is_ring(side, topology.shape) else 1 for extent, side in sides
    )
    return topology.chip.link_bandwidth * max(1, links)


def is_ring(side: int, shape: Sequence[int]) -> bool:
    """Whether a side of a slice closes into a ring.

    In three dimensions it does if the slice consists of whole 4x4x4 cubes (2x4x4 has no rings), in
    two dimensions if the side is as long as the pod's.
    """
    return all(length % CUBE == 0 for length in shape) if len(shape) == 3 else side == POD


def axes_of(groups: Sequence[Sequence[int]], sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ. `sizes` is in the mesh's order."""
    positions = [_position(i, list(sizes.values())) for i in groups[0]]
    return tuple(axis for k, axis in enumerate(sizes) if len({p[k] for p in positions}) > 1)


def _position(index: int, shape: list[int]) -> tuple[int, ...]:
    """The coordinates of a flat index in an array of this shape."""
    return tuple(index // math.prod(shape[k + 1 :]) % size for k, size in enumerate(shape))
