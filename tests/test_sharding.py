"""Eight virtual devices compared with one: losses, gradients, samples; and the sharding rules."""

import dataclasses
import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from imagen_jax import sharding
from imagen_jax.planning import hlo
from imagen_jax.training.state import abstract_state, bytes_table, create_state
from imagen_jax.training.step import TrainProgram, loss_and_grad
from tests import tiny

LONG = (pytest.mark.slow, pytest.mark.long)
DATA = dict(data=8, fsdp=1, model=1, spatial=1)
FSDP = dict(data=2, fsdp=4, model=1, spatial=1)
SPATIAL = dict(data=2, fsdp=2, model=1, spatial=2)
MODEL = dict(data=2, fsdp=2, model=2, spatial=1)
RULES = ((".*", "fsdp"),)
# Over `model`: the outputs of a block's first layer, the inputs of its second, attention heads.
MODEL_RULES = (
    ("conv_0/kernel", [None, None, "fsdp", "model"]),
    ("conv_1/kernel", [None, None, "model", "fsdp"]),
    ("kv/kernel", ["fsdp", "model"]),
    ("(attn|attn_0)/out/kernel", ["model", "fsdp"]),
    *RULES,
)


def rules_for(mesh):
    return MODEL_RULES if mesh.shape["model"] > 1 else RULES


def loss_on(name, mesh, params=None, fields=None):
    """(loss, gradients, parameters) of a tiny stage on a mesh.

    Parameters are the given host arrays, or the stage's initial ones, perturbed. fields: changes of
    the config.
    """
    stage, optimizer, _ = tiny.stage_and_step(tiny.config(name, **fields or {}), mesh)
    _, shardings = abstract_state(stage, optimizer, mesh, rules_for(mesh), 8)
    if params is None:
        params = tiny.perturbed(jax.device_get(create_state(stage, optimizer, 0, shardings).params))
    placed, batch = (
        jax.device_put(params, shardings.params),
        sharding.place_batch(tiny.batch(stage, 8), mesh),
    )
    loss, grads, _ = jax.device_get(
        jax.jit(lambda p, b: loss_and_grad(stage, p, b, jax.random.key(1), 1))(placed, batch)
    )
    return loss, grads, params


@functools.cache
def on_one_device(name, one_level=False):
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, model=1, spatial=1), jax.devices()[:1])
    return loss_on(name, mesh, fields=tiny.ONE_LEVEL_FIELDS if one_level else None)


def assert_same_on(mesh, name, one_level=False):
    """The loss and the gradients on a mesh are those of one device."""
    loss, grads, params = on_one_device(name, one_level)
    fields = tiny.ONE_LEVEL_FIELDS if one_level else None
    mesh_loss, mesh_grads, _ = loss_on(name, mesh, params, fields)
    np.testing.assert_allclose(loss, mesh_loss, rtol=1e-5)
    assert tiny.relative_error(mesh_grads, grads) < 1e-5


# FSDP on sr_1024 is in `test_slices_lie_along_data`.
@pytest.mark.parametrize(
    "name, sizes, one_level",
    [
        ("sr_1024", SPATIAL, True),
        pytest.param("sr_1024", SPATIAL, False, marks=LONG),
        pytest.param("base_64", SPATIAL, False, marks=pytest.mark.slow),
        pytest.param("base_64", MODEL, False, marks=LONG),
        pytest.param("base_64", DATA, False, marks=LONG),
        pytest.param("sr_1024", MODEL, False, marks=pytest.mark.slow),
    ],
)
def test_mesh_changes_nothing(name, sizes, one_level):
    """Catches a loss averaged per device, noise that depends on the mesh, and a missing halo
    exchange.
    """
    assert_same_on(sharding.make_mesh(sizes), name, one_level)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base_64", "sr_1024"])
def test_state_is_born_sharded(name):
    """Catches a state that is replicated although a rule shards it, and initial parameters that
    depend on the mesh.
    """
    mesh = sharding.make_mesh(FSDP)
    stage, optimizer, _ = tiny.stage_and_step(tiny.config(name), mesh)
    abstract, shardings = abstract_state(stage, optimizer, mesh, RULES, 8)
    table = bytes_table(abstract, shardings)
    assert sum(row["sharded_bytes"] for row in table) >= 0.9 * sum(row["bytes"] for row in table)
    state = create_state(stage, optimizer, 0, shardings)
    kernel = state.params["down_1"]["block_0"]["conv_0"]["kernel"]
    assert kernel.addressable_shards[0].data.size * FSDP["fsdp"] == kernel.size
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        tiny.perturbed(jax.device_get(state.params)),
        on_one_device(name)[2],
    )


