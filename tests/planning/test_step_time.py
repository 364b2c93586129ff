"""The predicted step time as the sum of its parts, and the most expensive modules."""

import math

import jax
import pytest

from imagen_jax.hardware import topology
from imagen_jax.planning import block_costs, step_time, whole_step
from tests.planning.programs import program


def test_step_time_adds_up():
    """Catches overlapped communication added, exposed communication left out, blocks counted once,
    and MFU computed from one part of the step.
    """
    step, hardware = program(), topology.parse("v5e:2x4")
    block = block_costs.BlockCost(
        ("a", "b"), 0.5, 1.0, 6.0, {"matrix": 0.4, "copy": 0.1}, 0.05, {"": 0.5}
    )
    traffic = [
        whole_step.Traffic("all-gather", ("fsdp",), 1, 1, 0.3),
        whole_step.Traffic("collective-permute", ("spatial",), 1, 1, 0.2),
    ]
    flops = 0.1 * hardware.chip.peak_flops
    times = step_time.predict(step, hardware, flops, [block], 0.07, traffic)
    assert times["step_s"] == pytest.approx(1.0 + 0.2 + 0.07) and times["mfu"] == pytest.approx(
        0.1 / times["step_s"]
    )
    assert times["kinds_s"] == {"matrix": pytest.approx(0.8), "copy": pytest.approx(0.2)} and times[
        "roofline_share_of_compute"
    ] == pytest.approx(0.1)
    assert step_time.memory_traffic(hardware, step_time.blocks_bytes(step, [block]))[
        "seconds"
    ] == pytest.approx(12.0 / hardware.chip.memory_bandwidth)
    slow = [whole_step.Traffic("all-gather", ("data", "fsdp"), 1, 1, 3.0)]
    assert step_time.predict(step, hardware, flops, [block], 0.07, slow)["step_s"] == pytest.approx(
        3.0 + 0.07
    )
    summed = [
        whole_step.Traffic("all-gather", ("fsdp",), 1, 1, 0.8, 0.6),
        whole_step.Traffic("reduce-scatter", ("fsdp",), 1, 1, 0.4),
        whole_step.Traffic("all-reduce", ("data",), 1, 1, 0.1),
    ]
    times = step_time.predict(step, hardware, flops, [block], 0.07, summed)
    assert [times[part] for part in ("step_s", "at_best_s", "in_turn_s")] == pytest.approx(
        [1.0 + 0.5 + 0.07, 1.3 + 0.07, 1.0 + 1.3 + 0.07]
    )
    assert step_time.overlap(summed) == {"gathers_beside": pytest.approx(0.75), "sums_beside": 0.0}


def test_shapes_on_a_chip():
    """Catches shapes of whole parameters in place of shards, and parameters left out."""
    sharded, whole = program(), program(sizes=(8, 1, 1, 1))
    count = sum(leaf.size for leaf in jax.tree.leaves(sharded.abstract.params))
    elements = lambda shapes: sum(n * math.prod(shape) for shape, n in shapes.items())
    assert elements(step_time.shapes_on_a_chip(whole)) == count
    assert 0.25 <= elements(step_time.shapes_on_a_chip(sharded)) / count < 0.4


def test_expensive_modules():
    """Catches a block's forward and backward pass listed as two modules, equal blocks listed one by
    one, and a kernel left out.
    """
    inside = {"ResBlock/conv_0": 0.2, "conv_0": 0.3, "": 0.1}
    blocks = [
        block_costs.BlockCost(("down_1/block_1", "down_1/block_2"), 0.6, 1.0, 0.0, {}, 0.0, inside),
        block_costs.BlockCost(("mid/attn_0",), 0.7, 1.0, 0.0, {"kernel": 0.7}, 0.0, {}),
    ]
    rows = step_time.expensive_modules(blocks, accumulation=2)
    assert [(row["place"], row["others"]) for row in rows] == [
        ("down_1/block_1/conv_0", 1),
        ("mid/attn_0/attend", 0),
        ("down_1/block_1", 1),
    ]
    assert rows[0]["seconds"] == pytest.approx(2.0) and rows[0]["share"] == pytest.approx(1.0 / 1.9)
