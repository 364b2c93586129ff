"""Sample grids during training: samples of the EMA for a fixed set of rows."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from imagen_jax import cascade, pictures, sharding
from imagen_jax.data import pipeline
from imagen_jax.stage import Params, Stage, to_uint8
from imagen_jax.text_inputs import is_text


def sample_program(stage: Stage, mesh: Mesh, rows: int) -> Any:
    """Jitted (EMA with the run's shardings, {text, text_mask, lowres}) -> uint8 [rows s s 3].

    s is the training size in pixels; the images are replicated on all devices. plan compiles it
    too.
    """

    def sample_rows(ema, batch):
        keys = cascade.sample_keys(range(rows), 0)
        return to_uint8(stage.sample(ema, keys, batch, stage.sampling, stage.train_size))

    return jax.jit(
        sample_rows,
        out_shardings=sharding.replicated(mesh),
        compiler_options=sharding.compiler_options(mesh),
    )


class SampleGrid:
    """Rows evenly spaced over the held-out images, or over the training images if there are none.

    They are read once and sampled by one program.
    """

    def __init__(self, config: Mapping[str, Any], stage: Stage, mesh: Mesh):
        """config: the config of the run; train.sample_rows is the number of rows."""
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
        self._sample = sample_program(stage, mesh, len(rows))

    def sample(self, ema: Params) -> UInt8[np.ndarray, "h w 3"]:
        """Columns of true images, low-res inputs (super-resolution) and samples."""
        fields = {
            name: value for name, value in self._batch.items() if is_text(name) or name == "lowres"
        }
        samples = np.asarray(jax.device_get(self._sample(ema, fields)))
        columns = (
            [self._batch["image"]]
            + ([self._batch["lowres"]] if "lowres" in self._batch else [])
            + [samples]
        )
        return pictures.grid([list(column) for column in columns], max(64, self._size))
