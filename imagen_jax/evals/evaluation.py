"""Errors and samples of one set of parameters on fixed rows with fixed noise, each computed once.

Measures read an `Evaluation`. All compared values come from the same rows, noise levels and noise,
so differences are paired.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from imagen_jax.data.records import SPLITS
from imagen_jax.evals import nearest
from imagen_jax.evals.noise_bins import Bins, TrainingBins
from imagen_jax.evals.rows import TEXTS, Data, Rows, Settings, conditioned, once
from imagen_jax.run_log import Progress
from imagen_jax.sharding import AXES, make_mesh, place_batch
from imagen_jax.stage import (
    Batch,
    Params,
    Stage,
    check_finite,
    images_and_finite,
    random_key,
)

# (stage, params, batch, draws, logsnr) -> the error of each image [b]. `draws` are those of
# `Stage.draw` with text kept; a noise level at `logsnr` [b].
ErrorFn = Callable[[Stage, Params, Batch, Mapping[str, Array], Array], Array]


def training_loss(
    stage: Stage, params: Params, batch: Batch, draws: Mapping[str, Array], logsnr: Array
) -> Float[Array, "b"]:
    """The training loss of the stage. Its noise level is in `draws`: use `TrainingBins` only."""
    return stage.per_sample_loss(params, batch, draws)


def x_hat_error(
    stage: Stage, params: Params, batch: Batch, draws: Mapping[str, Array], logsnr: Array
) -> Float[Array, "b"]:
    """The squared error of x-hat, for any prediction of the network (see `Stage.x_error`)."""
    return stage.x_error(params, batch, draws, logsnr)


class Probe:
    """Errors and samples of a stage for any parameters and rows; rows are split over all devices.

    Its functions are compiled once for all checkpoints of a config.
    """

    def __init__(self, stage: Stage, settings: Settings):
        self.stage, self.settings = stage, settings
        axes = dict.fromkeys(AXES, 1) | {"data": -1}
        self._mesh = make_mesh(axes, jax.local_devices())
        self._fields = tuple(stage.batch_shapes(0))
        self._errors: dict[Hashable, Callable] = {}
        self._draw = jax.jit(self._draw_samples)

    def place(self, params: Params) -> Params:
        """Host parameters in fp32 on every device."""
        everywhere = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        params = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
        return jax.device_put(params, everywhere)

    def errors(
        self, error: ErrorFn, params: Params, rows: Rows, bins: Bins, clean: bool, label: str
    ) -> Float[np.ndarray, "n k"]:
        """`error` of each row in each bin. `clean`: the low-res image is not noised."""
        make = lambda: jax.jit(functools.partial(self._at_noise, error, bins))
        compute = once(self._errors, (error, bins), make)
        n, k, size = len(rows), len(bins), self._batch_size(rows)
        out, split = np.zeros((n, k)), SPLITS.index(rows.split)
        with Progress(label, -(-n // size) * k) as progress:
            for part_number, (start, stop, part) in enumerate(self._parts(rows, size)):
                for i in range(k):
                    values = np.asarray(compute(params, part, split, i, clean))
                    out[start:stop, i] = values[: stop - start]
                    progress.update(part_number * k + i + 1)
        return out

    def samples(self, params: Params, rows: Rows, label: str) -> UInt8[np.ndarray, "n s s 3"]:
        """One image for each row. Its noise depends on the row, not on its caption."""
        size, out = self._batch_size(rows), []
        with Progress(label, len(rows)) as progress:
            for start, stop, part in self._parts(rows, size):
                drawn, finite = jax.device_get(self._draw(params, part, SPLITS.index(rows.split)))
                check_finite(finite, self.stage.name)
                out.append(drawn[: stop - start])
                progress.update(stop)
        return np.concatenate(out)

    def _batch_size(self, rows: Rows) -> int:
        """`batch_size` images of the training size, or whole images with the same number of pixels.

        A multiple of the number of devices.
        """
        pixels = self.settings.batch_size * self.stage.train_size**2
        size = min(max(1, pixels // rows.batch["image"].shape[1] ** 2), len(rows))
        return size + -size % self._mesh.size

    def _parts(self, rows: Rows, size: int) -> Iterator[tuple[int, int, Mapping[str, Array]]]:
        """(start, stop, rows start to stop on the devices).

        The last part is filled up to `size` by repeating the last row.
        """
        n = len(rows)
        fields = {name: rows.batch[name] for name in self._fields}
        fields["index"] = rows.batch["index"].astype(np.int32)
        for start in range(0, n, size):
            take = np.minimum(np.arange(start, start + size), n - 1)
            part = {name: a[take] for name, a in fields.items()}
            yield start, min(start + size, n), place_batch(part, self._mesh)

    def _row_keys(self, purpose: int, split: Array, index: Int[Array, "b"]) -> Key[Array, "b"]:
        """One key for each row, a function of the seed, the split and the row's number."""
        key = jax.random.fold_in(random_key(self.settings.seed), purpose)
        key = jax.random.fold_in(key, split)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, index)

    def _at_noise(
        self,
        error: ErrorFn,
        bins: Bins,
        params: Params,
        part: Batch,
        split: Array,
        i: Array,
        clean: Array,
    ) -> Float[Array, "b"]:
        """`error` of each row with a noise level in bin i and with its text.

        All other random numbers are distributed as in training, and come from the row's own key.
        """
        keys = self._row_keys(0, split, part["index"])
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        size = part["image"].shape[1]
        draw = lambda key: jax.tree.map(lambda a: a[0], self.stage.draw(key, 1, size))
        draws, logsnr = bins.noise_level(jax.vmap(draw)(keys), i)
        draws["drop"] = jnp.zeros(keys.shape, bool)
        if "lowres_level" in draws:
            draws["lowres_level"] = jnp.where(clean, 0.0, draws["lowres_level"])
        return error(self.stage, params, part, draws, logsnr)

    def _draw_samples(
        self, params: Params, part: Batch, split: Array
    ) -> tuple[UInt8[Array, "b s s 3"], Bool[Array, "b"]]:
        keys = self._row_keys(1, split, part["index"])
        return images_and_finite(self.stage.sample(params, keys, part, self.settings.sampling))


