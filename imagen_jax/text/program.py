"""A text encoder's forward pass on several devices, and the number of shards of its weights.

It takes any Flax network that is called (tokens, mask) -> features, or (features, pooled vectors).
The caller provides the shardings: the rows of a batch are split over all devices, and weights are
in one or more shards. With several shards each device holds a part of every kernel, and XLA
all-gathers a layer's kernels when the layer runs. With one shard each device holds all weights and
there is no communication. T5-XXL in bfloat16 fits so on every chip of hardware/chips.py: with a
batch it takes 9.0 of the 15.75 GiB of a v5e chip. Tensor parallelism (kernels sharded by feature)
is not offered: between 8 chips it would send 2.5 GiB of activations per layer, kernels that are
all-gathered are 0.4 GiB.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int

WEIGHTS_SHARE = 0.75  # largest share of device memory for weights; the rest is for a batch


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
            f"weights of {weights / 2**30:.1f} GiB do not fit on {devices} devices of "
            f"{memory / 2**30:.1f} GiB: use more devices"
        )
    return fitting[0]


def parameter_shapes(network: nn.Module, dtype: str) -> Mapping[str, Any]:
    """The network's parameter tree as jax.ShapeDtypeStruct, all in `dtype`; allocates nothing."""
    tokens, mask = np.zeros((1, 1), np.int32), np.ones((1, 1), bool)
    params = jax.eval_shape(network.init, jax.random.key(0), tokens, mask)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), params)


def weight_bytes(shapes: Mapping[str, Any]) -> int:
    """The size of a parameter tree in bytes."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@dataclasses.dataclass(frozen=True)
class EncodeProgram:
    """The forward pass that FlaxEncoder runs and `plan` compiles. Allocates no weights.

    params: the parameter tree as shapes with shardings.
    rows: the sharding of a batch by rows.
    apply: jitted (params, tokens [b l], lengths [b]) -> features [b l d] bfloat16, or (features,
        pooled [b e] bfloat16) of a network with pooled vectors. Features beyond a row's length are
        undefined. b must be a multiple of the number of devices.
    """

    params: Mapping[str, Any]
    rows: Sharding
    apply: Any

    @classmethod
    def create(
        cls, network: nn.Module, params: Mapping[str, Any], rows: Sharding
    ) -> "EncodeProgram":
        """The program of `network`: (tokens [b l], mask [b l]) -> [b l d] or ([b l d], [b e]).

        The mask is True for tokens. params: the result of `parameter_shapes`, with shardings.
        rows: the sharding of a batch by rows, over all devices, which may be compile-only devices.
        """

        def apply(
            params, tokens: Int[Array, "b l"], lengths: Int[Array, " b"]
        ) -> Float[Array, "b l d"] | tuple[Float[Array, "b l d"], Float[Array, "b e"]]:
            mask = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
            out = network.apply({"params": params}, tokens, mask)
            return jax.tree.map(lambda x: x.astype(jnp.bfloat16), out)

        return cls(params, rows, jax.jit(apply, out_shardings=rows))

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.rows.num_devices

    def lower(self, rows: int, length: int) -> Any:
        """The program for `rows` texts of `length` tokens, lowered and not yet compiled."""
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=self.rows)
        lengths = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=self.rows)
        return self.apply.lower(self.params, tokens, lengths)
