"""The rows of an evaluation: images, captions and low-res images, right, shuffled or null.

Rows depend on the data and the seed alone, so all checkpoints and arms are measured on the same
rows.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped, UInt8

from imagen_jax import schema
from imagen_jax.checksums import sha256_file
from imagen_jax.data import pipeline
from imagen_jax.data.example_text import EvaluationText
from imagen_jax.data.records import SPLITS
from imagen_jax.diffusion import conditioning
from imagen_jax.evals import statistics
from imagen_jax.text_inputs import is_text

CONTROLS = ("shuffled", "null")  # another row's caption or low-res image; none at all
TEXTS = ("right", *CONTROLS)
LOWRES_NOISE = ("drawn", "clean")  # noise of the low-res image: as in training, or none
GREY = 128  # the null low-res image: grey, the middle of 0..255
KEPT_GALLERY_BYTES = 2**30  # a gallery of at most this size stays in memory between checkpoints
CHUNK = 256  # images read at once
HostBatch = Mapping[str, Shaped[np.ndarray, "n ..."]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of an evaluation. Raises ValueError for a number less than 1 and a wrong seed.

    rows: number of images per split for the errors.
    samples: number of samples per split.
    gallery: largest number of images to compare samples with.
    bins: number of noise-level bins, which training draws equally often.
    batch_size: images per batch at the training size of the stage.
    seed: seed of the choice of rows, of the noise and of the shuffling, in [0, 2^32).
    sampling: the argument `sampling` of `Stage.sample`.
    lowres_from: samples.npz of the previous stage, used as low-res input instead of the true
        images.
    """

    rows: int
    samples: int
    gallery: int
    bins: int
    batch_size: int
    seed: int
    sampling: Mapping[str, Any]
    lowres_from: str = ""

    def __post_init__(self):
        for name in ("rows", "samples", "gallery", "bins", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is less than 1")
        schema.check_seed(self.seed, "--seed")


@runtime_checkable
class RowSource(Protocol):
    """Rows of a split, in which `Probe` computes errors; `ReadRows` and `ConditionedRows`.

    split: name of the split. side: side of the images in pixels.
    """

    split: str

    @property
    def side(self) -> int: ...

    def __len__(self) -> int:
        """The number of rows, n."""

    def at(self, positions: Int[np.ndarray, " k"]) -> HostBatch:
        """The rows at these positions, each in [0, n)."""


class ReadRows:
    """Rows of a split that are read when they are first needed, and kept.

    In a multi-process run, each process reads only the rows that it asks for. `caption_id` of all
    rows is read at once, so that all processes agree which row provides a shuffled condition.
    """

    def __init__(
        self,
        data_cfg: Mapping[str, Any],
        split: str,
        index: Int[np.ndarray, " n"],
        seed: int,
        text: EvaluationText | None = None,
    ):
        """index: the rows in the image store. seed: of the shuffled conditions.

        text: how the text is read; None: the features of the only encoder.
        """
        self.split, self._data_cfg, self.index = split, data_cfg, index
        self._kept: dict[int, dict[str, Any]] = {}
        self.caption_id = pipeline.eval_caption_ids(data_cfg, index.tolist(), split)
        prepared, captions = pipeline.open_prepared(data_cfg), self.caption_id.tolist()
        self._text = text(prepared, captions) if text else None
        self._seed = seed

    def __len__(self) -> int:
        return len(self.index)

    @property
    def side(self) -> int:
        return self._data_cfg["crop_size"] or self._data_cfg["image_size"]

    def at(self, positions: Int[np.ndarray, " k"]) -> HostBatch:
        missing = sorted(set(positions.tolist()) - self._kept.keys())
        if missing:
            index = self.index[missing].tolist()
            batch = pipeline.eval_rows(self._data_cfg, index, self.split, self._text)
            for i, position in enumerate(missing):
                # Copies: a view would keep the whole batch.
                self._kept[position] = {name: np.copy(value[i]) for name, value in batch.items()}
        rows = [self._kept[position] for position in positions.tolist()]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    @functools.cached_property
    def other(self) -> Int[np.ndarray, " n"]:
        """For each row, the index of the row that provides its shuffled caption and low-res image.

        Raises ValueError if one caption has more than half of the rows.
        """
        return statistics.derangement(self.caption_id, self._seed)

    @property
    def unshufflable(self) -> str:
        """The reason why these rows have no shuffled control; "" if they have one."""
        return statistics.no_derangement(self.caption_id)

    @property
    def controls(self) -> tuple[str, ...]:
        """The entries of CONTROLS that these rows allow."""
        return CONTROLS[1:] if self.unshufflable else CONTROLS


@dataclasses.dataclass(frozen=True)
class ConditionedRows:
    """`rows` with right, shuffled or null text and low-res images (see `with_conditions`).

    lowres_images: replace the low-res images of all rows, if given.
    """

    rows: ReadRows
    text: str = "right"
    lowres: str = "right"
    lowres_images: UInt8[np.ndarray, "n r r 3"] | None = None

    @property
    def split(self) -> str:
        return self.rows.split

    @property
    def side(self) -> int:
        return self.rows.side

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, positions: Int[np.ndarray, " k"]) -> HostBatch:
        other = lambda: self.rows.at(self.rows.other[positions])
        batch = with_conditions(self.rows.at(positions), other, self.text, self.lowres)
        if self.lowres_images is None:
            return batch
        return {**batch, "lowres": self.lowres_images[positions]}


