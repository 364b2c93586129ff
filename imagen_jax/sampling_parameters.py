"""The parameters of a stage while it samples: their types, shardings and size on a device."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagen_jax import sharding
from imagen_jax.stage import Params, Stage


def for_sampling(params: Params, stage: Stage) -> Params:
    """Host parameters in the types that sampling needs: half the memory for a bfloat16 network.

    A kernel gets the type in which the network multiplies it. The network would convert it at each
    use, so no result changes. Vectors, and the output convolution, which computes in fp32, are
    fp32. Of abstract parameters it returns the shapes.
    """
    dtype = jnp.dtype(stage.model.dtype)

    def convert(path, leaf):
        whole = len(leaf.shape) < 2 or sharding.path_name(path).startswith("out/")
        kind = np.dtype(np.float32) if whole else dtype
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, kind)
        return np.asarray(leaf).astype(kind)

    return jax.tree_util.tree_map_with_path(convert, params)


def parameter_shardings(params: Params, mesh: Mesh, section: Mapping[str, Any]) -> Params:
    """The sharding of each parameter on `mesh`, by the rules of a training config.

    section: the section `mesh` of that config; its sizes are not used.
    """
    sizes = section["rules"], section["fsdp_min_elements"]
    return sharding.tree_shardings({"params": params}, mesh, *sizes, partial=True)["params"]


def bytes_per_device(params: Params, shardings: Params) -> int:
    """The memory of sharded arrays on one device."""
    sizes = jax.tree.map(
        lambda leaf, to: math.prod(to.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        params,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))