# The number of constraints: one for the stem, three for each residual block, five for one that
# resamples; in the Efficient U-Net one for each resampling convolution and two for each MLP.
@pytest.mark.parametrize(
    "name, count", [("base_64", 1 + 3 * 8 + 5 * 2), ("sr_1024", 1 + 4 * 4 + 2 * 2)]
)
def test_every_block_is_split_by_rows_and_height(name, count):
    """Catches a constraint that does not reach the network: results stay right, but large images no
    longer fit.
    """
    stage, _, _ = tiny.stage_and_step(tiny.config(name), sharding.make_mesh(SPATIAL))
    params = jax.eval_shape(stage.init, jax.random.key(0))
    loss = lambda p, b: loss_and_grad(stage, p, b, jax.random.key(1), 1)[0]
    program = str(jax.make_jaxpr(loss)(params, tiny.batch(stage, 8)))
    assert program.count("(('data', 'fsdp'), 'spatial')") == 2 * count  # forward and backward


@pytest.mark.parametrize("name", ["base_64", "sr_1024"])
def test_kernels_are_gathered_block_by_block(name):
    """Catches parameters that are held whole for the backward pass, or all at once: a block gathers
    its kernels when it computes, and again when the backward pass computes it.
    """
    config = tiny.config(name, model__remat="matrix")
    stage, _, _ = tiny.stage_and_step(config, sharding.make_mesh(SPATIAL))
    params = jax.eval_shape(stage.init, jax.random.key(0))
    loss = lambda p, b: loss_and_grad(stage, p, b, jax.random.key(1), 1)[0]
    program = jax.make_jaxpr(loss)(params, tiny.batch(stage, 8)).jaxpr
    kernels = [
        leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 4 and leaf.shape[:2] == (3, 3)
    ]
    in_blocks, elsewhere = count_gathers(program)
    of_blocks = 2 * name_count(params, "conv_0")
    assert in_blocks == 2 * of_blocks  # computed again, and the kernel's gradient
    assert elsewhere == of_blocks + 2 * (len(kernels) - of_blocks)


def name_count(params, name):
    paths = jax.tree_util.tree_leaves_with_path(params)
    return sum(f"{name}/kernel" in sharding.path_name(path) for path, _ in paths)


def count_gathers(jaxpr, in_block=False):
    """The number of constraints on 3x3 kernels (inside checkpointed blocks, elsewhere)."""
    counts = [0, 0]
    for equation in jaxpr.eqns:
        shape = equation.outvars[0].aval.shape if equation.outvars else ()
        if equation.primitive.name == "sharding_constraint" and shape[:2] == (3, 3):
            counts[not in_block] += 1
        inside = in_block or equation.primitive.name == "remat2"
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            counts = [a + b for a, b in zip(counts, count_gathers(inner, inside))]
    return counts


def sample_on(name, mesh, sampling, fields):
    """Eight samples of a tiny stage; its parameters do not depend on the mesh.

    sampling: changed settings. fields: changes of the config.
    """
    stage, _, _ = tiny.stage_and_step(tiny.config(name, **fields), mesh)
    params = tiny.random_params(stage.init)
    placed, rows = (
        jax.device_put(params, sharding.tree_shardings(params, mesh, rules_for(mesh), 8)),
        sharding.batch_sharding(mesh),
    )
    keys = jax.device_put(jax.random.split(jax.random.key(1), 8), rows)
    sampling, size = {**stage.sampling, **sampling}, (stage.image_size, stage.image_size)
    draw = jax.jit(lambda p, k, b: stage.sample(p, k, b, sampling, size))
    batch = tiny.batch(dataclasses.replace(stage, crop_size=0), 8)  # of whole images
    return np.asarray(draw(placed, keys, sharding.place_batch(batch, mesh)))


SECOND_ORDER = {"method": "dpmpp_2m", "grid": "logsnr", "w_interval": (-2.0, 2.0)}


@pytest.mark.parametrize(
    "name, sizes, sampling, fields",
    [
        pytest.param(
            "sr_1024", SPATIAL, SECOND_ORDER, tiny.ONE_LEVEL_FIELDS, marks=pytest.mark.slow
        ),
        pytest.param("sr_256", MODEL, {}, {}, marks=pytest.mark.slow),
        pytest.param("sr_1024", SPATIAL, SECOND_ORDER, {}, marks=LONG),
    ],
)
def test_sample_is_the_same_on_a_mesh(name, sizes, sampling, fields):
    """Catches noise drawn per device, and a missing halo exchange in the sampler: no fp32 pixel may
    change by more than 1/255.
    """
    one = sharding.make_mesh(dict(data=1, fsdp=1, model=1, spatial=1), jax.devices()[:1])
    alone = sample_on(name, one, sampling, fields)
    meshed = sample_on(name, sharding.make_mesh(sizes), sampling, fields)
    assert np.abs(alone - meshed).max() <= 2 / 255
    assert alone.std() > 0.05