class Data:
    """The rows of an evaluation, read once for all checkpoints.

    counts: {split: number of images}, without empty splits.
    heldout: the split of held-out rows; "train" if the data have none.
    """

    def __init__(
        self,
        data_cfg: Mapping[str, Any],
        settings: Settings,
        text: EvaluationText | None = None,
    ):
        """data_cfg: section `data` of the config. text: as for `ReadRows`."""
        self._text = text
        self.prepared = pipeline.open_directory(data_cfg, data_cfg["path"])
        counts = self.prepared.manifest["counts"]["images"]
        self.counts = {split: counts[split] for split in SPLITS if counts.get(split, 0)}
        self.heldout = self.prepared.evaluation_split
        self._crops, self._wholes = dict(data_cfg), dict(data_cfg) | {"crop_size": 0}
        self._settings = settings
        self._kept: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make`, kept for all checkpoints under `key`."""
        return once(self._kept, key, make)

    def crops(self, split: str) -> ReadRows:
        """Rows as in training: crops if the stage trains on crops, otherwise whole images."""
        make = lambda: self._rows(self._crops, split, self.choose(split, self._settings.rows))
        return once(self._kept, ("crops", split), make)

    def uncropped(self, split: str) -> ReadRows:
        """The rows of `crops` as whole images."""
        if not self._crops["crop_size"]:
            return self.crops(split)
        make = lambda: self._rows(self._wholes, split, self.choose(split, self._settings.rows))
        return once(self._kept, ("uncropped", split), make)

    def wholes(self, split: str) -> ReadRows:
        """Rows of whole images, for samples: those of `lowres_from`, if given."""
        if self._settings.lowres_from:
            index = self.generated[f"{split}_index"]
        else:
            index = self.choose(split, self._settings.samples)
        return once(self._kept, ("wholes", split), lambda: self._rows(self._wholes, split, index))

    def caption_ids(self) -> list[int]:
        """The captions of all rows with text."""
        parts = [rows.caption_id for split in self.counts for rows in self._with_text(split)]
        return np.unique(np.concatenate(parts)).tolist()

    def _with_text(self, split: str) -> tuple[ReadRows, ...]:
        return self.crops(split), self.wholes(split)

    def texts(self, split: str) -> tuple[str, ...]:
        """The entries of TEXTS that a split can be sampled with."""
        names = ("right", *self.wholes(split).controls)
        if not self._settings.lowres_from:
            return names
        return tuple(name for name in names if f"{split}_{name}" in self.generated)

    def no_shuffled_text(self, split: str) -> str:
        """The reason why a split has no samples from shuffled text; "" if it has them."""
        if "shuffled" in self.texts(split):
            return ""
        return self.wholes(split).unshufflable or f"{self._settings.lowres_from} has none"

    @functools.cached_property
    def generated(self) -> Mapping[str, Shaped[np.ndarray, "..."]]:
        """The content of `lowres_from`.

        Raises ValueError if it is not a samples.npz, or was sampled from other data, with another
        seed, or at another size.
        """
        path, size = Path(self._settings.lowres_from), self._wholes["lowres_size"]
        try:
            with np.load(path) as file:
                content = {name: file[name] for name in file.files}
        except (ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a samples.npz of evaluate: {error}") from error
        needed = ("index", *(text for text in TEXTS if text != "shuffled"))
        parts = {f"{split}_{part}" for split in self.counts for part in needed}
        missing = sorted({"manifest_hash", "seed", *parts} - content.keys())
        if missing:
            raise ValueError(
                f"{path} is not a samples.npz of a stage with text: it lacks {', '.join(missing)}"
            )
        seed, drawn_from = int(content["seed"]), str(content["manifest_hash"])
        if drawn_from != self.prepared.hash or seed != self._settings.seed:
            raise ValueError(
                f"{path} does not hold samples that evaluate made with this data"
                f" and --seed {self._settings.seed}"
            )
        sampled = content[f"{self.heldout}_right"].shape[1]
        if sampled != size:
            raise ValueError(
                f"{path} holds images of {sampled} pixels; this stage's low-res images have {size}"
            )
        return content

    @property
    def origin(self) -> dict[str, str] | None:
        """The provenance of `lowres_from`: its hash, the weights and the sampling settings."""
        if not self._settings.lowres_from:
            return None
        names = ("checkpoint_sha256", "sampling")
        recorded = {name: str(self.generated[name]) for name in names if name in self.generated}
        return {"sha256": sha256_file(Path(self._settings.lowres_from))} | recorded

    @functools.cached_property
    def gallery_rows(self) -> dict[str, Int[np.ndarray, " k"]]:
        """The rows of each split that samples are compared with.

        These are all rows, or the sampled rows and a random choice of others.
        """
        total = sum(self.counts.values())
        if total <= self._settings.gallery:
            return {split: np.arange(count) for split, count in self.counts.items()}
        rows = {}
        for split, count in self.counts.items():
            others = self.choose(split, self._settings.gallery * count // total)
            rows[split] = np.union1d(self.wholes(split).index, others)
        return rows

    @property
    def gallery_size(self) -> int:
        """The number of images in `gallery_rows`."""
        return sum(map(len, self.gallery_rows.values()))

    def gallery(self, positions: Int[np.ndarray, " n"]) -> Iterator[UInt8[np.ndarray, "k s s 3"]]:
        """The images at these positions of the gallery, at the stage's size, in chunks.

        They are kept for the next checkpoint if they are small together.
        """
        keep = len(positions) * self._wholes["image_size"] ** 2 * 3 <= KEPT_GALLERY_BYTES
        for start in range(0, len(positions), CHUNK):
            part = positions[start : start + CHUNK]
            read = lambda: self.gallery_images(part)
            yield once(self._kept, ("gallery", part.tobytes()), read) if keep else read()

    def gallery_row(self, split: str, index: Any) -> Any:
        """The position in the gallery of row(s) `index` of a split."""
        first = next(iter(self.counts))
        before = 0 if split == first else len(self.gallery_rows[first])
        return np.searchsorted(self.gallery_rows[split], index) + before

    def gallery_images(self, positions: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n s s 3"]:
        """The images at these positions of the gallery, each in [0, gallery_size)."""
        size, first = self._wholes["image_size"], 0
        images = np.empty((len(positions), size, size, 3), np.uint8)
        for split, rows in self.gallery_rows.items():
            here = (positions >= first) & (positions < first + len(rows))
            if here.any():
                images[here] = self.images(split, rows[positions[here] - first])
            first += len(rows)
        return images

    def images(self, split: str, index: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n s s 3"]:
        """Whole images of a split at the stage's size."""
        return pipeline.eval_images(self._wholes, index.tolist(), split)

    def choose(self, split: str, count: int) -> Int[np.ndarray, " n"]:
        """Random rows of a split, see `choose`."""
        return choose(self.counts[split], split, count, self._settings.seed)

    def caption(self, caption_id: int) -> str:
        """A caption's text."""
        return self.prepared.captions()[caption_id].text

    def _rows(
        self, data_cfg: Mapping[str, Any], split: str, index: Int[np.ndarray, " n"]
    ) -> ReadRows:
        return ReadRows(data_cfg, split, index, self._settings.seed, self._text)


def with_conditions(
    batch: HostBatch, other: Callable[[], HostBatch], text: str, lowres: str
) -> HostBatch:
    """A batch with right, shuffled or null text and low-res images.

    other: returns the rows that provide the shuffled ones; called only if they are needed.
    """
    changed: dict[str, Any] = {}
    if text == "shuffled":
        changed |= {name: value for name, value in other().items() if is_text(name)}
    if text == "null":
        cond = {name: jnp.asarray(value) for name, value in batch.items() if is_text(name)}
        null = conditioning.null_text(cond)
        changed |= {name: np.asarray(value) for name, value in null.items()}
    if lowres == "shuffled":
        changed["lowres"] = other()["lowres"]
    if lowres == "null":
        changed["lowres"] = np.full_like(batch["lowres"], GREY)
    return {**batch, **changed}


def choose(total: int, split: str, count: int, seed: int) -> Int[np.ndarray, " n"]:
    """Random rows of a split of `total` rows, ascending; all rows if `count` is not smaller.

    The rows of a smaller count are a subset of a larger one's.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    return np.sort(rng.permutation(total)[:count])


def once(kept: dict[Hashable, Any], key: Hashable, make: Callable[[], Any]) -> Any:
    """kept[key], or the result of `make`, which is then kept."""
    if key not in kept:
        kept[key] = make()
    return kept[key]
