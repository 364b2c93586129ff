"""The measured networks, with parameters and batches whose generation compiles fast.

Parameters come from an integer hash instead of the initialisers. So no kernel is zero, every branch
of a network is active, and only one fusion per leaf is compiled.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tools.accelerator import package

# Name -> (config, argument, its variant on a CPU).
MODELS = {
    "base_500m": ("base_64", "width=256"),
    "base_2b": ("base_64", ""),
    "sr_256": ("sr_256", ""),
    "sr_1024": ("sr_1024", ""),
}
# With --tiny: width and length of text features, and networks of one level, which compile faster.
TINY_TEXT = (8, 6)
TINY_FIELDS = {
    "unet": dict(multipliers=(1,), attention=(True,), text_attention=(True,)),
    "efficient_unet": dict(widths=(16,), blocks=(1,), attention=("cross",)),
}


def stage_config(model: str, tiny: bool, batch: int = 1, **model_fields: Any) -> dict[str, Any]:
    """The config of a measured network on one device, without accumulation."""
    name, arg = MODELS[model]
    content = package.config(name, "tiny" if tiny else arg)
    content["mesh"].update(data=1, fsdp=1, model=1, spatial=1)
    content["data"]["batch_size"] = batch
    content["optim"]["accumulation"] = 1
    if tiny:
        content["model"].update(TINY_FIELDS[content["model"]["family"]])
        content["text"]["dim"], content["data"]["text_length"] = TINY_TEXT
    content["model"].update(model_fields)
    return content


def hashed(shape: tuple[int, ...], salt: int) -> jax.Array:
    """Uniform values of mean 0 and deviation 1 from an integer hash of their index."""
    position = jax.lax.iota(jnp.uint32, math.prod(shape)) + jnp.uint32((salt * 40503) % 2**32)
    mixed = position * jnp.uint32(2654435761)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(3266489917)
    unit = (mixed ^ (mixed >> 16)).astype(jnp.float32) / 2.0**32 - 0.5
    return (unit * math.sqrt(12.0)).reshape(shape)


def parameters(shapes: Any, dtype: Any = jnp.float32) -> Any:
    """Parameters of these shapes: norms near 1, kernels of variance 1 over fan-in. Traceable."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    filled = []
    for salt, (path, leaf) in enumerate(leaves):
        values = hashed(leaf.shape, salt)
        name = str(getattr(path[-1], "key", path[-1]))
        if name == "scale":
            values = 1.0 + 0.02 * values
        elif len(leaf.shape) > 1:
            values = values * math.prod(leaf.shape[:-1]) ** -0.5
        else:
            values = 0.02 * values
        filled.append(values.astype(dtype))
    return jax.tree.unflatten(jax.tree.structure(shapes), filled)


def stage_parameters(stage: package.Stage, dtype: Any = jnp.float32) -> Any:
    """A stage's parameters from this hash, on the default device."""
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    return jax.jit(lambda: parameters(shapes, dtype))()


def train_state(program: package.TrainProgram) -> Any:
    """A training state with parameters from this hash; each leaf is made on its device."""
    abstract = program.abstract

    def make():
        params = parameters(abstract.params)
        return abstract.replace(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=program.optimizer.init(params),
            bad_step=jnp.full((), -1, jnp.int32),
        )

    return jax.jit(make, out_shardings=program.shardings)()


def synthetic_batch(shapes: dict[str, tuple[tuple[int, ...], Any]]) -> dict[str, np.ndarray]:
    """Random values for the fields that a step reads; captions differ in length."""
    rng = np.random.default_rng(0)
    batch_arrays = {}
    for name, (shape, dtype) in shapes.items():
        if name == "text_mask":
            lengths = rng.integers(1, shape[1] + 1, shape[0])
            batch_arrays[name] = np.arange(shape[1]) < lengths[:, None]
        elif name == "text":
            batch_arrays[name] = rng.standard_normal(shape, np.float32).astype(dtype)
        else:
            batch_arrays[name] = rng.integers(0, 256, shape, np.uint8)
    return batch_arrays