class Evaluation:
    """One set of parameters on the rows of `data`.

    bins: of the training noise; their number is in the settings.
    """

    def __init__(self, probe: Probe, data: Data, params: Params):
        self.probe, self.data, self.stage = probe, data, probe.stage
        self.bins = TrainingBins(probe.stage.density, probe.settings.bins)
        self._params = probe.place(params)
        self._computed: dict[Hashable, Any] = {}

    def texts(self, split: str) -> tuple[str, ...]:
        """The captions that samples of a split are drawn from: right, shuffled or null."""
        return self.data.texts(split) if self.stage.text_dim else TEXTS[:1]

    def errors(
        self,
        error: ErrorFn,
        split: str,
        *,
        bins: Bins | None = None,
        whole: bool = False,
        text: str = "right",
        lowres: str = "right",
        level: str = "drawn",
    ) -> Float[np.ndarray, "n k"]:
        """`error` of each row of a split in each bin.

        bins: by default `self.bins`. whole: whole images, instead of crops as the stage trains on.
        text, lowres: right, shuffled or null. level: noise of the low-res image, drawn as in
        training, or clean.
        """
        bins = self.bins if bins is None else bins

        def compute():
            rows = self.data.uncropped(split) if whole else self.data.crops(split)
            shown = dataclasses.replace(rows, batch=conditioned(rows, text, lowres))
            label = f"{error.__name__.replace('_', ' ')}, {split}"
            label += f", {text} text" * (text != "right")
            label += f", {lowres} low-res" * (lowres != "right")
            label += ", clean low-res" * (level == "clean")
            return self.probe.errors(error, self._params, shown, bins, level == "clean", label)

        return once(self._computed, (error, bins, split, whole, text, lowres, level), compute)

    def sampled(self, split: str, text: str) -> Rows:
        """The rows of `samples`, with the text and low-res images that they are drawn from."""
        rows = self.data.wholes(split)
        batch = conditioned(rows, text, "right")
        if self.probe.settings.lowres_from:
            batch = {**batch, "lowres": self.data.generated[f"{split}_{text}"]}
        return dataclasses.replace(rows, batch=batch)

    def samples(self, split: str, text: str = "right") -> UInt8[np.ndarray, "n s s 3"]:
        """Samples from this text and the true low-res images, or those of `lowres_from`."""
        label = f"samples, {split}, {text} text"
        draw = lambda: self.probe.samples(self._params, self.sampled(split, text), label)
        return once(self._computed, ("samples", split, text), draw)

    def distances(self) -> Mapping[tuple[str, str], Float[np.ndarray, "n m"]]:
        """{(split, text): distances of its samples to all images}, in one pass over the gallery."""

        def compute():
            splits = self.data.counts
            pairs = [(split, text) for split in splits for text in self.texts(split)]
            drawn = {pair: self.samples(*pair) for pair in pairs}
            stacked = np.concatenate(list(drawn.values()))
            columns = [nearest.distances(stacked, chunk) for chunk in self.data.gallery()]
            ends = np.cumsum([len(samples) for samples in drawn.values()])[:-1]
            return dict(zip(drawn, np.split(np.concatenate(columns, axis=1), ends)))

        return once(self._computed, "distances", compute)
