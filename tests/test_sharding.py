"""Meshes of eight virtual devices against one: same losses, gradients and samples; rules that are used, or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from imagen_jax import sharding
from imagen_jax.state import abstract_state, create_state
from imagen_jax.step import loss_and_grad
from tests import tiny

MESHES = [dict(data=8, fsdp=1, model=1, spatial=1), dict(data=2, fsdp=4, model=1, spatial=1), dict(data=2, fsdp=2, model=1, spatial=2)]
RULES = ((".*", "fsdp"),)


def loss_on(name, mesh, params=None):
    """(loss, gradients, parameters) of a tiny stage on a mesh, from given host parameters or from its own initial ones, perturbed."""
    stage, optimizer, _ = tiny.stage_and_step(tiny.config(name), mesh)
    _, shardings = abstract_state(stage, optimizer, mesh, RULES, 8)
    if params is None:
        params = tiny.perturbed(jax.device_get(create_state(stage, optimizer, 0, shardings).params))
    placed, batch = jax.device_put(params, shardings.params), sharding.place_batch(tiny.batch(stage, 8), mesh)
    loss, grads = jax.device_get(jax.jit(lambda p, b: loss_and_grad(stage, p, b, jax.random.key(1), 1))(placed, batch))
    return loss, grads, params


@functools.cache
def on_one_device(name):
    return loss_on(name, sharding.make_mesh(dict(data=1, fsdp=1, model=1, spatial=1), jax.devices()[:1]))


@pytest.mark.parametrize("name", ["base_64", "sr_1024"])
@pytest.mark.parametrize("sizes", MESHES)
def test_mesh_changes_nothing(name, sizes):
    """Catches a loss averaged per device, noise that depends on the mesh, a halo that is not exchanged."""
    loss, grads, params = on_one_device(name)
    mesh_loss, mesh_grads, _ = loss_on(name, sharding.make_mesh(sizes), params)
    np.testing.assert_allclose(loss, mesh_loss, rtol=1e-5)
    difference = jax.tree.map(np.subtract, grads, mesh_grads)
    assert optax.tree.norm(difference) < 1e-5 * optax.tree.norm(grads)


@pytest.mark.parametrize("name", ["base_64", "sr_1024"])
def test_state_is_born_sharded(name):
    """Catches a state that is replicated although a rule shards it, and initial parameters that depend on the mesh."""
    mesh = sharding.make_mesh(MESHES[1])
    stage, optimizer, _ = tiny.stage_and_step(tiny.config(name), mesh)
    abstract, shardings = abstract_state(stage, optimizer, mesh, RULES, 8)
    table = sharding.bytes_table(abstract, shardings)
    assert sum(row["sharded_bytes"] for row in table) >= 0.9 * sum(row["bytes"] for row in table)
    state = create_state(stage, optimizer, 0, shardings)
    kernel = state.params["down_1"]["block_0"]["conv_0"]["kernel"]
    assert kernel.addressable_shards[0].data.size * MESHES[1]["fsdp"] == kernel.size
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tiny.perturbed(jax.device_get(state.params)), on_one_device(name)[2])


@pytest.mark.parametrize("name", ["base_64", "sr_1024"])
def test_every_block_is_split_by_rows_and_height(name):
    """Catches a constraint that never reaches the network: every result stays right, and a large image no longer fits."""
    stage, _, _ = tiny.stage_and_step(tiny.config(name), sharding.make_mesh(MESHES[2]))
    params = jax.eval_shape(stage.init, jax.random.key(0))
    loss = lambda p, b: loss_and_grad(stage, p, b, jax.random.key(1), 1)[0]
    program = str(jax.make_jaxpr(loss)(params, tiny.batch(stage, 8)))
    assert program.count("(('data', 'fsdp'), 'spatial')") == 2 * 11  # forward and backward: stem, blocks, resampling, MLP


def test_sample_is_the_same_on_a_mesh():
    """Catches noise drawn per device: no fp32 pixel may move by more than 1/255."""
    made = tiny.config("sr_256")
    stage, _, _ = tiny.stage_and_step(made)
    params = tiny.perturbed(jax.jit(stage.init)(jax.random.key(0)), 0.05)
    batch, keys = tiny.batch(stage, 8), jax.random.split(jax.random.key(1), 8)
    draw = jax.jit(lambda p, k, b: stage.sample(p, k, b, stage.sampling))
    alone = np.asarray(draw(params, keys, batch))
    mesh = sharding.make_mesh(MESHES[1])
    rows = sharding.batch_sharding(mesh)
    together = draw(jax.device_put(params, sharding.tree_shardings(params, mesh, RULES, 8)), jax.device_put(keys, rows), sharding.place_batch(batch, mesh))
    assert np.abs(alone - np.asarray(together)).max() <= 2 / 255
    assert alone.std() > 0.05


def test_mesh_sizes():
    """Catches a mesh that silently leaves devices out."""
    assert dict(sharding.make_mesh(dict(data=-1, fsdp=2, model=1, spatial=1)).shape) == {"data": 4, "fsdp": 2, "model": 1, "spatial": 1}
    for wrong in (dict(data=3, fsdp=1, model=1, spatial=1), dict(data=-1, fsdp=-1, model=1, spatial=1), dict(data=2, fsdp=2, model=1, spatial=1)):
        with pytest.raises(ValueError, match="8 devices"):
            sharding.make_mesh(wrong)


def test_batch_that_does_not_divide():
    """Catches the device error in place of a number that would do."""
    with pytest.raises(ValueError, match="multiple of 8"):
        sharding.place_batch({"image": np.zeros((12, 2))}, sharding.make_mesh(MESHES[0]))


def test_fsdp_spec():
    """Catches sharding of the smallest dimension, of scalars, and of what does not divide."""
    assert sharding.fsdp_spec((3, 3, 16, 64), 8, 1) == P(None, None, None, "fsdp")
    assert sharding.fsdp_spec((64, 16), 8, 1) == P("fsdp", None)
    assert sharding.fsdp_spec((60, 16), 8, 1) == P(None, "fsdp"), "the largest dimension does not divide"
    assert sharding.fsdp_spec((3, 5), 8, 1) == P() and sharding.fsdp_spec((), 8, 1) == P() and sharding.fsdp_spec((64,), 8, 100) == P()


def test_rules():
    """Catches rules applied out of order, typos that match nothing, and axes that do not exist."""
    mesh = sharding.make_mesh(dict(data=1, fsdp=2, model=4, spatial=1))
    tree = {"params": {"qkv": {"kernel": jnp.zeros((16, 24))}, "out": {"kernel": jnp.zeros((16, 24)), "bias": jnp.zeros(24)}}}
    rules = [("qkv/kernel", [None, "model"]), ("bias", "replicate"), (".*", "fsdp")]
    made = sharding.tree_shardings(tree, mesh, rules, 1)["params"]
    assert (made["qkv"]["kernel"].spec, made["out"]["kernel"].spec, made["out"]["bias"].spec) == (P(None, "model"), P(None, "fsdp"), P())
    with pytest.raises(ValueError, match="match no leaf: \\['typo'\\]"):
        sharding.tree_shardings(tree, mesh, [("typo", "fsdp"), (".*", "fsdp")], 1)
    with pytest.raises(ValueError, match="use 'fsdp'"):
        sharding.tree_shardings(tree, mesh, [(".*", "everywhere")], 1)
    with pytest.raises(ValueError, match="no sharding rule matches params/out"):
        sharding.tree_shardings(tree, mesh, [("qkv", "fsdp")], 1)


def test_bytes_table():
    """Catches bytes counted without their sharding."""
    mesh = sharding.make_mesh(dict(data=1, fsdp=8, model=1, spatial=1))
    tree = {"params": {"w": jnp.zeros((16, 4)), "b": jnp.zeros(4)}}
    table = sharding.bytes_table(tree, sharding.tree_shardings(tree, mesh, RULES, 8))
    assert table == [{"part": "params", "bytes": 272, "bytes_per_device": 48, "sharded_bytes": 256}]


@pytest.mark.parametrize(
    "sizes, hosts, rows",
    [
        (dict(data=2, fsdp=4), [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]),
        (dict(data=2, fsdp=4), [[0, 1, 4, 5], [2, 3, 6, 7]], [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]),
        (dict(data=1, fsdp=2, spatial=4), [[0, 1], [2, 3], [4, 5, 6, 7]], [[*range(8)], [*range(8)], [*range(8, 16)]]),
    ],
)
def test_each_process_reads_the_rows_that_its_devices_hold(sizes, hosts, rows):
    """Catches: the n-th slice for the n-th process, wrong where its devices are a block of the mesh or share an image with another's."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1, "spatial": 1} | sizes)
    assert [sharding.rows_on([mesh.devices.flat[i] for i in host], 16, mesh) for host in hosts] == rows
    assert sharding.process_rows(16, mesh) == list(range(16))
