"""Sample grids of a training run: how the EMA draws the same few rows as training goes on."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import UInt8

from imagen_jax import cascade, pictures, sharding
from imagen_jax.data import pipeline
from imagen_jax.stage import Params, Stage, to_uint8


def draw_program(stage: Stage, mesh: Mesh, rows: int) -> Any:
    """(EMA as the run holds it, {text, text_mask, lowres}) -> so many images of the size that is
    trained on, on every device; jitted, what plan compiles too.
    """

    def draw(ema, batch):
        keys = cascade.sample_keys(range(rows), 0)
        return to_uint8(stage.sample(ema, keys, batch, stage.sampling, stage.train_size))

    return jax.jit(
        draw,
        out_shardings=NamedSharding(mesh, PartitionSpec()),
        compiler_options=sharding.compiler_options(mesh),
    )


class SampleGrid:
    """Rows evenly spread over the held-out images (the training images if none are held out), read
    once and drawn by one program.
    """

    def __init__(self, config: Mapping[str, Any], stage: Stage, mesh: Mesh):
        """config: a stage's; train.sample_rows of its data are drawn."""
        prepared = pipeline.open_prepared(config["data"])
        split = prepared.evaluation_split
        count = prepared.manifest["counts"]["images"][split]
        rows = (
            np.linspace(0, count - 1, min(config["train"]["sample_rows"], count))
            .astype(int)
            .tolist()
        )
        self._batch = pipeline.eval_rows(config["data"], rows, split)
        self._size = stage.train_size
        self._draw = draw_program(stage, mesh, len(rows))

    def draw(self, ema: Params) -> UInt8[np.ndarray, "h w 3"]:
        """A row of true images, of low-res inputs (super-resolution) and of samples."""
        fields = {
            name: self._batch[name]
            for name in ("text", "text_mask", "lowres")
            if name in self._batch
        }
        samples = np.asarray(jax.device_get(self._draw(ema, fields)))
        columns = (
            [self._batch["image"]]
            + ([self._batch["lowres"]] if "lowres" in self._batch else [])
            + [samples]
        )
        return pictures.grid([list(column) for column in columns], max(64, self._size))
