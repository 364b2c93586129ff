"""A text encoder's forward pass on a mesh: sharding of weights and batch, lowering.

It takes any Flax network that is called (tokens, mask) -> features. The rows of a batch are sharded
over all axes of the mesh, weights over `fsdp` alone: each device holds a shard of every kernel, and
XLA all-gathers a layer's kernels when the layer runs. With fsdp = 1 each device holds all weights
and there is no communication. T5-XXL in bfloat16 fits so on every chip of hardware/chips.py: with a
batch it takes 9.0 of the 15.75 GiB of a v5e chip. Tensor parallelism (kernels sharded by feature)
is not offered: between 8 chips it would send 2.5 GiB of activations per layer, fsdp sends 0.4 GiB
of kernels.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

AXES = ("data", "fsdp")
WEIGHTS_SHARE = 0.75  # largest share of device memory for weights; the rest is for a batch


def make_mesh(devices: Sequence[jax.Device], fsdp: int) -> Mesh:
    """A mesh of these devices that shards weights `fsdp` ways.

    Raises:
        ValueError: `fsdp` does not divide the number of devices.
    """
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(
            f"text encoder weights cannot be sharded {fsdp} ways: {len(devices)} devices are not a"
            f" multiple of {fsdp}"
        )
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def fewest_parts(weights: int, memory: int | None, devices: int) -> int:
    """The smallest number of shards of `weights` bytes that fit on devices of `memory` bytes.

    memory: bytes of a device; None if unknown, then the weights are not sharded.

    Raises:
        ValueError: all `devices` together have too little memory.
    """
    if memory is None:
        return 1
    possible = [n for n in range(1, devices + 1) if devices % n == 0]
    fitting = [n for n in possible if weights / n <= WEIGHTS_SHARE * memory]
    if not fitting:
        raise ValueError(
            f"the text encoder's {weights / 2**30:.1f} GiB do not fit on {devices} devices of "
            f"{memory / 2**30:.1f} GiB: use more devices"
        )
    return fitting[0]


def one_device(weights: int) -> Mesh:
    """A mesh of this process's first device, for weights of any size (bytes)."""
    return make_mesh(jax.local_devices()[:1], fsdp=1)


def local_mesh(weights: int) -> Mesh:
    """A mesh of all devices of this process, with `weights` bytes in as few shards as fit."""
    devices = jax.local_devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    return make_mesh(devices, fewest_parts(weights, memory, len(devices)))


def parameter_shapes(network: nn.Module, dtype: str) -> Mapping[str, Any]:
    """The network's parameter tree as jax.ShapeDtypeStruct, all in `dtype`; allocates nothing."""
    tokens, mask = np.zeros((1, 1), np.int32), np.ones((1, 1), bool)
    params = jax.eval_shape(network.init, jax.random.key(0), tokens, mask)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), params)


def weight_bytes(shapes: Mapping[str, Any]) -> int:
    """The size of a parameter tree in bytes."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _spec(name: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """The partition spec of the leaf `name`.

    Kernels are sharded along the larger dimension that `fsdp` divides. The token embedding is
    sharded along its features, so that a lookup needs no communication. All other leaves (norms,
    biases, positions: 0.1 % of T5's bytes) are replicated.
    """
    dims = {"kernel": (0, 1), "token_embedding": (1,)}.get(name, ())
    divisible = [i for i in dims if shape[i] % fsdp == 0]
    if not divisible:
        return PartitionSpec()
    best = max(divisible, key=lambda i: shape[i])
    return PartitionSpec(*("fsdp" if i == best else None for i in range(2)))


def _by_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(AXES))


@dataclasses.dataclass(frozen=True)
class EncodeProgram:
    """The forward pass that FlaxEncoder runs and `plan` compiles. Allocates no weights.

    params: the parameter tree as shapes with shardings.
    apply: jitted (params, tokens [b l], lengths [b]) -> features [b l d] bfloat16. Features beyond
        a row's length are undefined. b must be a multiple of the mesh size.
    """

    mesh: Mesh
    params: Mapping[str, Any]
    apply: Any

    @classmethod
    def create(cls, network: nn.Module, shapes: Mapping[str, Any], mesh: Mesh) -> "EncodeProgram":
        """The program of `network`: (tokens [b l], mask [b l], True = a token) -> [b l d].

        shapes: the result of `parameter_shapes`. mesh: has the axes of `make_mesh`; its devices
        may be compile-only devices.
        """

        def apply(
            params, tokens: Int[Array, "b l"], lengths: Int[Array, " b"]
        ) -> Float[Array, "b l d"]:
            mask = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
            return network.apply({"params": params}, tokens, mask).astype(jnp.bfloat16)

        def shard(path, leaf):
            sharding = NamedSharding(mesh, _spec(path[-1].key, leaf.shape, mesh.shape["fsdp"]))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        params = jax.tree_util.tree_map_with_path(shard, shapes)
        return cls(mesh, params, jax.jit(apply, out_shardings=_by_rows(mesh)))

    @property
    def rows(self) -> NamedSharding:
        """The sharding of a batch by rows."""
        return _by_rows(self.mesh)

    def lower(self, rows: int, length: int) -> Any:
        """The program for `rows` texts of `length` tokens, lowered and not yet compiled."""
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=self.rows)
        lengths = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=self.rows)
        return self.apply.lower(self.params, tokens, lengths)
