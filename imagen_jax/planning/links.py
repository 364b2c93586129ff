"""How long collectives take on a topology's links: bytes over bandwidth, nothing for latency and
nothing for congestion.

Inside a TPU slice a group of chips that fills sides of the torus works on all of them at once, in
both directions where the side closes into a ring and at half of that where it does not. Between
slices, and between GPU nodes, each chip has its share of the network.
"""

import math
from collections.abc import Sequence
from typing import Any

from imagen_jax.hardware.topology import Topology
from imagen_jax.planning.hlo import Collective

# Bytes that must pass a chip for each byte of the largest array, in a group of n: (n - 1) / n of
# these.
PASSES = {
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-reduce": 2.0,
    "all-to-all": 1.0,
    "collective-permute": 1.0,
}
CUBE, POD = (
    4,
    16,
    # sides of what a slice of three and of two dimensions is made of, and where they close into
    # rings
)


def seconds(collective: Collective, devices: Sequence[Any], place: Topology) -> float:
    """All runs of a collective. `devices` are the mesh's, in its order."""
    group = [devices[i] for i in collective.groups[0]]
    if len(group) < 2:
        return 0.0
    return collective.times * sum(
        PASSES[collective.kind] * share * collective.bytes * (n - 1) / n / bandwidth
        for n, share, bandwidth in _levels(collective.kind, group, place)
        if n > 1
    )


def _levels(kind: str, group: Sequence[Any], place: Topology) -> list[tuple[int, float, float]]:
    """(how many take part, their share of the bytes, bytes a second of each) inside slices or
    nodes, then between them.
    """
    outer = {_outer(device, place) for device in group}
    inner = len(group) // len(outer)
    if kind == "collective-permute":
        bandwidth = place.chip.network_bandwidth if len(outer) > 1 else place.chip.link_bandwidth
        return [(2, 2.0, bandwidth)]  # one neighbour to the next: all of its bytes
    # What crosses the network was reduced, or is still to be gathered, within: each of `inner`
    # chips takes its part.
    return [
        (inner, 1.0, _inner_bandwidth(group, place)),
        (len(outer), 1.0 / inner, place.chip.network_bandwidth),
    ]


def _outer(device: Any, place: Topology) -> int:
    """Which slice, or which node, a device is in."""
    return (
        device.id // place.shape[-1]
        if place.chip.platform == "cuda"
        else getattr(device, "slice_index", 0)
    )


def _inner_bandwidth(group: Sequence[Any], place: Topology) -> float:
    """Of the torus sides along which a group extends: two links each where a side is a ring, else
    one.
    """
    if place.chip.platform == "cuda":
        return place.chip.link_bandwidth
    first = _outer(group[0], place)
    within = [device.coords for device in group if _outer(device, place) == first]
    extents = [len(set(axis)) for axis in zip(*within)]
    sides = [(extent, side) for extent, side in zip(extents, (*place.shape, 1)) if extent > 1]
    return place.chip.link_bandwidth * max(
        1, sum(2 if extent == side and is_ring(side, place.shape) else 1 for extent, side in sides)
    )


def is_ring(side: int, shape: Sequence[int]) -> bool:
    """Whether a side of a slice closes: in three dimensions only of a slice of whole cubes (2x4x4
    has none), in two a side as long as the pod's.
    """
    return all(length % CUBE == 0 for length in shape) if len(shape) == 3 else side == POD


def axes_of(groups: Sequence[Sequence[int]], sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ; `sizes` in the mesh's order."""
    places = [_position(i, list(sizes.values())) for i in groups[0]]
    return tuple(axis for k, axis in enumerate(sizes) if len({place[k] for place in places}) > 1)


def _position(index: int, shape: list[int]) -> tuple[int, ...]:
    out = []
    for k in range(len(shape)):
        rest = math.prod(shape[k + 1 :])
        out.append(index // rest % shape[k])
    return tuple(out)
