"""The blocks of a network, their programs, and the cache of their costs."""

import importlib.metadata

import jax
import pytest

from imagen_jax.hardware import topology
from imagen_jax.planning import advice, block_costs, cost_cache
from imagen_jax.planning.blocks import block_program, find_blocks
from imagen_jax.stage import create_stage
from imagen_jax.training.step import forward_flops
from tests import tiny

NAMES = ("base_64", "sr_256", "sr_1024")


@pytest.mark.parametrize(
    "name", ["base_64", "sr_256", pytest.param("sr_1024", marks=pytest.mark.slow)]
)
def test_blocks_are_the_whole_network(name):
    """Catches a module in no block or in two, equal blocks counted once, and FLOPs that do not add
    up to those of the loss.
    """
    stage, b = create_stage(tiny.config(name)), 4
    blocks = find_blocks(stage, b)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    counted = sum(
        len(block.paths) * sum(leaf.size for leaf in jax.tree.leaves(block.params))
        for block in blocks
    )
    assert counted == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert any(len(block.paths) > 1 for block in blocks)

    def flops(block):
        forward, _, shapes = block_program(stage, block)
        return jax.jit(forward).lower(*shapes[:3]).cost_analysis()["flops"]

    total = sum(len(block.paths) * flops(block) for block in blocks)
    # The loss, the noise and resampling are in no block.
    assert total == pytest.approx(b * forward_flops(stage, stage.largest_bucket), rel=0.1)


def test_block_program_is_forward_and_backward():
    """Catches a program without gradients, with the gradient of the input only, or with the
    gradient of a stem's input, which no parameter needs.
    """
    stage = create_stage(tiny.config("base_64"))
    blocks = {block.paths[0]: block for block in find_blocks(stage, 2)}
    for path, has_input_gradient in (("down_1/block_0", True), ("stem", False)):
        _, both, shapes = block_program(stage, blocks[path])
        out, (d_params, d_input) = jax.eval_shape(both, *shapes)
        assert jax.tree.map(lambda a: a.shape, d_params) == jax.tree.map(
            lambda a: a.shape, blocks[path].params
        )
        assert bool(d_input) == has_input_gradient and out[0].shape[0] == 2


DAMAGED = (
    '{"seco',
    "{}",
    "[]",
    "null",
    '{"seconds": -1, "kinds": {}}',
    '{"seconds": NaN, "kinds": {}}',
    '{"seconds": 1, "kinds": {"copy": "1"}}',
    '{"seconds": 1, "kinds": []}',
    '{"seconds": true, "kinds": {}}',
    '{"seconds": 1, "kinds": {}, "more": 1}',
    "[" * 100_000,
)


def test_a_damaged_cost_is_computed_again(tmp_path, monkeypatch):
    """Catches a plan that fails for ever because of a damaged file in the cache, also one that is
    valid JSON or cannot be replaced; and a cost that is computed although it is cached.
    """
    # The test also runs where the TPU compiler is not installed.
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1")
    calls = []
    compute = lambda: calls.append(1) or {"seconds": len(calls), "kinds": {"copy": 0.5}}
    cached = lambda: cost_cache.cached(
        str(tmp_path), "key", {"seconds": float, "kinds": dict}, compute
    )["seconds"]
    assert cached() == cached() == 1
    (file,) = tmp_path.iterdir()
    for i, text in enumerate(DAMAGED):
        file.write_text(text)
        assert cached() == cached() == len(calls) == 2 + i
    file.unlink()
    file.mkdir()
    assert cached() == len(calls) == 2 + len(DAMAGED)


def test_rows_per_chip():
    """Catches rows divided by axes that do not split the batch, and accumulation steps left out."""
    config = tiny.config("base_64")
    config["data"]["batch_size"], config["optim"]["accumulation"] = 2048, 2
    config["mesh"] |= {"model": 2, "spatial": 1}
    assert block_costs.rows_per_chip(config, topology.parse("v5e:16x16")) == 8
    config["mesh"] |= {"data": 8, "fsdp": 16, "model": -1}
    assert block_costs.rows_per_chip(config, topology.parse("v5e:16x16")) == 8, (
        "an axis that takes the remaining devices"
    )


@pytest.mark.parametrize(
    "name, chips, shape",
    [
        ("v5e:16x16", 1, (2, 2)),
        ("v5e:16x16", 4, (2, 2)),
        ("v5p-256", 4, (2, 2, 1)),
        ("v5e:16x16", 8, (2, 4)),
        ("4xv5p-256", 16, (2, 2, 4)),
    ],
)
def test_blocks_have_the_chips_they_are_split_over(name, chips, shape):
    """Catches blocks of mesh.spatial = 8, which plan itself advises, on a slice of four chips; and
    another slice for fewer chips, which would invalidate the cache.
    """
    assert block_costs.smallest(topology.parse(name), chips).shape == shape


def test_a_number_of_chips_without_a_slice():
    """Catches a compiler crash after the whole step was compiled, and an axis of size -1 that is
    not resolved.
    """
    config = advice.overridden(tiny.config("base_64"), {"mesh.data": 64, "mesh.spatial": -1})
    block_costs.check_columns(config, topology.parse("v5p:4x4x8"))
    with pytest.raises(ValueError, match="= 3 does not divide the 4 chips .*use --notime"):
        block_costs.check_columns(config, topology.parse("v5p:4x4x12"))
