"""A text encoder's forward pass on a mesh, before it is compiled: sharding of weights and batch.

It takes any Flax network that is called (tokens, mask) -> features. The rows of a batch are split
over every axis of the mesh, weights over `fsdp` alone: each device has its part of every kernel,
and XLA gathers a layer's kernels when the layer runs. With fsdp = 1 each device has all weights and
devices exchange nothing. T5-XXL in bfloat16 runs so on every chip of hardware/chips.py: with a
batch it takes 9.0 of a v5e chip's 15.75 GiB. Tensor parallelism (kernels split by feature) is not
offered: between 8 chips it would send 2.5 GiB of activations a layer, fsdp sends 0.4 GiB of
kernels.
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
WEIGHTS_SHARE = 0.75  # of a device's memory, at most; the rest is for a batch


def make_mesh(devices: Sequence[jax.Device], fsdp: int) -> Mesh:
    """A mesh of these devices that divides weights into `fsdp` parts.

    Raises:
        ValueError: `fsdp` does not divide the number of devices.
    """
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(
            f"text encoder weights in {fsdp} parts: {len(devices)} devices do not divide by it"
        )
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def fewest_parts(weights: int, memory: int | None, devices: int) -> int:
    """The smallest number of parts of `weights` bytes that fit on devices of `memory` bytes.

    memory: None if unknown; then the weights stay whole.

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
            f"{memory / 2**30:.1f} GiB: take more devices"
        )
    return fitting[0]


def one_device(weights: int) -> Mesh:
    """The first device of this process, for weights of any size (bytes)."""
    return make_mesh(jax.local_devices()[:1], fsdp=1)


def local_mesh(weights: int) -> Mesh:
    """All devices of this process, with `weights` bytes in as few parts as fit."""
    devices = jax.local_devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    return make_mesh(devices, fewest_parts(weights, memory, len(devices)))


def parameter_shapes(network: nn.Module, dtype: str) -> Mapping[str, Any]:
    """The network's parameter tree as jax.ShapeDtypeStruct, all in `dtype`; allocates nothing."""
    tokens, mask = np.zeros((1, 1), np.int32), np.ones((1, 1), bool)
    params = jax.eval_shape(network.init, jax.random.key(0), tokens, mask)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), params)


def weight_bytes(shapes: Mapping[str, Any]) -> int:
    """Bytes of a parameter tree."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _spec(name: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """The sharding of the leaf `name`.

    Kernels are split along the larger dimension that divides. The token table is split along its
    features, so that looking up a row needs no message to its owner. All other leaves (norms,
    biases, positions: for T5 a thousandth of all bytes) are whole on every device.
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
    """The pass that FlaxEncoder runs and plan compiles; needs no weights and allocates none.

    `params` is the parameter tree as shapes with shardings; `apply` is jitted: (params, tokens
    [b l], lengths [b]) -> features [b l d] bfloat16. Features from a row's length on are
    meaningless. b must divide by the size of the mesh.
    """

    mesh: Mesh
    params: Mapping[str, Any]
    apply: Any

    @classmethod
    def create(cls, network: nn.Module, shapes: Mapping[str, Any], mesh: Mesh) -> "EncodeProgram":
        """The pass of `network`, called (tokens [b l], mask [b l], True = a token) -> [b l d].

        shapes: as `parameter_shapes` returns them. mesh: with the axes of `make_mesh`; its devices
        may be compile-only ones.
        """

        def apply(
            params, tokens: Int[Array, "b l"], lengths: Int[Array, " b"]
        ) -> Float[Array, "b l d"]:
            mask = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
            return network.apply({"params": params}, tokens, mask).astype(jnp.bfloat16)

        def place(path, leaf):
            sharding = NamedSharding(mesh, _spec(path[-1].key, leaf.shape, mesh.shape["fsdp"]))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        params = jax.tree_util.tree_map_with_path(place, shapes)
        return cls(mesh, params, jax.jit(apply, out_shardings=_by_rows(mesh)))

    @property
    def rows(self) -> NamedSharding:
        """The sharding of a batch by rows."""
        return _by_rows(self.mesh)

    def lower(self, rows: int, length: int) -> Any:
        """The pass for `rows` texts of `length` tokens, traced and lowered, not yet compiled."""
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=self.rows)
        lengths = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=self.rows)
        return self.apply.lower(self.params, tokens, lengths)
