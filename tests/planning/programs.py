"""Train steps of tiny configs on virtual devices, for the tests of planning."""

from imagen_jax import sharding
from imagen_jax.planning import advice
from imagen_jax.training.step import TrainProgram
from tests import tiny


def program(name="base_64", sizes=(2, 4, 1, 1), **overrides):
    config = advice.overridden(tiny.config(name), {"mesh.fsdp_min_elements": 8} | overrides)
    return TrainProgram.create(config, sharding.make_mesh(dict(zip(sharding.AXES, sizes))))
