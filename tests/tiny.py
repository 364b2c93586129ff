"""Small stages and batches for the tests of the joints: configs/*.py:tiny on random pixels and
text.
"""

import copy
import functools
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.stage import Stage, create_stage
from imagen_jax.training import optim
from imagen_jax.training.step import make_step

ROOT = Path(__file__).parent.parent
DIM = 8
# Fields of sr_256:tiny and sr_1024:tiny for runs of several processes: one level of the two
# compiles in half the time.
ONE_LEVEL = (
    "--config.model.widths=(16,)",
    "--config.model.blocks=(1,)",
    "--config.model.attention=('cross',)",
)
# The trainer with a disk that is full at the first save and has room at the next.
FULL_ONCE = """
import runpy
from imagen_jax.weights import checkpoint
seal = checkpoint.seal
def full(directory):
    checkpoint.seal = seal
    raise OSError(28, "No space left on device")
checkpoint.seal = full
runpy.run_module("imagen_jax.train", run_name="__main__")
"""


# What JAX's plugin for GPUs writes when it is installed (make test-slow does it) and there is no
# GPU.
PLUGIN = re.compile(r"WARNING: All log messages before absl|I\d{4} .* cudart_stub")


def said(stderr: str) -> list[str]:
    """The lines that a command itself wrote."""
    return [line for line in stderr.splitlines() if not PLUGIN.match(line)]


@functools.cache
def _load(name: str, arg: str) -> str:
    spec = importlib.util.spec_from_file_location(f"config_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg).to_json()


def config(name: str = "base_64", arg: str = "tiny", **changes) -> dict:
    """A plain config; `changes` are dotted fields with __ for the dot: optim__lr=0.1."""
    content = copy.deepcopy(json.loads(_load(name, arg)))
    content["text"]["dim"] = DIM
    content["data"]["text_length"] = 6
    content["optim"]["warmup"] = 1
    for field, value in changes.items():
        part, _, key = field.partition("__")
        if key:
            content[part][key] = value
        else:
            content[part] = value
    return content


def batch(stage: Stage, b: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as the pipeline makes it, without indices."""
    rng = np.random.default_rng(seed)
    shapes = stage.batch_shapes(b)
    arrays = {"image": rng.integers(0, 256, shapes["image"][0], np.uint8)}
    lengths = rng.integers(1, stage.text_length + 1, b)
    arrays["text_mask"] = np.arange(stage.text_length) < lengths[:, None]
    arrays["text"] = (
        rng.standard_normal(shapes["text"][0]) * arrays["text_mask"][..., None]
    ).astype(jnp.bfloat16)
    if "lowres" in shapes:
        arrays["lowres"] = rng.integers(0, 256, shapes["lowres"][0], np.uint8)
    return arrays


def stage_and_step(resolved: dict, mesh=None):
    """(stage, optimizer, step) of a config."""
    stage = create_stage(resolved, mesh)
    optimizer = optim.make_optimizer(resolved["optim"], resolved["train"]["steps"])
    rate = optim.learning_rate(resolved["optim"], resolved["train"]["steps"])
    return stage, optimizer, make_step(stage, optimizer, rate, resolved["optim"], resolved["seed"])


def perturbed(params, scale: float = 0.1, seed: int = 0):
    """Parameters away from their zero-initialised start."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree,
        [
            leaf + jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)
            for leaf in leaves
        ],
    )
