"""Runs the paper's stages at full size once, with random weights, on any machine.

    python -m tools.full_size --sample              # one 1024x1024 picture, two steps a stage
    python -m tools.full_size --train base_64:width=192 --train sr_256 --train sr_1024

A CPU with 22 GiB of memory suffices. Each part prints one line of JSON: whether all values are
finite, seconds to compile and to run, the traced FLOPs, and the peak of the process's memory. Run
each part in a process of its own, because the peak is that of the process.
"""

import importlib
import json
import resource
import time
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import app, flags

from configs import cascade as cascade_config
from imagen_jax import cascade, sampling_parameters, schema, sharding
from imagen_jax.stage import create_stage
from imagen_jax.stage_sizes import square
from imagen_jax.text_inputs import TextFeatures
from imagen_jax.training.step import TrainProgram, forward_flops

NAMES = {"base": "base_64", "sr_1": "sr_256", "sr_2": "sr_1024"}
TOKENS = 32  # of the random caption

flags.DEFINE_bool("sample", False, "draw one picture with the whole cascade")
flags.DEFINE_multi_string("train", [], "a config NAME:ARGUMENT; takes one training step at batch 1")
flags.DEFINE_integer("steps", 2, "sampling steps of each stage", lower_bound=1)
flags.DEFINE_bool("tiny", False, "the :tiny variants, to test this script")


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """The completed config configs/NAME.py:ARGUMENT."""
    file, _, argument = name.partition(":")
    config = importlib.import_module(f"configs.{file}").get_config(argument).unlock()
    config.data.update(**changes)
    return schema.complete(json.loads(config.to_json()), name)


def random_leaf(rng: np.random.Generator, path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """A random parameter whose outputs stay finite: kernels have unit gain, scales are near 1."""
    noise = rng.standard_normal(leaf.shape, np.float32)
    if len(leaf.shape) > 1:
        noise /= np.sqrt(np.prod(leaf.shape[:-1]), dtype=np.float32)
    else:
        noise = 0.1 * noise + (path[-1].key == "scale")
    return noise.astype(leaf.dtype)


def load(name: str, index: int, mesh: jax.sharding.Mesh) -> cascade.LoadedStage:
    """A stage with random parameters in the types of sampling."""
    variant = ":tiny" if flags.FLAGS.tiny else ""
    config = config_of(NAMES[name] + variant)
    stage = create_stage(config, mesh)
    shapes = sampling_parameters.for_sampling(jax.eval_shape(stage.init, jax.random.key(0)), stage)
    rng = np.random.default_rng(index)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: random_leaf(rng, path, leaf), shapes
    )
    sampling = schema.complete_sampling(
        cascade_config.get_config()[name].sampling.to_dict() | {"steps": flags.FLAGS.steps}
    )
    shardings = sampling_parameters.parameter_shardings(params, mesh, config["mesh"])
    size = square(stage.image_size)
    program = cascade.sample_program(stage, mesh, shardings, sampling, index, size)
    given = sampling, {}, {}, program, size
    return cascade.LoadedStage(stage, params, shardings, *given)


def report(**fields: Any) -> None:
    """Prints a line of JSON with the peak of this process's memory in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(fields | {"peak_gib": round(peak, 2)}), flush=True)


def sample() -> None:
    """Draws one picture, stage by stage, each with its own line."""
    mesh = sharding.batch_mesh(jax.devices()[:1])
    image = None
    for index, name in enumerate(NAMES):
        loaded = load(name, index, mesh)
        stage = loaded.stage
        rng = np.random.default_rng(0)
        (text_input,) = stage.texts
        text = rng.standard_normal((min(TOKENS, text_input.length), text_input.dim))
        text = text.astype(ml_dtypes.bfloat16)
        started = time.monotonic()
        (drawn,) = cascade.generate(
            [loaded], [0], lambda row, text=text: {"": TextFeatures(text)}, 1, image
        )
        image = drawn.images[0]  # `generate` raises for values that are not finite
        report(
            stage=stage.name,
            image=list(image.shape),
            steps=flags.FLAGS.steps,
            w=loaded.sampling["w"],
            finite=True,
            spread=round(float(image.std()), 1),
            parameters=sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
            seconds=round(time.monotonic() - started, 1),
        )


def train(name: str) -> None:
    """One training step at batch 1."""
    config = config_of(name, batch_size=1)
    config["mesh"] = dict(config["mesh"]) | {"data": 1, "fsdp": 1, "model": 1, "spatial": 1}
    program = TrainProgram.create(config, sharding.make_mesh(config["mesh"], jax.devices()[:1]))
    rng = np.random.default_rng(0)

    def row(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == np.uint8:
            return rng.integers(0, 256, leaf.shape, np.uint8)
        if leaf.dtype == np.bool_:
            return np.ones(leaf.shape, bool)
        return rng.standard_normal(leaf.shape).astype(leaf.dtype)

    started = time.monotonic()
    step = program.lower().compile()
    compiled = time.monotonic() - started
    from imagen_jax.training.state import create_state

    state = create_state(program.stage, program.optimizer, 0, program.shardings)
    batch = {name: row(leaf) for name, leaf in program.batch.items()}
    started = time.monotonic()
    _, metrics = jax.block_until_ready(step(state, jax.device_put(batch)))
    stage = create_stage(config)
    flops = 3 * forward_flops(stage, stage.largest_bucket)
    loss, norm = float(metrics["loss"]), float(metrics["norm/grad"])
    report(
        config=name,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params)),
        loss=loss,
        gradient_norm=norm,
        finite=bool(np.isfinite([loss, norm]).all()),
        compile_seconds=round(compiled, 1),
        seconds=round(time.monotonic() - started, 1),
        traced_tflop=round(flops / 1e12, 3),
    )


def main(_: Any) -> None:
    if flags.FLAGS.sample:
        sample()
    for name in flags.FLAGS.train:
        train(name)


if __name__ == "__main__":
    app.run(main)
