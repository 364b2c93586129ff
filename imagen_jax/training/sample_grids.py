"""Sample grids during training: samples of the EMA for a fixed set of rows."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from imagen_jax import cascade, pictures, sharding
from imagen_jax.data import pipeline, sets
from imagen_jax.data.example_text import EvaluationText
from imagen_jax.stage import Params, Stage, to_uint8
from imagen_jax.stage_sizes import square
from imagen_jax.text_inputs import is_text


def sample_program(stage: Stage, mesh: Mesh, rows: int) -> Any:
    """Jitted (EMA with the run's shardings, {text, text_mask, lowres}) -> uint8 [rows s s 3].

    s is `Stage.train_size`; the images are squares in a stage with buckets, too, and replicated on
    all devices. plan compiles it too.
    """
    size = square(stage.train_size)

    def sample_rows(ema, batch):
        keys = cascade.sample_keys(range(rows), 0)
        return to_uint8(stage.sample(ema, keys, batch, stage.sampling, size))

    return jax.jit(
        sample_rows,
        out_shardings=sharding.replicated(mesh),
        compiler_options=sharding.compiler_options(mesh),
    )


class SampleGrid:
    """Rows evenly spaced over the held-out images, or over the training images if there are none.

    They are read once, as centre squares, and sampled by one program. With data.mixture, each set
    has about the same number of rows.
    """

    def __init__(self, config: Mapping[str, Any], stage: Stage, mesh: Mesh, text: EvaluationText):
        """config: the config of the run; train.sample_rows is the number of rows.

        text: of the rows' text.
        """
        data, wanted = config["data"], config["train"]["sample_rows"]
        found = sets.data_sets(data)
        bounds = np.linspace(0, wanted, len(found) + 1).astype(int)
        parts = [
            evenly_spaced(one.config(data), int(size), text)
            for one, size in zip(found, np.diff(bounds), strict=True)
            if size
        ]
        self._batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self._size = stage.train_size
        self._sample = sample_program(stage, mesh, len(self._batch["image"]))

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


def evenly_spaced(data_cfg: Mapping[str, Any], wanted: int, text: EvaluationText) -> pipeline.Batch:
    """Up to `wanted` rows of the only set of `data_cfg`, as `pipeline.eval_rows` reads them."""
    prepared = pipeline.open_prepared(data_cfg)
    split = prepared.evaluation_split
    count = prepared.num_images(split)
    rows = np.linspace(0, count - 1, min(wanted, count)).astype(int).tolist()
    captions = pipeline.eval_caption_ids(data_cfg, rows, split).tolist()
    return pipeline.eval_rows(data_cfg, rows, split, text(prepared, captions))
