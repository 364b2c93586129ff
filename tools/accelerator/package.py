"""The parts of imagen_jax that the measurements use.

What imports the data pipeline or checkpoints is imported when it is used: the other measurements
then run without grain, orbax and safetensors.
"""

import importlib
import json
from collections.abc import Mapping
from typing import Any

import jax

from imagen_jax import stage as stages
from imagen_jax.hardware.chips import peak_flops
from imagen_jax.models.unet import UNet
from imagen_jax.sharding import make_mesh
from imagen_jax.stage import Stage, create_stage, to_uint8
from imagen_jax.training.step import TrainProgram, forward_flops

__all__ = [
    "Stage", "TrainProgram", "UNet", "create_stage", "forward_flops", "make_mesh", "peak_flops",
    "stages", "to_uint8",
]  # fmt: skip


def config(name: str, arg: str) -> dict[str, Any]:
    """The config configs/NAME.py:ARG as a plain dict."""
    module = importlib.import_module(f"configs.{name}")
    return json.loads(module.get_config(arg).to_json())


def state_parts(program: TrainProgram) -> dict[str, int]:
    """Bytes on a device of what a step holds, from shapes and shardings."""
    from imagen_jax.planning.whole_step import state_parts

    return state_parts(program)


def embedded_base(sampling: Mapping[str, Any]) -> tuple[Stage, Any]:
    """The stage and parameters of the base that ships with the package."""
    from imagen_jax import cascade, sharding

    mesh = sharding.batch_mesh(jax.devices()[:1])
    loaded = cascade.load_stage("embedded:base_16", sampling, "ema", mesh, 0).on_mesh()
    return loaded.stage, loaded.params


def prepared(path: str) -> Any:
    """Prepared data, for its captions."""
    from imagen_jax.data.records import Prepared

    return Prepared(path)


def pictures() -> Any:
    """The module that draws contact sheets."""
    from imagen_jax import pictures

    return pictures