def test_slices_lie_along_data(monkeypatch):
    """Catches a group of fsdp that extends over several slices, results that depend on the order of
    the devices, and a slice that is cut.
    """
    monkeypatch.setattr(sharding, "slice_of", lambda device: device.id % 2)
    mesh = sharding.make_mesh(dict(data=-1, fsdp=2, model=1, spatial=1))
    assert [[device.id % 2 for device in row] for row in mesh.devices.reshape(4, 2)] == [
        [0, 0],
        [0, 0],
        [1, 1],
        [1, 1],
    ]
    assert_same_on(mesh, "sr_1024", one_level=True)
    with pytest.raises(
        ValueError, match="cuts through 2 slices of 4 devices: `data` must be a multiple of 2"
    ):
        sharding.make_mesh(dict(data=1, fsdp=8, model=1, spatial=1))


def test_mesh_sizes():
    """Catches a mesh that silently uses only some of the devices."""
    assert dict(sharding.make_mesh(dict(data=-1, fsdp=2, model=1, spatial=1)).shape) == {
        "data": 4,
        "fsdp": 2,
        "model": 1,
        "spatial": 1,
    }
    for wrong, choices in (
        (dict(data=3, fsdp=1, model=1, spatial=1), "data may be 8"),
        (dict(data=-1, fsdp=3, model=2, spatial=1), "fsdp may be 1, 2, 4$"),
        (dict(data=-1, fsdp=-1, model=1, spatial=1), "more than one is -1"),
        (dict(data=2, fsdp=2, model=1, spatial=1), "fsdp may be 4"),
    ):
        with pytest.raises(ValueError, match=f"8 devices.*{choices}"):
            sharding.make_mesh(wrong)


def test_batch_that_does_not_divide():
    """Catches a device error in place of the valid sizes."""
    with pytest.raises(ValueError, match="multiple of 8"):
        sharding.place_batch({"image": np.zeros((12, 2))}, sharding.make_mesh(DATA))


def test_fsdp_spec():
    """Catches sharding of the smallest dimension, of scalars, and of dimensions that do not divide
    evenly.
    """
    assert sharding.fsdp_spec((3, 3, 16, 64), 8, 1) == P(None, None, None, "fsdp")
    assert sharding.fsdp_spec((64, 16), 8, 1) == P("fsdp", None) and sharding.fsdp_spec(
        (3, 3, 64, 64), 8, 1
    ) == P(None, None, "fsdp", None)
    assert sharding.fsdp_spec((60, 16), 8, 1) == P(None, "fsdp"), (
        "the largest dimension does not divide"
    )
    assert (
        sharding.fsdp_spec((3, 5), 8, 1) == P()
        and sharding.fsdp_spec((), 8, 1) == P()
        and sharding.fsdp_spec((64,), 8, 100) == P()
    )


def test_rules():
    """Catches rules applied in another order, typos that match nothing, unknown axes."""
    mesh = sharding.make_mesh(dict(data=1, fsdp=2, model=4, spatial=1))
    tree = {
        "params": {
            "qkv": {"kernel": jnp.zeros((16, 24))},
            "out": {"kernel": jnp.zeros((16, 24)), "bias": jnp.zeros(24)},
        }
    }
    rules = [("qkv/kernel", [None, "model"]), ("bias", "replicate"), (".*", "fsdp")]
    params = sharding.tree_shardings(tree, mesh, rules, 1)["params"]
    out = params["out"]
    assert params["qkv"]["kernel"].spec == P(None, "model")
    assert (out["kernel"].spec, out["bias"].spec) == (P(None, "fsdp"), P())
    with pytest.raises(ValueError, match="match no leaf: \\['typo'\\]"):
        sharding.tree_shardings(tree, mesh, [*rules, ("typo", "fsdp")], 1)
    with pytest.raises(ValueError, match="use 'fsdp'"):
        sharding.tree_shardings(tree, mesh, [*rules[:1], (".*", "everywhere")], 1)
    for wrong, message in (
        ([("(", "fsdp")], "not a valid regular expression"),
        ([(".*", 3)], "a rule is"),
        ("abc", "a rule is"),
        ([(".*",)], "a rule is"),
        ([("kernel", ["model", "model"])], "names an axis twice"),
        ([(".*", "fsdp")], "mesh.model is 4, but no rule shards anything over it"),
    ):
        with pytest.raises(ValueError, match=message):
            sharding.tree_shardings(tree, mesh, wrong, 1)
    with pytest.raises(ValueError, match="no sharding rule matches params/out"):
        sharding.tree_shardings(tree, mesh, rules[:1], 1)


