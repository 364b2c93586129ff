"""A random training state and checkpoints of it, for the tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from imagen_jax.weights.checkpoint import Checkpoints
from imagen_jax.weights.retention import Retention

META = {
    "config": {"seed": 3, "model": {"width": 64, "levels": [1, 2]}},
    "encoder": {"name": "t5_tiny"},
    "manifest": "ab12",
}


@struct.dataclass
class State:
    """Like the trainer's state: dicts, optax's named tuples with empty states, scalars."""

    step: object
    params: object
    ema: object
    opt_state: object
    bad: object


def make_state(step):
    """A state whose every leaf depends on `step`: bf16, fp32, int32, bool, Adam's state."""
    rng = np.random.default_rng(step)
    params = {
        "down_0": {
            "block_0": {
                "conv_1": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 8, 16)), jnp.float32)}
            }
        },
        "text": {"norm.scale": jnp.asarray(rng.normal(size=(16,)), jnp.bfloat16)},
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.constant_schedule(1e-3)),
        optax.masked(optax.scale(1.0), False),
    )
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), optimizer.init(params))
    ema = jax.tree.map(lambda x: x * 2, params)
    return State(
        jnp.int32(step), params, ema, opt_state, {"step": jnp.int32(-1), "any": jnp.bool_(step % 2)}
    )


def shard(state, devices=1):
    """(state, abstract), with the last axis sharded over `devices` where it divides."""
    mesh = jax.make_mesh(
        (devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def sharding(x):
        split = x.ndim > 0 and x.shape[-1] % devices == 0
        return NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp") if split else P())

    state = jax.tree.map(lambda x: jax.device_put(x, sharding(x)), state)
    return state, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, shard(make_state(step))[0], META | {"at": step})
    checkpoints.wait()
    return checkpoints


def assert_restores(directory, step):
    """Asserts that the newest checkpoint is `step` and restores bit for bit."""
    state, abstract = shard(make_state(step))
    checkpoints = Checkpoints(directory, Retention(2))
    assert checkpoints.latest_good() == step
    restored, meta = checkpoints.restore(step, abstract)
    assert_equal(restored, state)
    assert meta == META | {"at": step, "step": step, "format_version": 1}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        assert (
            x.dtype == y.dtype
            and x.shape == y.shape
            and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        ), path


def files_of(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


def flip_bit(path, rng):
    data = bytearray(path.read_bytes())
    if data:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
