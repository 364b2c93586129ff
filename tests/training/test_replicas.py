"""Copies of a state that differ are found and the device that is wrong is named, on eight devices
in this process.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from imagen_jax import sharding
from imagen_jax.training.replicas import Drift, Replicas, digest

SPECS = {
    "whole": P(),
    "rows": P("fsdp"),
    "step": P(),
    "features": P(None, "model"),
    "both": P("fsdp", ("data", "model")),
}


def setup(**sizes):
    """(mesh, state, Replicas) with arrays placed in every way there is."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1, "spatial": 1} | sizes)
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in SPECS}
    values |= {"step": np.int32(7), "rows": values["rows"].astype(jnp.bfloat16)}
    shardings = {name: NamedSharding(mesh, SPECS[name]) for name in SPECS}
    state = jax.device_put(values, shardings)
    return mesh, state, Replicas(mesh, jax.eval_shape(lambda: state), shardings)


def flip(array, device):
    """`array` with the lowest bit of one number wrong on one device."""
    shards = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1)[-1:].view(f"uint{8 * data.dtype.itemsize}")[:] ^= 1
        shards.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


@pytest.mark.parametrize("leaf", ["whole", "rows", "step", "features"])
@pytest.mark.parametrize("where", [0, 5, 7])
def test_one_bit_on_one_device_is_found_and_named(leaf, where):
    """Catches: shards compared that are of different parts, the first copy always trusted, scalars
    or bfloat16 left out.
    """
    mesh, state, replicas = setup(data=4, fsdp=2)
    replicas.check(state, 3)
    device = mesh.devices.flat[where]
    with pytest.raises(
        Drift,
        match=f"^after step 3 the copies of {leaf} differ: on process 0, devices {device.id}. ",
    ):
        replicas.check(state | {leaf: flip(state[leaf], device)}, 3)


def test_two_copies_are_both_named():
    """Catches: one of two copies blamed by chance."""
    mesh, state, replicas = setup(data=2, fsdp=4)
    with pytest.raises(
        Drift, match="the copies of rows and of 1 more arrays differ: on process 0, devices 1, 5. "
    ):
        replicas.check(
            state | {name: flip(state[name], mesh.devices.flat[5]) for name in ("rows", "whole")}, 0
        )


def test_what_has_no_copy_is_said_not_to_be_compared():
    """Catches: a share of the state called compared that nothing else holds, or the reverse."""
    _, state, replicas = setup(data=2, fsdp=2, model=2)
    alone = state["both"].nbytes
    assert replicas.compared == pytest.approx(
        1 - alone / sum(leaf.nbytes for leaf in state.values())
    )
    mesh, state, replicas = setup(data=2, fsdp=2, model=2)
    replicas.check(
        state | {"both": flip(state["both"], mesh.devices.flat[3])}, 0
    )  # nobody can tell


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_digest_depends_on_bits_and_places(dtype):
    """Catches: a sum in which changes cancel, two numbers that change places unseen, a sign of zero
    overlooked.
    """
    x = np.arange(64).astype(dtype)
    swapped, flipped = x.copy(), x.copy()
    swapped[:2] = x[1::-1]
    flipped.view(np.uint8)[-1] ^= 1
    others = [x, swapped, flipped] + (
        [-x] if dtype in (jnp.float32, jnp.bfloat16, jnp.int32) else []
    )
    assert len({int(digest(jnp.asarray(other))) for other in others}) == len(others)
    both = x.copy()
    both.view(np.uint8)[[0, -8]] ^= 1
    assert int(digest(jnp.asarray(both))) != int(digest(jnp.asarray(x)))
