"""The compiled sampling program: work that must not be repeated at every step."""

import re
from collections.abc import Iterator

import jax
import pytest

from imagen_jax import sharding
from imagen_jax.hardware import topology
from imagen_jax.planning import hlo, whole_step
from imagen_jax.stage import create_stage
from tests import tiny

PROJECTION = re.compile("text_(proj|kv|pool)")
MATRIX_PRODUCTS = ("dot", "convolution", "custom-call")


def compiled(name: str, devices: list, interval: tuple[float, float]) -> hlo.Module:
    """The sampling program of a tiny stage with guidance, two rows per device."""
    fields = tiny.ONE_LEVEL_UNET if name == "base_64" else tiny.ONE_LEVEL_FIELDS
    config = tiny.config(name, **fields)
    mesh = sharding.make_mesh(dict(data=1, fsdp=len(devices), model=1, spatial=1), devices)
    stage = create_stage(config, mesh)
    sampling = stage.sampling | {"w": 3.0, "w_interval": interval, "steps": 8}
    program, arguments = whole_step.images_program(
        stage, config["mesh"], mesh, sampling, 2 * len(devices), 0, stage.buckets[0]
    )
    return hlo.parse(program.lower(*arguments).compile().as_text())


def in_loops(module: hlo.Module) -> Iterator[hlo.Instruction]:
    """All instructions of loop bodies, also inside fusions, calls and branches."""
    loops = [i for c in module.computations.values() for i in c.values() if i.opcode == "while"]
    todo, seen = [name for loop in loops for name in loop.called["body"]], set()
    assert todo
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            for instruction in module.computations[name].values():
                yield instruction
                todo += [name for names in instruction.called.values() for name in names]


LONG = (pytest.mark.slow, pytest.mark.long)


@pytest.mark.parametrize(
    "name, platform, interval",
    [
        pytest.param("base_64", "cpu", (-20.0, 20.0), marks=LONG),
        pytest.param("base_64", "cpu", (-2.0, 2.0), marks=pytest.mark.slow),
        pytest.param("sr_1024", "cpu", (-2.0, 2.0), marks=pytest.mark.slow),
        pytest.param("base_64", "v5e:2x2", (-20.0, 20.0), marks=LONG),
        pytest.param("base_64", "v5e:2x2", (-2.0, 2.0), marks=pytest.mark.slow),
        pytest.param("sr_1024", "v5e:2x2", (-2.0, 2.0), marks=LONG),
    ],
)
def test_no_text_projection_is_inside_the_loop(name, platform, interval):
    """Catches text that is projected again at every step: the compiler does not move it out of a
    branch, which a guidance interval makes.
    """
    devices = jax.devices()[:2] if platform == "cpu" else topology.parse(platform).devices()
    module = compiled(name, devices, interval)
    everything = [i for c in module.computations.values() for i in c.values()]
    products = lambda instructions: {
        i.op_name
        for i in instructions
        if i.opcode in MATRIX_PRODUCTS and PROJECTION.search(i.op_name)
    }
    assert products(everything) and not products(in_loops(module))
