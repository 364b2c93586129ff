"""The T5 encoder's forward pass on a mesh, before it is compiled: where its weights live and how a batch is divided.

Rows of a batch are split over every axis of the mesh, weights over `fsdp` alone: each device has its part of every kernel, and XLA
gathers a layer's kernels when the layer runs. With fsdp = 1 each device has all weights and nothing is sent between devices; as XXL in
bfloat16 takes 9.0 of a v5e chip's 15.75 GiB with a batch, that is how it runs on every chip of hardware/chips.py. Kernels split by
feature (tensor parallel) would send 2.5 GiB of activations a layer between 8 chips, where fsdp sends 0.4 GiB of kernels: not offered.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from imagen_jax.text.t5 import T5Config, T5Encoder

AXES = ("data", "fsdp")
WEIGHTS_SHARE = 0.75  # of a device's memory, at most; the rest is for a batch


def make_mesh(devices: Sequence[jax.Device], fsdp: int) -> Mesh:
    """A mesh of these devices whose weights are in `fsdp` parts. ValueError if the devices cannot be divided so."""
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"text encoder weights in {fsdp} parts: {len(devices)} devices do not divide by it")
    return jax.make_mesh((len(devices) // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def fewest_parts(weights: int, memory: int | None, devices: int) -> int:
    """Into how many parts `weights` bytes must be divided on devices of `memory` bytes (None: not known, they are whole), the fewest of all.

    ValueError if even all devices together have too little room.
    """
    if memory is None:
        return 1
    parts = [n for n in range(1, devices + 1) if devices % n == 0 and weights / n <= WEIGHTS_SHARE * memory]
    if not parts:
        raise ValueError(f"the text encoder's {weights / 2**30:.1f} GiB do not fit on {devices} devices of {memory / 2**30:.1f} GiB: take more devices")
    return parts[0]


def one_device(config: T5Config, dtype: str) -> Mesh:
    """The first device of this process, whatever the encoder."""
    return make_mesh(jax.local_devices()[:1], fsdp=1)


def local_mesh(config: T5Config, dtype: str) -> Mesh:
    """All devices of this process, the weights of such an encoder in as few parts as fit."""
    devices = jax.local_devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    return make_mesh(devices, fewest_parts(weight_bytes(config, dtype), memory, len(devices)))


def weight_bytes(config: T5Config, dtype: str) -> int:
    """Bytes of the encoder's parameters in `dtype`."""
    return jnp.dtype(dtype).itemsize * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_shapes(config)))


def _shapes(config: T5Config) -> Mapping[str, Any]:
    model = T5Encoder(config)
    return jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32), np.ones((1, 1), bool))["params"]


def _spec(name: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Kernels are split along the larger dimension that divides, the token table along its features, so that a row is looked up without
    asking who has it. Norms and position biases, a thousandth of all bytes, are whole everywhere."""
    dims = {"kernel": (0, 1), "token_embedding": (1,)}.get(name, ())
    divisible = [i for i in dims if shape[i] % fsdp == 0]
    if not divisible:
        return PartitionSpec()
    best = max(divisible, key=lambda i: shape[i])
    return PartitionSpec(*("fsdp" if i == best else None for i in range(2)))


@dataclasses.dataclass(frozen=True)
class EncodeProgram:
    """What TextEncoder runs and plan compiles; needs no weights and allocates none.

    `params` is the parameter tree as shapes with shardings; `apply` is jitted: (params, tokens [b l], lengths [b]) -> features
    [b l d] bfloat16, of which those from a row's length on mean nothing. Rows must divide over the mesh.
    """

    mesh: Mesh
    params: Mapping[str, Any]
    apply: Any

    @classmethod
    def create(cls, config: T5Config, dtype: str, mesh: Mesh) -> "EncodeProgram":
        """`mesh` has the axes of `make_mesh`; its devices may be compile-only ones."""
        model = T5Encoder(config, jnp.dtype(dtype))

        def apply(params, tokens: Int[Array, "b l"], lengths: Int[Array, " b"]) -> Float[Array, "b l d"]:
            mask = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
            return model.apply({"params": params}, tokens, mask).astype(jnp.bfloat16)

        def place(path, leaf):
            sharding = NamedSharding(mesh, _spec(path[-1].key, leaf.shape, mesh.shape["fsdp"]))
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=sharding)

        return cls(mesh, jax.tree_util.tree_map_with_path(place, _shapes(config)), jax.jit(apply, out_shardings=NamedSharding(mesh, PartitionSpec(AXES))))

    @property
    def rows(self) -> NamedSharding:
        """Where the rows of a batch are."""
        return NamedSharding(self.mesh, PartitionSpec(AXES))

    def lower(self, rows: int, length: int) -> Any:
        """The pass for so many texts of `length` tokens, traced and lowered; `.compile()` is what takes long."""
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=self.rows)
        return self.apply.lower(self.params, tokens, jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=self.rows))
