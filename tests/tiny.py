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
# A network of one level, which compiles in half the time, for tests of anything but networks:
# changes for `config` of sr_256 or sr_1024, changes for base_64, and command-line options (sr).
ONE_LEVEL_FIELDS = dict(model__widths=(16,), model__blocks=(1,), model__attention=("cross",))
ONE_LEVEL_UNET = dict(
    model__multipliers=(1,), model__attention=(True,), model__text_attention=(True,)
)
ONE_LEVEL = tuple(
    f"--config.{field.replace('__', '.')}={value!r}" for field, value in ONE_LEVEL_FIELDS.items()
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
    shapes = stage.batch_shapes(b, (stage.train_size, stage.train_size))
    arrays = {"image": rng.integers(0, 256, shapes["image"][0], np.uint8)}
    longest = shapes["text_mask"][0][1]
    arrays["text_mask"] = np.arange(longest) < rng.integers(1, longest + 1, b)[:, None]
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
    """Parameters (numpy) away from their zero-initialised start."""
    rng = np.random.default_rng(seed)
    move = lambda leaf: leaf + (scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
    return jax.tree.map(move, jax.device_get(params))


def random_params(init, *args, seed: int = 0):
    """Parameters (numpy) for `init(key, *args)`, none of them zero. Nothing is compiled, unlike
    `perturbed(jax.jit(init)(key, *args))`.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(leaf.dtype)
        if path[-1].key == "kernel":
            return noise / np.sqrt(np.prod(leaf.shape[:-1]), dtype=leaf.dtype)
        return (path[-1].key == "scale") + 0.1 * noise

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(init, jax.random.key(0), *args))


def relative_error(tree, expected) -> float:
    """The norm of the difference of two trees, divided by the norm of the second."""
    norm = lambda t: np.sqrt(sum(np.square(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(t)))
    return norm(jax.tree.map(np.subtract, tree, expected)) / norm(expected)