def test_parameters_that_cannot_be_sharded_are_named():
    """Catches a large parameter that is silently replicated, and advice that would not shard it
    either.
    """
    mesh = sharding.make_mesh(dict(data=1, fsdp=4, model=2, spatial=1))
    shapes = {"odd": (6, 9), "even": (8, 9), "small": (3,), "qkv": (8, 9), "heads": (8, 6)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    rules = [("qkv|heads", [None, "model"]), (".*", "fsdp")]
    lines = sharding.badly_split(params, mesh, rules, 8)
    assert [line.partition(":")[0] for line in lines] == ["params/odd [6, 9]", "params/qkv [8, 9]"]
    assert "no dimension is a multiple of mesh.fsdp = 4; set mesh.fsdp to one of 2" in lines[0]
    assert "must be a multiple of its axis's size" in lines[1]
    (line,) = sharding.badly_split({"prime": params["odd"].update(shape=(7, 7))}, mesh, rules, 8)
    assert "no mesh.fsdp divides it" in line
    assert not sharding.badly_split(params, mesh, [(".*", "replicate")], 8)


def test_bytes_table():
    """Catches bytes per device that ignore the sharding."""
    mesh = sharding.make_mesh(dict(data=1, fsdp=8, model=1, spatial=1))
    tree = {"params": {"w": jnp.zeros((16, 4)), "b": jnp.zeros(4)}}
    table = bytes_table(tree, sharding.tree_shardings(tree, mesh, RULES, 8))
    assert table == [{"part": "params", "bytes": 272, "bytes_per_device": 48, "sharded_bytes": 256}]


@pytest.mark.parametrize(
    "name, fields",
    [
        pytest.param("sr_256", tiny.ONE_LEVEL_FIELDS, marks=pytest.mark.slow),
        pytest.param("base_64", {}, marks=LONG),
        pytest.param("sr_256", {}, marks=LONG),
    ],
)
def test_no_feature_map_is_gathered(name, fields):
    """Catches a partitioner that follows the shards of kernels, so that feature maps are
    all-gathered in place of kernels.
    """
    config = tiny.config(name, data__batch_size=64, **fields)
    config["mesh"] |= {"data": 2, "fsdp": 4, "fsdp_min_elements": 256}
    program = TrainProgram.create(config, sharding.make_mesh(config["mesh"]))
    collectives = list(hlo.collectives(hlo.parse(program.lower().compile().as_text()), 8))
    largest = max(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract.params)
    )
    assert any(c.kind == "all-gather" for c in collectives)
    assert max(c.bytes for c in collectives if c.kind in ("all-gather", "all-to-all")) <= largest


@pytest.mark.parametrize(
    "sizes, hosts, rows",
    [
        (
            dict(data=2, fsdp=4),
            [[0, 1, 2, 3], [4, 5, 6, 7]],
            [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]],
        ),
        (
            dict(data=2, fsdp=4),
            [[0, 1, 4, 5], [2, 3, 6, 7]],
            [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]],
        ),
        (
            dict(data=1, fsdp=2, spatial=4),
            [[0, 1], [2, 3], [4, 5, 6, 7]],
            [[*range(8)], [*range(8)], [*range(8, 16)]],
        ),
    ],
)
def test_each_process_reads_the_rows_that_its_devices_hold(sizes, hosts, rows):
    """Catches the n-th part of the batch for the n-th process. This is wrong where a process's
    devices are a block of the mesh, and where an image is sharded over processes.
    """
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1, "spatial": 1} | sizes)
    assert [
        sharding.rows_on([mesh.devices.flat[i] for i in host], 16, mesh) for host in hosts
    ] == rows
    assert sharding.process_rows(16, mesh) == list(range(16))


def test_a_training_uses_the_compiler_options(monkeypatch):
    """Catches compiler options that plan uses for the train step and a training does not."""
    config = tiny.config("sr_256", data__batch_size=8)
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "model": 1, "spatial": 1})
    assert sharding.compiler_options(mesh) == {}, "there are no options for CPUs"
    monkeypatch.setattr(sharding, "compiler_options", lambda mesh: {"no_such_option": "true"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        TrainProgram.create(config, mesh).lower().compile()
