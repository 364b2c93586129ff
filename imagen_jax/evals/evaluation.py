"""Denoising errors and samples of one checkpoint, on fixed rows and with fixed noise.

Measures read an `Evaluation`, which computes each result once. Compared values share rows, noise
levels and noise, so differences are paired.
"""

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from imagen_jax.data.records import SPLITS
from imagen_jax.diffusion.loss import Draws
from imagen_jax.distributed import host_work
from imagen_jax.evals import nearest
from imagen_jax.evals.noise_bins import Bins, TrainingBins
from imagen_jax.evals.rows import TEXTS, ConditionedRows, Data, RowSource, Settings, once
from imagen_jax.run_log import Progress
from imagen_jax.sharding import (
    BATCH_AXES,
    batch_mesh,
    compiler_options,
    place_batch,
    process_rows,
    replicated,
)
from imagen_jax.stage import (
    Batch,
    Params,
    Stage,
    check_finite,
    images_and_finite,
    random_key,
)
from imagen_jax.text_inputs import DROP

# Purposes of random numbers: each has its own keys.
ERROR_NOISE, SAMPLE_NOISE = 0, 1
# (stage, params, batch, draws, logsnr) -> the error of each image [b].
# draws: the result of `Stage.draw`, without text dropout. logsnr [b]: the noise level.
ErrorFn = Callable[[Stage, Params, Batch, Draws, Float[Array, "b"]], Float[Array, "b"]]


def training_loss(
    stage: Stage, params: Params, batch: Batch, draws: Draws, logsnr: Float[Array, "b"]
) -> Float[Array, "b"]:
    """The training loss of the stage.

    It takes the noise level from `draws` and ignores `logsnr`, so use it with `TrainingBins` only.
    """
    return stage.per_sample_loss(params, batch, draws)


def x_hat_error(
    stage: Stage, params: Params, batch: Batch, draws: Draws, logsnr: Float[Array, "b"]
) -> Float[Array, "b"]:
    """The squared error of x-hat, comparable between predictions (see `Stage.x_error`)."""
    return stage.x_error(params, batch, draws, logsnr)


