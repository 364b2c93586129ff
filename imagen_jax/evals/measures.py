"""What is measured of a stage on prepared data. A measure is a function of an `Evaluation` in MEASURES; it returns what JSON can hold.

An `Evaluation` is one set of parameters on fixed rows with fixed noise. Losses and samples that several measures need are computed
once. Whatever is compared saw the same rows, times and noise, so that differences are paired.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from imagen_jax.data import pipeline, transforms
from imagen_jax.data.records import SPLITS, Prepared
from imagen_jax.diffusion import conditioning, process
from imagen_jax.evals import nearest, noise_bins, statistics, superres
from imagen_jax.storage import sha256_file
from imagen_jax.run_log import Progress
from imagen_jax.sharding import AXES, make_mesh, place_batch
from imagen_jax.stage import Batch, Params, Stage, to_uint8, to_unit

CONTROLS = ("shuffled", "null")  # another row's caption or low-res image; none at all
TEXTS = ("right", *CONTROLS)
GREY = 128  # the null low-res image: grey, mid of 0..255
LEVELS = ("drawn", "clean")  # noise of the low-res image: as in training, or none
KEPT_GALLERY_BYTES = 2**30  # up to this size, the images that samples are compared with stay in memory from checkpoint to checkpoint
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """rows: images a split whose losses are taken. samples: images a split that samples are drawn for. gallery: most images that samples
    are compared with. bins: of t. sampling: the stage's settings as `Stage.sample` takes them. lowres_from: a samples.npz of the stage
    before, instead of true low-res images."""

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


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a split as one batch of host arrays."""

    split: str
    batch: Mapping[str, np.ndarray]
    seed: int

    def __len__(self) -> int:
        return len(self.batch["index"])

    @property
    def other(self) -> Int[np.ndarray, " n"]:
        """For each row the one whose caption and low-res image it gets when shuffled; ValueError if all captions are the same."""
        return statistics.derangement(self.batch["caption_id"], self.seed)


