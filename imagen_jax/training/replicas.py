"""Finds replica divergence: copies of the state on several devices that differ in a bit.

Every device computes its copy from the same numbers, so a copy that differs is a fault of a device,
its memory or a program. The fault persists and corrupts all later gradients. Parts of the state
without a copy on another device (a state sharded over all devices) cannot be compared.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped, UInt32

from imagen_jax.distributed import startup
from imagen_jax.exit_codes import HardwareFault
from imagen_jax.sharding import AXES, path_name


class Drift(HardwareFault):
    """Copies of the state differ. All processes raise it.

    processes: those with a faulty device.
    """

    def __init__(self, message: str, processes: Sequence[int]):
        super().__init__(message)
        self.processes = list(processes)


def digest(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """A hash of every bit of `x` and its position.

    It is a sum modulo 2^32, so it does not depend on the order of computation.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = (
        jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        .astype(jnp.uint32)
        .reshape(-1)
    )
    # The golden ratio in 32 bits makes positions differ; the finalizer of MurmurHash3 keeps two
    # changes from cancelling.
    h = bits + jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(0x9E3779B9)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


class Replicas:
    """Compares the copies of a state with these `shardings` on `mesh`."""

    def __init__(self, mesh: Mesh, abstract: Any, shardings: Any):
        """abstract: the shapes of the state.

        The attribute `compared` is the share of the state's bytes that have a copy, from 0 to 1.
        """
        self._mesh = mesh
        self._names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)]
        self._specs = [sharding.spec for sharding in jax.tree.leaves(shardings)]
        sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)]
        self.compared = sum(
            size for size, spec in zip(sizes, self._specs) if self._copies(spec)
        ) / sum(sizes)
        each = lambda spec: jax.shard_map(
            lambda x: digest(x)[None], mesh=mesh, in_specs=spec, out_specs=P(AXES), check_vma=False
        )
        # One program for each shape and placement: a single one for all leaves of a large network
        # takes minutes to compile.
        self._digest = {spec: jax.jit(each(spec)) for spec in self._specs}

    def check(self, state: Any, step: int) -> None:
        """Waits for `state` and compares its copies.

        Raises Drift if copies differ, with the first such leaf, the number of others and the
        devices.
        """
        if not self.compared:
            return
        table = self._table(state)
        odd = {
            name: devices
            for i, name in enumerate(self._names)
            if (devices := self._odd(table[:, i], self._specs[i]))
        }
        if not odd:
            return
        name, devices = next(iter(odd.items()))
        hosts = startup.hosts()
        processes = sorted({device.process_index for device in devices})
        where = ", ".join(f"process {i}" + (f" ({hosts[i]})" if hosts else "") for i in processes)
        more = f" and of {len(odd) - 1} more arrays" if len(odd) > 1 else ""
        raise Drift(
            f"after step {step} the copies of {name}{more} differ: on {where}, devices"
            f" {', '.join(str(device.id) for device in devices)}. A device or its memory is faulty."
            " This step was not saved: restart from the last checkpoint without that host",
            processes,
        )

    def _table(self, state: Any) -> UInt32[np.ndarray, "devices leaves"]:
        """The digest of each leaf's shard on each device, in mesh order.

        The table is equal in all processes.
        """
        digests = [
            self._digest[spec](leaf) for spec, leaf in zip(self._specs, jax.tree.leaves(state))
        ]
        shards = [
            {shard.device: shard.data for shard in array.addressable_shards} for array in digests
        ]
        here = [
            i
            for i, device in enumerate(self._mesh.devices.flat)
            if device.process_index == jax.process_index()
        ]
        values = jax.device_get(
            [[by_device[self._mesh.devices.flat[i]] for by_device in shards] for i in here]
        )
        rows = np.asarray(values, np.uint32).reshape(len(here), len(self._names))
        if jax.process_count() > 1:
            here, rows = multihost_utils.process_allgather((np.asarray(here), rows), tiled=True)
        table = np.empty_like(rows)
        table[here] = rows
        return table

    def _copies(self, spec: P) -> list[int]:
        """The mesh axes over which an array with this PartitionSpec is replicated."""
        used = {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,))}
        return [i for i, axis in enumerate(AXES) if axis not in used and self._mesh.shape[axis] > 1]

    def _odd(self, digests: UInt32[np.ndarray, "devices"], spec: P) -> list[jax.Device]:
        """Devices whose shard differs from the majority of copies; all devices if there is none."""
        axes = self._copies(spec)
        shape = tuple(self._mesh.shape.values())
        copies = math.prod(shape[i] for i in axes)
        together = lambda flat: (
            np.moveaxis(flat.reshape(shape), axes, range(-len(axes), 0)).reshape(-1, copies)
            if axes
            else flat.reshape(-1, 1)
        )
        odd = []
        for values, devices in zip(together(digests), together(self._mesh.devices.reshape(-1))):
            digests_seen, counts = np.unique(values, return_counts=True)
            if len(digests_seen) > 1:
                most = digests_seen[counts.argmax()] if counts.max() * 2 > copies else None
                odd += [device for value, device in zip(values, devices) if value != most]
        return odd
