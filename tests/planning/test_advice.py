"""Whether a run fits, and changes of the config that need less memory."""

import copy

import pytest

from imagen_jax import sharding
from imagen_jax.hardware import topology
from imagen_jax.planning import advice, train_plan
from imagen_jax.training.step import TrainProgram
from tests import tiny


def plan_of(step, grid, limit=16):
    """The parts of a plan that decide whether it fits, with these peaks of step and sample grid."""
    sampler = {"rows": 64, "peak": grid, "beside": 3, "fits": grid <= limit}
    return {
        "memory": {"fits": step <= limit, "peak": step, "limit": limit, "parts": {"EMA": 1}},
        "sampler": sampler,
    }


def test_a_sample_grid_that_does_not_fit():
    """Catches exit code 0 for a run that fails at its first sample grid, advice that changes a step
    that fits, and a number of rows that reduces no device's share.
    """
    assert (
        train_plan.fits(plan_of(10, 15))
        and not train_plan.fits(plan_of(20, 15))
        and not train_plan.fits(plan_of(10, 20))
    )
    assert (
        train_plan.needed(plan_of(10, 20)) == 20
        and train_plan.needed({"memory": plan_of(10, 20)["memory"]}) == 10
    )
    config = tiny.config("base_64", train__sample_rows=64, mesh__fsdp=2)
    rows = list(advice.advice(config, topology.parse("v5e:4x4"), plan_of(10, 20)))
    assert [row["overrides"] for row in rows] == [
        {"train.sample_rows": 32},
        {"train.sample_rows": 16},
        {"train.sample_every": 0},
    ]
    assert [row["estimated_peak"] for row in rows] == [4 + 8, 4 + 4, 10]


MESHES = (
    {"data": -1},
    {"data": 4},
    {"fsdp": -1, "data": 4},
    {"data": 4, "spatial": -1},
    {"data": 4, "model": -1},
)


@pytest.mark.parametrize(
    "mesh", [MESHES[0], pytest.param(MESHES[1], marks=pytest.mark.slow), *MESHES[2:]], ids=str
)
def test_alternatives_are_valid(mesh):
    """Catches advice that a run would refuse, such as another fsdp with a fixed size of data;
    another order than cheapest first; and no advice.
    """
    config = tiny.config("base_64")
    config["data"]["batch_size"], config["model"]["remat"] = 64, "matrix"
    config["mesh"] |= {"fsdp": 2, "fsdp_min_elements": 8} | mesh
    hardware = topology.parse("v5e:2x4")
    before = copy.deepcopy(config)
    alternatives = advice.alternatives(config, hardware)
    assert alternatives[0] == {"model.remat": "block"}
    order = ("model.remat", "mesh.fsdp", "optim.accumulation", "mesh.spatial", "data.batch_size")
    kinds = [
        max(
            (field for field, value in alternative.items() if field in order and value != 1),
            key=order.index,
        )
        for alternative in alternatives
    ]
    assert tuple(dict.fromkeys(kinds)) == order
    for overrides in alternatives:
        changed = advice.overridden(config, overrides)
        sharding.check_batch(changed["data"]["batch_size"], sharding.mesh_sizes(changed["mesh"], 8))
        if mesh == MESHES[1]:
            TrainProgram.create(changed, sharding.make_mesh(changed["mesh"]))
    assert {"model.remat": "block", "optim.accumulation": 2} in alternatives and {
        "model.remat": "block",
        "data.batch_size": 32,
    } in alternatives
    assert config == before, "the config itself is not changed"


def test_advice_for_slices():
    """Catches an fsdp that extends over several slices, which a run would refuse."""
    config = advice.overridden(tiny.config("base_64"), {"data.batch_size": 64})
    alternatives = advice.alternatives(config, topology.parse("2xv5e:2x2"))
    assert max(alternative.get("mesh.fsdp", 1) for alternative in alternatives) == 4