class Data:
    """The rows an evaluation uses, read once for all checkpoints."""

    def __init__(self, data_cfg: Mapping[str, Any], settings: Settings):
        self.prepared = Prepared(data_cfg["path"])
        counts = self.prepared.manifest["counts"]["images"]
        self.counts = {split: counts[split] for split in SPLITS if counts.get(split, 0)}
        self.heldout = self.prepared.evaluation_split
        self._crops, self._wholes = dict(data_cfg), dict(data_cfg) | {"crop_size": 0}
        self._settings = settings
        self._kept: dict[Hashable, Any] = {}

    def crops(self, split: str) -> Rows:
        """Rows as the stage trains on them (a crop, if it does): for losses."""
        return _once(self._kept, ("crops", split), lambda: self._read(self._crops, split, self._choose(split, self._settings.rows)))

    def uncropped(self, split: str) -> Rows:
        """The same rows, whole: for what is compared with another way to make whole images."""
        if not self._crops["crop_size"]:
            return self.crops(split)
        return _once(self._kept, ("uncropped", split), lambda: self._read(self._wholes, split, self._choose(split, self._settings.rows)))

    def wholes(self, split: str) -> Rows:
        """Rows of whole images: for samples. Those of `lowres_from`, if given."""
        if self._settings.lowres_from:
            index = self.generated[f"{split}_index"]
        else:
            index = self._choose(split, self._settings.samples)
        return _once(self._kept, ("wholes", split), lambda: self._read(self._wholes, split, index))

    @functools.cached_property
    def generated(self) -> Mapping[str, np.ndarray]:
        """The content of `lowres_from`. Raises ValueError if it is no such file, or drawn from other data, with another seed, at another size."""
        path, size = Path(self._settings.lowres_from), self._wholes["lowres_size"]
        try:
            with np.load(path) as file:
                content = {name: file[name] for name in file.files}
        except (ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a samples.npz of evaluate: {error}") from error
        wanted = {"manifest_hash", "seed", *(f"{split}_{part}" for split in self.counts for part in ("index", *TEXTS))}
        if wanted - content.keys():
            raise ValueError(f"{path} is not a samples.npz of a stage with text: it lacks {', '.join(sorted(wanted - content.keys()))}")
        if str(content["manifest_hash"]) != self.prepared.hash or int(content["seed"]) != self._settings.seed:
            raise ValueError(f"{path} does not hold samples drawn by evaluate with this data and --seed {self._settings.seed}")
        found = content[f"{self.heldout}_right"].shape[1]
        if found != size:
            raise ValueError(f"{path} holds images of {found} pixels; this stage's low-res images have {size}")
        return content

    @property
    def origin(self) -> dict[str, str] | None:
        """Where the samples of `lowres_from` come from: its own hash, the weights and the settings they were drawn with."""
        if not self._settings.lowres_from:
            return None
        said = {name: str(self.generated[name]) for name in ("checkpoint_sha256", "sampling") if name in self.generated}
        return {"sha256": sha256_file(Path(self._settings.lowres_from))} | said

    @functools.cached_property
    def gallery_rows(self) -> dict[str, Int[np.ndarray, " k"]]:
        """The rows of each split that samples are compared with: all, or those sampled and others chosen by the seed."""
        total = sum(self.counts.values())
        if total <= self._settings.gallery:
            return {split: np.arange(count) for split, count in self.counts.items()}
        wanted = {split: self._settings.gallery * count // total for split, count in self.counts.items()}
        return {split: np.union1d(self.wholes(split).batch["index"], self._choose(split, n)) for split, n in wanted.items()}

    def gallery(self) -> Iterator[UInt8[np.ndarray, "k s s 3"]]:
        """The images of `gallery_rows` at the stage's size, in chunks, in the order of `gallery_row`."""
        total, done, size = sum(map(len, self.gallery_rows.values())), 0, self._wholes["image_size"]
        keep = total * size * size * 3 <= KEPT_GALLERY_BYTES
        with Progress("images to compare with", total) as progress:
            for split, all_rows in self.gallery_rows.items():
                for start in range(0, len(all_rows), _CHUNK):
                    rows = all_rows[start : start + _CHUNK]
                    chunk = lambda: pipeline.eval_images(self._wholes, rows.tolist(), split)
                    yield _once(self._kept, ("gallery", split, start), chunk) if keep else chunk()
                    done += len(rows)
                    progress.update(done)

    def gallery_row(self, split: str, index: Any) -> Any:
        """The place in the gallery of row(s) `index` of a split."""
        first = next(iter(self.counts))
        return np.searchsorted(self.gallery_rows[split], index) + (0 if split == first else len(self.gallery_rows[first]))

    def gallery_images(self, places: Int[np.ndarray, " n"]) -> list[UInt8[np.ndarray, "s s 3"]]:
        """The images at some places of the gallery."""
        rows = [(split, row) for split, all_rows in self.gallery_rows.items() for row in all_rows.tolist()]
        return [pipeline.eval_images(self._wholes, [row], split)[0] for split, row in (rows[place] for place in places)]

    def caption(self, caption_id: int) -> str:
        """A caption's text."""
        return self.prepared.captions()[caption_id].text

    def _choose(self, split: str, count: int) -> np.ndarray:
        """A random subset that depends on the seed alone; a smaller count takes part of a larger one's rows."""
        rng = np.random.default_rng([self._settings.seed, SPLITS.index(split)])
        return np.sort(rng.permutation(self.counts[split])[:count])

    def _read(self, data_cfg: Mapping[str, Any], split: str, index: np.ndarray) -> Rows:
        return Rows(split, pipeline.eval_rows(data_cfg, index.tolist(), split), self._settings.seed)


class Probe:
    """What a stage computes for given parameters and rows; compiled once for all checkpoints of a config, rows spread over all devices."""

    def __init__(self, stage: Stage, settings: Settings):
        self.stage, self.settings = stage, settings
        self._mesh = make_mesh({axis: 1 for axis in AXES} | {"data": -1}, jax.local_devices())
        self._fields = tuple(stage.batch_shapes(0))
        self._errors = {
            "loss": jax.jit(functools.partial(self._at_noise, stage.per_sample_loss)),
            "x-hat": jax.jit(functools.partial(self._at_noise, functools.partial(x_error, stage))),
        }
        self._draw = jax.jit(self._draw_samples)

    def place(self, params: Params) -> Params:
        """Host parameters in fp32 on every device."""
        everywhere = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        return jax.device_put(jax.tree.map(lambda a: np.asarray(a, np.float32), params), everywhere)

    def errors(self, kind: str, params: Params, rows: Rows, clean: bool, label: str) -> Float[np.ndarray, "n k"]:
        """A "loss" or "x-hat" error for each row and bin of t. `clean`: the low-res image is not noised."""
        n, bins, size = len(rows), self.settings.bins, self._batch_size(rows)
        out, split = np.zeros((n, bins)), SPLITS.index(rows.split)
        with Progress(label, -(-n // size) * bins) as progress:
            for k, (start, stop, part) in enumerate(self._parts(rows, size)):
                for i in range(bins):
                    out[start:stop, i] = np.asarray(self._errors[kind](params, part, split, i, clean))[: stop - start]
                    progress.update(k * bins + i + 1)
        return out

    def samples(self, params: Params, rows: Rows, label: str) -> UInt8[np.ndarray, "n s s 3"]:
        """An image for each row, from the row's own noise: another caption for the same row starts from the same noise."""
        size, out = self._batch_size(rows), []
        with Progress(label, len(rows)) as progress:
            for start, stop, part in self._parts(rows, size):
                out.append(np.asarray(self._draw(params, part, SPLITS.index(rows.split)))[: stop - start])
                progress.update(stop)
        return np.concatenate(out)

    def _batch_size(self, rows: Rows) -> int:
        """`batch_size`, or fewer whole images where the stage trains on crops, so that as many pixels are computed at once."""
        pixels = self.settings.batch_size * self.stage.train_size**2
        size = min(max(1, pixels // rows.batch["image"].shape[1] ** 2), len(rows))
        return size + -size % self._mesh.size

    def _parts(self, rows: Rows, size: int) -> Iterator[tuple[int, int, Mapping[str, Array]]]:
        """(start, stop, rows start to stop on the devices); the last part is filled up to `size` by repeating the last row."""
        n = len(rows)
        fields = {name: rows.batch[name] for name in self._fields} | {"index": rows.batch["index"].astype(np.int32)}
        for start in range(0, n, size):
            take = np.minimum(np.arange(start, start + size), n - 1)
            yield start, min(start + size, n), place_batch({name: a[take] for name, a in fields.items()}, self._mesh)

    def _row_keys(self, purpose: int, split: Array, index: Int[Array, "b"]) -> Key[Array, "b"]:
        """One key a row, a function of the seed, the split and the row's number in it."""
        key = jax.random.key(self.settings.seed, impl="threefry2x32")  # another generator's numbers depend on the place in a batch
        key = jax.random.fold_in(jax.random.fold_in(key, purpose), split)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, index)

    def _at_noise(self, error: Callable, params: Params, part: Batch, split: Array, i: Array, clean: Array) -> Float[Array, "b"]:
        """`error` with t in bin i and text always kept; everything else is drawn as in training, but for each row from its own key."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(self._row_keys(0, split, part["index"]), i)
        size = part["image"].shape[1]
        draws = jax.vmap(lambda key: jax.tree.map(lambda a: a[0], self.stage.draw(key, 1, size)))(keys)
        draws |= {"t": (i + draws["t"]) / self.settings.bins, "drop": jnp.zeros(keys.shape, bool)}
        if "lowres_level" in draws:
            draws["lowres_level"] = jnp.where(clean, 0.0, draws["lowres_level"])
        return error(params, part, draws)

    def _draw_samples(self, params: Params, part: Batch, split: Array) -> UInt8[Array, "b s s 3"]:
        keys = self._row_keys(1, split, part["index"])
        return to_uint8(self.stage.sample(params, keys, part, self.settings.sampling))


def x_error(stage: Stage, params: Params, batch: Batch, draws: Mapping[str, Array]) -> Float[Array, "b"]:
    """Mean squared error of x-hat, clipped to [-1, 1] as samplers do; low-res images noised to the drawn level."""
    cond = stage.cond(batch)
    if "lowres" in cond:
        cond = conditioning.augment_lowres(cond, draws["lowres_eps"], draws["lowres_level"], stage.aug_schedule)
    x, logsnr = to_unit(batch["image"]), stage.schedule(draws["t"])
    z = process.diffuse(x, draws["eps"], logsnr)
    x_hat = process.x_from_output(stage.prediction, stage.denoiser(params)(z, logsnr, cond), z, logsnr)
    return jnp.mean(jnp.square(jnp.clip(x_hat, -1.0, 1.0) - x), axis=(1, 2, 3))


class Evaluation:
    """One set of parameters on the rows of `data`."""

    def __init__(self, probe: Probe, data: Data, params: Params):
        self.probe, self.data, self.stage = probe, data, probe.stage
        self.texts = TEXTS if probe.stage.text_dim else TEXTS[:1]
        logsnr = probe.stage.schedule(jnp.linspace(0.0, 1.0, 2 * probe.settings.bins + 1))
        self.by_bin = functools.partial(noise_bins.by_bin, logsnr=np.asarray(logsnr))
        self._params = probe.place(params)
        self._known: dict[Hashable, Any] = {}

    def errors(
        self, kind: str, split: str, text: str = "right", lowres: str = "right", level: str = "drawn"
    ) -> Float[np.ndarray, "n k"]:
        """`Probe.errors` with the text and the low-res image each right, shuffled or null, and a level of LEVELS: a loss of the rows
        as the stage trains on them, x-hat's error of whole images."""

        def compute():
            rows = self.data.crops(split) if kind == "loss" else self.data.uncropped(split)
            shown = dataclasses.replace(rows, batch=conditioned(rows, text, lowres))
            what = [f"{text} text"] * (text != "right") + [f"{lowres} low-res"] * (lowres != "right") + ["clean low-res"] * (level == "clean")
            return self.probe.errors(kind, self._params, shown, level == "clean", ", ".join([f"{kind}, {split}", *what]))

        return _once(self._known, (kind, split, text, lowres, level), compute)

    def sampled(self, split: str, text: str) -> Rows:
        """The rows that `samples` are drawn for, with the condition they are drawn under."""
        rows = self.data.wholes(split)
        batch = conditioned(rows, text, "right")
        if self.probe.settings.lowres_from:
            batch = {**batch, "lowres": self.data.generated[f"{split}_{text}"]}
        return dataclasses.replace(rows, batch=batch)

    def samples(self, split: str, text: str = "right") -> UInt8[np.ndarray, "n s s 3"]:
        """Samples from the right, shuffled or null text, and the true (or given) low-res images."""
        draw = lambda: self.probe.samples(self._params, self.sampled(split, text), f"samples, {split}, {text} text")
        return _once(self._known, ("samples", split, text), draw)

    def distances(self) -> Mapping[tuple[str, str], Float[np.ndarray, "n m"]]:
        """{(split, text): distances of its samples to all images}, in one pass over the images."""

        def compute():
            drawn = {(split, text): self.samples(split, text) for split in self.data.counts for text in self.texts}
            stacked = np.concatenate(list(drawn.values()))
            matrix = np.concatenate([nearest.distances(stacked, chunk) for chunk in self.data.gallery()], axis=1)
            return dict(zip(drawn, np.split(matrix, np.cumsum([len(s) for s in drawn.values()])[:-1])))

        return _once(self._known, "distances", compute)


def conditioned(rows: Rows, text: str, lowres: str) -> Mapping[str, np.ndarray]:
    """The batch of `rows` with its text and low-res image right, shuffled (those of row `other`) or null."""
    batch, changed = rows.batch, {}
    if text == "shuffled":
        changed |= {name: batch[name][rows.other] for name in ("text", "text_mask")}
    if text == "null":
        null = conditioning.null_text({name: jnp.asarray(batch[name]) for name in ("text", "text_mask")})
        changed |= {name: np.asarray(value) for name, value in null.items()}
    if lowres == "shuffled":
        changed["lowres"] = batch["lowres"][rows.other]
    if lowres == "null":
        changed["lowres"] = np.full_like(batch["lowres"], GREY)
    return {**batch, **changed}


def loss(e: Evaluation) -> dict[str, Any]:
    """The training loss by log-SNR, without dropped text, of held-out and of training rows."""
    return {split: e.by_bin(e.errors("loss", split)) for split in e.data.counts}


def sensitivity(e: Evaluation) -> dict[str, Any]:
    """How much the loss rises when the text, or the low-res image, is another row's or none: paired, so beyond noise if ratio > 3."""
    split, out = e.data.heldout, {}
    rise = lambda wrong, right: e.by_bin(wrong - right, describe=statistics.difference)
    if e.stage.text_dim:
        right = e.errors("loss", split)
        out["text"] = {kind: rise(e.errors("loss", split, text=kind), right) for kind in CONTROLS}
    for level in LEVELS if e.stage.lowres_size else ():
        right = e.errors("loss", split, level=level)
        out[f"lowres_{level}"] = {kind: rise(e.errors("loss", split, lowres=kind, level=level), right) for kind in CONTROLS}
    return {"split": split} | out


def denoising(e: Evaluation) -> dict[str, Any]:
    """Mean squared error of x-hat, whole images, beside that of bicubic up-sampling of the clean low-res image; "gain" is the difference,
    positive where x-hat is nearer."""
    split, out = e.data.heldout, {}
    batch = e.data.uncropped(split).batch
    bicubic = superres.mean_square(superres.bicubic(batch["lowres"], batch["image"].shape[1]), batch["image"])
    for level in LEVELS:
        x_hat = e.errors("x-hat", split, level=level)
        gain = e.by_bin(bicubic[:, None] - x_hat, describe=statistics.difference)
        out[level] = {"x_hat": e.by_bin(x_hat), "gain": gain}
    return {"split": split, "bicubic": statistics.summary(bicubic)} | out


def consistency(e: Evaluation) -> dict[str, Any]:
    """Samples, shrunk again, against the low-res images they were drawn from; and the same of bicubic up-sampling."""
    split = e.data.heldout
    lowres = e.sampled(split, "right").batch["lowres"]
    images = {"samples": e.samples(split), "bicubic": superres.bicubic(lowres, e.stage.image_size)}
    shrunk = {name: np.stack([transforms.shrink(image, e.stage.lowres_size) for image in group]) for name, group in images.items()}
    return {"split": split} | {name: superres.consistency(group, lowres) for name, group in shrunk.items()}


def detail(e: Evaluation) -> dict[str, Any]:
    """Whether what a sample adds to its true low-res image is that image's own detail, and how much of that the right caption gives."""
    split = e.data.heldout
    batch = e.data.wholes(split).batch
    upsampled = superres.bicubic(batch["lowres"], e.stage.image_size)
    found = {text: superres.residual_correlations(e.samples(split, text), batch["image"], upsampled) for text in e.texts}
    gain = {
        f"right_minus_{text}": statistics.difference(np.diagonal(found["right"]) - np.diagonal(found[text])) for text in e.texts[1:]
    }
    return {"split": split} | {text: superres.detail(correlation) for text, correlation in found.items()} | gain


def retrieved(e: Evaluation) -> dict[str, Any]:
    """Whether the captioned image is the nearest to its sample, or among the 5 nearest, of all images of all splits."""
    out = {}
    for (split, text), distance in e.distances().items():
        wanted = e.data.gallery_row(split, e.data.wholes(split).batch["index"])
        out.setdefault(split, {})[text] = nearest.score(distance, wanted)
    return out


def row_values(e: Evaluation, chosen: list[str]) -> dict[str, np.ndarray]:
    """{place of a mean in the result, dotted: the values of the rows it is the mean of}, so that two evaluations can be compared in pairs."""
    out = {}
    if "loss" in chosen:
        out |= {f"loss.{split}.overall.mean": e.errors("loss", split).mean(axis=1) for split in e.data.counts}
    if "denoising" in chosen:
        out |= {f"denoising.{level}.x_hat.overall.mean": e.errors("x-hat", e.data.heldout, level=level).mean(axis=1) for level in LEVELS}
    if "retrieval" in chosen:
        for (split, text), distance in e.distances().items():
            rank = nearest.ranks(distance, e.data.gallery_row(split, e.data.wholes(split).batch["index"]))
            out |= {f"retrieval.{split}.{text}.top{k}.rate": rank <= k for k in (1, 5)}
    return out


MEASURES: dict[str, Callable[[Evaluation], dict[str, Any]]] = {
    "loss": loss,
    "sensitivity": sensitivity,
    "denoising": denoising,
    "consistency": consistency,
    "detail": detail,
    "retrieval": retrieved,
}
SUPER_RESOLUTION = ("denoising", "consistency", "detail")


def check_known(names: list[str]) -> None:
    """Raises ValueError for one that is no measure."""
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"--measures {name} is unknown; there are {', '.join(MEASURES)}")


def choose(names: list[str], stage: Stage, settings: Settings) -> list[str]:
    """The measures to run: those named, or all that apply if none is. Raises ValueError for one that is unknown or does not apply."""
    excluded = {} if stage.lowres_size else {name: f"{stage.name} is a base stage" for name in SUPER_RESOLUTION}
    if settings.lowres_from:
        excluded["detail"] = "it compares with true low-res images, and --lowres_from gives others"
        if not stage.lowres_size:
            raise ValueError(f"--lowres_from is for super-resolution stages; {stage.name} is a base stage")
    if not (stage.text_dim or stage.lowres_size):
        excluded["sensitivity"] = f"{stage.name} is told nothing it could be sensitive to"
    check_known(names)
    for name in names:
        if name in excluded:
            raise ValueError(f"--measures {name} does not apply: {excluded[name]}")
    return [name for name in MEASURES if name not in excluded and (not names or name in names)]


def _once(kept: dict[Hashable, Any], key: Hashable, make: Callable[[], Any]) -> Any:
    """kept[key], made if it is not there."""
    if key not in kept:
        kept[key] = make()
    return kept[key]