class Probe:
    """Computes errors and samples of a stage for given parameters and rows.

    Rows are split over the batch axes of a mesh, by default over all devices of this process. One
    compilation serves all checkpoints of a config.
    """

    def __init__(self, stage: Stage, settings: Settings, mesh: Mesh | None = None):
        """mesh: that of the stage and the parameters, of one process or several."""
        self.stage, self.settings = stage, settings
        self._mesh = batch_mesh(jax.local_devices()) if mesh is None else mesh
        self._fields = tuple(stage.batch_shapes(0))
        self._errors: dict[Hashable, Callable] = {}
        self._draw = jax.jit(
            self._draw_samples,
            out_shardings=replicated(self._mesh),
            compiler_options=compiler_options(self._mesh),
        )

    def errors(
        self, error: ErrorFn, params: Params, rows: RowSource, bins: Bins, clean: bool, label: str
    ) -> Float[np.ndarray, "n k"]:
        """`quiet_errors` with its own progress."""
        with progress_of_all(label, self.calls(rows, bins)) as progress:
            done = itertools.count(1)
            tick = lambda: progress.update(next(done))
            return self.quiet_errors(error, params, rows, bins, clean, tick)

    def calls(self, rows: RowSource, bins: Bins) -> int:
        """How often `quiet_errors` calls its compiled function, and `tick`."""
        return -(-len(rows) // self._batch_size(rows)) * len(bins)

    def quiet_errors(
        self,
        error: ErrorFn,
        params: Params,
        rows: RowSource,
        bins: Bins,
        clean: bool,
        tick: Callable[[], None],
    ) -> Float[np.ndarray, "n k"]:
        """`error` of n rows in k noise bins.

        All processes of the mesh call it with the same arguments and get the same result. Each
        reads only its own part of every batch from `rows`.

        params: on the mesh, sharded in any way. clean: keep the low-res image free of noise.
        """
        error_in_bin = once(self._errors, (error, bins), lambda: self._jitted(error, bins))
        n, k, size = len(rows), len(bins), self._batch_size(rows)
        errors, split = np.zeros((n, k)), SPLITS.index(rows.split)
        for start, stop, batch in self._batches(rows, size):
            for i in range(k):
                values = np.asarray(error_in_bin(params, batch, split, i, clean))
                errors[start:stop, i] = values[: stop - start]
                tick()
        return errors

    def _jitted(self, error: ErrorFn, bins: Bins) -> Callable[..., Float[Array, "b"]]:
        """`_error_in_bin`, compiled; every device gets the errors of all rows."""
        return jax.jit(
            functools.partial(self._error_in_bin, error, bins),
            out_shardings=replicated(self._mesh),
            compiler_options=compiler_options(self._mesh),
        )

    def samples(self, params: Params, rows: RowSource, label: str) -> UInt8[np.ndarray, "n s s 3"]:
        """One sample per row, in every process. The noise depends on the row, not on the caption.

        For the arguments see `quiet_errors`.
        """
        size, batches = self._batch_size(rows), []
        with progress_of_all(label, len(rows)) as progress:
            for start, stop, batch in self._batches(rows, size):
                images, finite = jax.device_get(self._draw(params, batch, SPLITS.index(rows.split)))
                check_finite(finite, self.stage.name)
                batches.append(images[: stop - start])
                progress.update(stop)
        return np.concatenate(batches)

    def _batch_size(self, rows: RowSource) -> int:
        """Rows per batch: `settings.batch_size` at the training size.

        Larger images have fewer rows per batch, with the same number of pixels. The result is
        rounded up to a multiple of the number of shards.
        """
        pixels = self.settings.batch_size * self.stage.train_size**2
        size = min(max(1, pixels // rows.side**2), len(rows))
        return size + -size % math.prod(self._mesh.shape[axis] for axis in BATCH_AXES)

    def _batches(self, rows: RowSource, size: int) -> Iterator[tuple[int, int, Batch]]:
        """Yields (start, stop, the batch of rows [start, stop) on the devices).

        The last batch is padded to `size` with the last row. This process reads only its rows.
        """
        n, own = len(rows), np.array(process_rows(size, self._mesh))
        for start in range(0, n, size):
            read = rows.at(np.minimum(start + own, n - 1))
            batch = {name: read[name] for name in self._fields}
            batch["index"] = read["index"].astype(np.int32)
            yield start, min(start + size, n), place_batch(batch, self._mesh)

    def _row_keys(
        self, purpose: int, split: Int[Array, ""], index: Int[Array, "b"]
    ) -> Key[Array, "b"]:
        """One key per row, from the seed, the purpose, the split and the row's number."""
        key = jax.random.fold_in(random_key(self.settings.seed), purpose)
        key = jax.random.fold_in(key, split)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, index)

    def _error_in_bin(
        self,
        error: ErrorFn,
        bins: Bins,
        params: Params,
        batch: Batch,
        split: Int[Array, ""],
        bin_index: Int[Array, ""],
        clean: Bool[Array, ""],
    ) -> Float[Array, "b"]:
        """`error` of each row at a noise level of the bin; text is never dropped.

        All other random numbers follow their training distribution and come from the key of the
        row.
        """
        keys = self._row_keys(ERROR_NOISE, split, batch["index"])
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, bin_index)
        size = batch["image"].shape[1:3]
        draw = lambda key: jax.tree.map(lambda a: a[0], self.stage.draw(key, 1, size))
        draws, logsnr = bins.noise_level(jax.vmap(draw)(keys), bin_index)
        for name in (name for name in draws if name.partition(".")[0] == DROP):
            draws[name] = jnp.zeros(keys.shape, bool)
        if "lowres_level" in draws:
            draws["lowres_level"] = jnp.where(clean, 0.0, draws["lowres_level"])
        return error(self.stage, params, batch, draws, logsnr)

    def _draw_samples(
        self, params: Params, batch: Batch, split: Int[Array, ""]
    ) -> tuple[UInt8[Array, "b s s 3"], Bool[Array, "b"]]:
        keys = self._row_keys(SAMPLE_NOISE, split, batch["index"])
        return images_and_finite(self.stage.sample(params, keys, batch, self.settings.sampling))


class Evaluation:
    """Results of one checkpoint on `data`, each computed when it is first read.

    All processes of a run ask for the same results in the same order, and get the same values.

    bins: `settings.bins` noise-level bins that training draws equally often.
    """

    def __init__(self, probe: Probe, data: Data, params: Params):
        """params: on the mesh of the probe."""
        self.probe, self.data, self.stage = probe, data, probe.stage
        self.bins = TrainingBins(probe.stage.density, probe.settings.bins)
        self._params = params
        self._computed: dict[Hashable, Any] = {}

    def texts(self, split: str) -> tuple[str, ...]:
        """The kinds of captions used for samples of a split: right, shuffled, null."""
        return self.data.texts(split) if self.stage.reads_text else TEXTS[:1]

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
        """`error` of n rows of a split in k noise bins.

        bins: by default `self.bins`.
        whole: use whole images instead of training crops.
        text, lowres: "right", "shuffled" (of another row) or "null".
        level: "drawn" adds noise to the low-res image as in training, "clean" adds none.
        """
        bins = self.bins if bins is None else bins

        def compute():
            rows = self.data.uncropped(split) if whole else self.data.crops(split)
            label = f"{error.__name__.replace('_', ' ')}, {split}"
            label += f", {text} text" * (text != "right")
            label += f", {lowres} low-res" * (lowres != "right")
            label += ", clean low-res" * (level == "clean")
            return self.probe.errors(
                error,
                self._params,
                ConditionedRows(rows, text, lowres),
                bins,
                level == "clean",
                label,
            )

        return once(self._computed, (error, bins, split, whole, text, lowres, level), compute)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make`, kept for this checkpoint under `key`."""
        return once(self._computed, key, make)

    def sampled(self, split: str, text: str) -> ConditionedRows:
        """The inputs of `samples`: rows with their captions and low-res images."""
        drawn_from = self.probe.settings.lowres_from
        given = self.data.generated[f"{split}_{text}"] if drawn_from else None
        return ConditionedRows(self.data.wholes(split), text, lowres_images=given)

    def samples(self, split: str, text: str = "right") -> UInt8[np.ndarray, "n s s 3"]:
        """Samples for one kind of caption.

        Low-res images are the true ones, or the samples in `lowres_from`.
        """
        label = f"samples, {split}, {text} text"
        draw = lambda: self.probe.samples(self._params, self.sampled(split, text), label)
        return once(self._computed, ("samples", split, text), draw)

    def distances(self) -> Mapping[tuple[str, str], Float[np.ndarray, "n m"]]:
        """{(split, text): distances of its n samples to the m gallery images}.

        The gallery is read once, each process reads its part.
        """

        def compute():
            splits = self.data.counts
            pairs = [(split, text) for split in splits for text in self.texts(split)]
            drawn = {pair: self.samples(*pair) for pair in pairs}
            stacked = np.concatenate(list(drawn.values()))
            matrix = host_work.for_rows(
                self.data.gallery_size, functools.partial(self._from_gallery, stacked)
            )
            split_points = np.cumsum([len(samples) for samples in drawn.values()])[:-1]
            return dict(zip(drawn, np.split(matrix.T, split_points)))

        return once(self._computed, "distances", compute)

    def _from_gallery(
        self, samples: UInt8[np.ndarray, "n s s 3"], positions: Int[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m n"]:
        """The distance of each of these gallery images to each sample."""
        parts, done = [], 0
        with progress_of_all("images to compare with", len(positions)) as progress:
            for images in self.data.gallery(positions):
                parts.append(nearest.distances(images, samples))
                done += len(images)
                progress.update(done)
        return np.concatenate(parts)


def progress_of_all(label: str, total: int) -> Progress:
    """Progress that process 0 shows for all processes."""
    return Progress(label, total, quiet=jax.process_index() > 0)
