"""Stages whose loss and samples are known, and data whose rows can be told apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.data.transforms import shrink
from imagen_jax.diffusion import schedule
from imagen_jax.diffusion.density import UniformTime
from imagen_jax.diffusion.process import GaussianProcess
from imagen_jax.evals.evaluation import Evaluation, Probe
from imagen_jax.evals.rows import Data, ReadRows, Settings
from imagen_jax.stage import Stage, to_unit

N, SIZE, LOW, BINS = 11, 8, 4, 4
WRONG_TEXT, NO_TEXT, WRONG_LOWRES, GREY_LOWRES = 0.5, 0.25, 0.125, 0.0625


class Toy(Stage):
    """Row i has the mark 10 * (i + 1) in its image, its text and its low-res image.

    Loss = 2 u + 100 eps + (low-res level) + a known amount for a foreign or missing text or low-res
    image. A sample shows its text's mark, with a little noise from its key.
    """

    name, reads_text, image_size, lowres_size, crop_size = "toy", True, SIZE, LOW, 0
    process, density = GaussianProcess("vp", "eps"), UniformTime("cosine")
    aug_schedule = staticmethod(schedule.cosine)

    def __init__(self):
        pass

    def batch_shapes(self, b):
        return dict.fromkeys(("image", "text", "text_mask", "lowres"))

    def draw(self, key, b, size=None):
        keys = jax.random.split(key, 3)
        return {
            "u": jax.random.uniform(keys[0], (b,)),
            "lowres_level": jax.random.uniform(keys[1], (b,), maxval=0.5),
            "eps": jax.random.normal(keys[2], (b,)),
            "drop": jnp.ones(b, bool),
            "lowres_eps": jnp.zeros((b, LOW, LOW, 3)),
        }

    def per_sample_loss(self, params, batch, draws):
        mark, text = batch["image"][:, 0, 0, 0], batch["text"][:, 0, 0]
        low = batch["lowres"][:, 0, 0, 0]
        null = (text == 0) & (batch["text_mask"].sum(1) == 1)
        loss = 2 * draws["u"] + 100 * draws["eps"] + draws["lowres_level"]
        loss += 1000 * draws["drop"] + params["bias"]
        loss += jnp.where(null, NO_TEXT, jnp.where(text == mark, 0.0, WRONG_TEXT))
        return loss + jnp.where(low == 128, GREY_LOWRES, jnp.where(low == mark, 0.0, WRONG_LOWRES))

    def sample(self, params, keys, batch, sampling):
        noise = jax.vmap(lambda key: jax.random.normal(key, (SIZE, SIZE, 3)))(keys)
        return to_unit(batch["text"][:, 0, 0])[:, None, None, None] + noise / 100


class Base(Toy):
    """A base stage without text that predicts `eps` with a known `error`."""

    name, lowres_size, reads_text = "base", 0, False

    def __init__(self, eps=None, error=None):
        object.__setattr__(self, "predicted", None if eps is None else eps + error)

    def cond(self, batch):
        return {}

    def denoiser(self, params, dropout_key=None):
        return lambda z, logsnr, cond: self.predicted


@dataclasses.dataclass(frozen=True)
class Rows(ReadRows):
    """Rows in memory."""

    split: str
    batch: dict
    _seed: int

    def __len__(self):
        return len(self.index)

    @property
    def index(self):
        return self.batch["index"]

    @property
    def caption_id(self):
        return self.batch["caption_id"]

    @property
    def side(self):
        return self.batch["image"].shape[1]

    def at(self, positions):
        return {name: values[positions] for name, values in self.batch.items()}


class Marked(Data):
    """N marked rows a split, all of them the gallery."""

    def __init__(self):
        self.counts, self.heldout = {"train": N, "heldout": N}, "heldout"
        self.gallery_rows = {split: np.arange(N) for split in self.counts}
        self._settings, self._kept = settings(), {}

    def crops(self, split):
        mark = 10 * (np.arange(N) + 1) + (SIZE if split == "heldout" else 0)
        shaped = mark[:, None, None, None]
        pixels = lambda size: np.broadcast_to(shaped, (N, size, size, 3)).astype(np.uint8)
        text = np.zeros((N, 3, 1), np.float32)
        text[:, :2, 0] = mark[:, None]
        mask = np.broadcast_to(np.arange(3) < 2, (N, 3))
        batch = {"image": pixels(SIZE), "lowres": pixels(LOW), "text": text, "text_mask": mask}
        return Rows(split, batch | {"index": np.arange(N), "caption_id": np.arange(N)}, 5)

    wholes = uncropped = crops

    def images(self, split, index):
        return self.wholes(split).batch["image"][index]

    def gallery_images(self, positions):
        images = [self.wholes(split).batch["image"] for split in self.counts]
        return np.concatenate(images)[positions]

    def gallery(self, positions):
        yield self.gallery_images(positions)


class Textured(Marked):
    """Whole images have texture; crops are plain, so bicubic up-sampling makes no error on them."""

    def wholes(self, split):
        image = np.random.default_rng(0).integers(0, 256, (N, SIZE, SIZE, 3), np.uint8)
        changed = {"image": image, "lowres": np.stack([shrink(i, LOW) for i in image])}
        return Rows(split, self.crops(split).batch | changed, 5)

    uncropped = wholes


class Drawn(Evaluation):
    """Samples are the captioned image itself; errors are 0.3 on whole images, 0.7 on crops."""

    def samples(self, split, text="right"):
        rows = self.data.wholes(split)
        image = rows.batch["image"]
        if text == "shuffled":
            return image[rows.other]
        return image if text == "right" else np.zeros_like(image)

    def errors(self, error, split, whole=False, **condition):
        return np.full((len(self.data.crops(split)), BINS), 0.3 if whole else 0.7)


def settings(**changed):
    numbers = {"rows": N, "samples": N, "gallery": 2 * N, "bins": BINS, "batch_size": 8, "seed": 0}
    return Settings(**numbers | {"sampling": {}} | changed)


def evaluation(stage=None, data=None, kind=Evaluation, **changed):
    """The toy, or another stage, on marked rows, or others; `changed`: of the settings."""
    probe = Probe(stage or Toy(), settings(**changed))
    return kind(probe, data or Marked(), {"bias": jnp.zeros(())})
