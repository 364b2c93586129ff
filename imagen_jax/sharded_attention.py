"""The implementation of attention for a mesh: a kernel on each TPU, otherwise the compiler's."""

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from imagen_jax.models.attention import Attend, Keys, attend
from imagen_jax.models.attention_kernel import fits, flash_attend
from imagen_jax.models.remat import checkpointed
from imagen_jax.sharding import BATCH_AXES


def attention_on(mesh: Mesh | None, remat: str) -> Attend:
    """The attention function: on TPUs the kernel if it supports the shapes, otherwise `attend`.

    Each device computes its own rows, pixels and heads. The backward pass recomputes the attention
    weights, except in `attend` with `remat` "none".
    """
    plain = lambda q, keys, heads: checkpointed(
        "none" if remat == "none" else "block", lambda q, keys: attend(q, keys, heads)
    )(q, keys)
    if mesh is None or mesh.devices.flat[0].platform != "tpu":
        return plain
    return lambda q, keys, heads: attend_in_parts(mesh, flash_attend, plain, q, keys, heads)


def attend_in_parts(
    mesh: Mesh, kernel: Attend, plain: Attend, q: Float[Array, "b n c"], keys: Keys, heads: int
) -> Float[Array, "b n c"]:
    """Runs an attention kernel on each device's shard.

    Rows are sharded over the batch axes, queries over `spatial` and channels over `model`; the
    compiler cannot partition a Pallas kernel itself. If the shards are uneven or the kernel does
    not support their sizes, `plain` runs instead.

    Args:
        mesh: the device mesh.
        kernel: attention of one shard.
        plain: attention that the compiler can partition.
        q: queries [b n c].
        keys: groups of keys, values and masks, see `models.attention`.
        heads: number of heads.
    """
    pixels, parts = mesh.shape["spatial"], mesh.shape["model"]
    (b, n, c), m = q.shape, sum(k.shape[1] for k, _, _ in keys)
    if (
        b % (mesh.shape["data"] * mesh.shape["fsdp"])
        or n % pixels
        or heads % parts
        or not fits(n // pixels, m, c // parts, heads // parts)
    ):
        return plain(q, keys, heads)
    rows, queries = P(BATCH_AXES), P(BATCH_AXES, "spatial", "model")
    # Every device needs all keys, so they are not sharded over `spatial`. If `spatial` has one
    # device, naming the axis gives the same result and avoids a reduction of the keys' gradients.
    channels = P(BATCH_AXES, "spatial" if pixels == 1 else None, "model")
    specs = (
        queries,
        tuple((channels, channels, None if valid is None else rows) for _, _, valid in keys),
    )
    return jax.shard_map(
        lambda q, keys: kernel(q, keys, heads // parts),
        mesh=mesh,
        in_specs=specs,
        out_specs=queries,
        check_vma=False,
    )(q, keys)
