"""The measures on a stage whose loss and samples are known, and on data whose rows can be told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.evals import measures
from imagen_jax.data.transforms import shrink
from imagen_jax.diffusion import process, schedule
from imagen_jax.stage import Stage, to_unit
from tests.data import synthetic

N, SIZE, LOW, BINS = 11, 8, 4, 4
WRONG_TEXT, NO_TEXT, WRONG_LOWRES, GREY_LOWRES = 0.5, 0.25, 0.125, 0.0625


class Toy(Stage):
    """Row i is marked by the number 10 * (i + 1) in its image, its text and its low-res image; the loss adds up what is wrong with them.

    Loss = 2 t + 100 eps + (low-res level) + a known amount for a foreign or missing text or low-res image. A sample shows its text's number,
    with a little noise from its key.
    """

    name, text_dim, image_size, lowres_size, crop_size, prediction = "toy", 1, SIZE, LOW, 0, "eps"
    schedule = aug_schedule = staticmethod(schedule.cosine)

    def __init__(self):
        pass

    def batch_shapes(self, b):
        return dict.fromkeys(("image", "text", "text_mask", "lowres"))

    def draw(self, key, b, size=None):
        keys = jax.random.split(key, 3)
        draws = {"t": jax.random.uniform(keys[0], (b,)), "lowres_level": jax.random.uniform(keys[1], (b,), maxval=0.5)}
        return draws | {"eps": jax.random.normal(keys[2], (b,)), "drop": jnp.ones(b, bool), "lowres_eps": jnp.zeros((b, LOW, LOW, 3))}

    def per_sample_loss(self, params, batch, draws):
        mark, text, low = batch["image"][:, 0, 0, 0], batch["text"][:, 0, 0], batch["lowres"][:, 0, 0, 0]
        null = (text == 0) & (batch["text_mask"].sum(1) == 1)
        loss = 2 * draws["t"] + 100 * draws["eps"] + draws["lowres_level"] + 1000 * draws["drop"] + params["bias"]
        loss += jnp.where(null, NO_TEXT, jnp.where(text == mark, 0.0, WRONG_TEXT))
        return loss + jnp.where(low == 128, GREY_LOWRES, jnp.where(low == mark, 0.0, WRONG_LOWRES))

    def sample(self, params, keys, batch, sampling):
        noise = jax.vmap(lambda key: jax.random.normal(key, (SIZE, SIZE, 3)))(keys)
        return to_unit(batch["text"][:, 0, 0])[:, None, None, None] + noise / 100


class Base(Toy):
    """A base stage that is told nothing and predicts `eps` with a known `error`."""

    name, lowres_size = "base", 0

    def __init__(self, eps=None, error=None):
        object.__setattr__(self, "predicted", None if eps is None else eps + error)

    def cond(self, batch):
        return {}

    def denoiser(self, params):
        return lambda z, logsnr, cond: self.predicted


class Marked(measures.Data):
    """N marked rows a split, all of them the gallery."""

    def __init__(self):
        self.counts, self.heldout = {"train": N, "heldout": N}, "heldout"
        self.gallery_rows = {split: np.arange(N) for split in self.counts}

    def crops(self, split):
        mark = 10 * (np.arange(N) + 1) + (SIZE if split == "heldout" else 0)
        pixels = lambda size: np.broadcast_to(mark[:, None, None, None], (N, size, size, 3)).astype(np.uint8)
        text = np.zeros((N, 3, 1), np.float32)
        text[:, :2, 0] = mark[:, None]
        mask = np.broadcast_to(np.arange(3) < 2, (N, 3))
        batch = {"image": pixels(SIZE), "lowres": pixels(LOW), "text": text, "text_mask": mask, "index": np.arange(N), "caption_id": np.arange(N)}
        return measures.Rows(split, batch, 5)

    wholes = uncropped = crops

    def gallery(self):
        for split in self.counts:
            yield self.wholes(split).batch["image"]


def evaluation(batch_size=8, seed=0):
    settings = measures.Settings(rows=N, samples=N, gallery=2 * N, bins=BINS, batch_size=batch_size, seed=seed, sampling={})
    return measures.Evaluation(measures.Probe(Toy(), settings), Marked(), {"bias": np.zeros(())})


@pytest.fixture(scope="module")
def toy():
    return evaluation()


def test_rises_are_paired_and_known(toy):
    """Catches controls drawn with other noise or times than the right condition (errors of 100, not 0), right and control swapped, a null
    that keeps the caption's length, a null low-res image that is black, and controls that take the other's place."""
    found = measures.sensitivity(toy)
    assert found["split"] == "heldout"
    wanted = {"text": (WRONG_TEXT, NO_TEXT), "lowres_drawn": (WRONG_LOWRES, GREY_LOWRES), "lowres_clean": (WRONG_LOWRES, GREY_LOWRES)}
    for told, amounts in wanted.items():
        for kind, amount in zip(("shuffled", "null"), amounts, strict=True):
            curve = found[told][kind]
            for entry in [curve["overall"], *curve["bins"]]:
                assert entry["mean"] == pytest.approx(amount, abs=1e-4) and entry["se"] < 1e-4 and entry["n"] == N


def test_each_bin_has_its_own_times_and_noise(toy):
    """Catches t not kept to its bin, text dropped as in training, one noise for all bins, images or splits, and a level that stays when clean."""
    kept = toy.errors("loss", "heldout") - 100 * noise_of(toy, "heldout")
    clean = toy.errors("loss", "heldout", level="clean") - 100 * noise_of(toy, "heldout")
    bins = np.arange(BINS)
    assert ((clean >= 2 * bins / BINS - 1e-3) & (clean <= 2 * (bins + 1) / BINS + 1e-3)).all()
    assert ((kept > clean) & (kept <= clean + 0.5 + 1e-3)).all()
    noise = np.concatenate([noise_of(toy, split) for split in ("train", "heldout")])
    assert len(np.unique(noise.round(5))) == noise.size
    assert 0.7 < noise.std() < 1.3


def noise_of(toy, split):
    """The eps that the toy's loss contains, found from two parameters the way a user cannot."""
    probe = measures.Probe(toy.stage, toy.probe.settings)
    only_eps = lambda params, batch, draws: draws["eps"]
    probe._errors["eps"] = jax.jit(lambda *args: probe._at_noise(only_eps, *args))
    return probe.errors("eps", probe.place({}), toy.data.crops(split), False, "eps")


def test_numbers_do_not_depend_on_the_batch_size(toy):
    """Catches noise drawn by place in the batch, rows of the last, filled up batch counted, and order lost."""
    other = evaluation(batch_size=16)
    assert len(other.errors("loss", "heldout")) == N
    np.testing.assert_allclose(other.errors("loss", "heldout"), toy.errors("loss", "heldout"), atol=1e-4)
    np.testing.assert_array_equal(other.samples("heldout"), toy.samples("heldout"))
    assert np.abs(evaluation(seed=1).errors("loss", "heldout") - toy.errors("loss", "heldout")).max() > 1


def test_controls_start_from_the_noise_of_the_right_samples(toy):
    """Catches noise that differs with the condition, which would blur every comparison, and one noise for all rows."""
    rows = toy.data.wholes("heldout")
    mark = rows.batch["image"].astype(int)
    noise = toy.samples("heldout") - mark
    np.testing.assert_array_equal(toy.samples("heldout", "shuffled") - mark[rows.other], noise)
    assert len(np.unique(noise.reshape(N, -1), axis=0)) == N


def test_retrieval_counts_the_captioned_image_of_its_own_split(toy):
    """Catches the held-out images' place in the gallery counted from 0, and controls drawn from the right text."""
    found = measures.retrieved(toy)
    for split in ("train", "heldout"):
        assert found[split]["right"]["top1"]["rate"] == 1.0 and found[split]["right"]["gallery"] == 2 * N
        assert found[split]["shuffled"]["top1"]["hits"] == 0
    # Null text draws black: nearest are the marks 10, 18, 20, 28, 30, of which train has three.
    assert [found[split]["null"]["top5"]["hits"] for split in ("train", "heldout")] == [3, 2]


class Drawn(measures.Evaluation):
    """Samples that are the captioned text's image itself, textured; x-hat with a squared error of 0.3."""

    def samples(self, split, text="right"):
        rows = self.data.wholes(split)
        return {"right": rows.batch["image"], "shuffled": rows.batch["image"][rows.other], "null": np.zeros_like(rows.batch["image"])}[text]

    def errors(self, kind, split, **condition):
        assert kind == "x-hat"
        return np.full((N, BINS), 0.3)


class Textured(Marked):
    """Whole images are textured; crops are plain, so that bicubic up-sampling makes no error on them."""

    def wholes(self, split):
        image = np.random.default_rng(0).integers(0, 256, (N, SIZE, SIZE, 3), np.uint8)
        changed = {"image": image, "lowres": np.stack([shrink(i, LOW) for i in image])}
        return measures.Rows(split, self.crops(split).batch | changed, 5)

    uncropped = wholes


def test_super_resolution_is_held_against_bicubic_and_its_input(toy):
    """Catches gains of the wrong sign, crops held against bicubic, samples held against the wrong low-res image, and controls that count as right."""
    e = Drawn(toy.probe, Textured(), {})
    found = measures.detail(e)
    assert found["right"]["own"]["mean"] == pytest.approx(1.0, abs=1e-5) and found["right"]["top1"]["hits"] == N
    assert found["shuffled"]["top1"]["hits"] == 0
    assert found["right_minus_shuffled"]["mean"] == pytest.approx(1.0 - found["shuffled"]["own"]["mean"])
    shrunk = measures.consistency(e)
    assert shrunk["samples"]["mae"]["mean"] == 0.0 < shrunk["bicubic"]["mae"]["mean"] < 40
    denoised = measures.denoising(e)
    assert denoised["bicubic"]["mean"] > 0.1
    for level in ("drawn", "clean"):
        assert denoised[level]["gain"]["overall"]["mean"] == pytest.approx(denoised["bicubic"]["mean"] - 0.3)


def test_gallery_holds_every_image_once_where_it_is_looked_for(tmp_path, monkeypatch):
    """Catches splits in another order than counted, rows lost between chunks, and the nearest image fetched from the wrong split."""
    monkeypatch.setattr(measures, "_CHUNK", 4)
    synthetic.write_prepared(tmp_path, images=9, size=SIZE, heldout=3)
    sizes = {"image_size": SIZE, "lowres_size": LOW, "crop_size": LOW, "text_length": synthetic.TEXT_LENGTH}
    data_cfg = sizes | {"path": str(tmp_path), "flip": False, "caption": "first", "workers": 0, "cache_mib": 0}
    data = measures.Data(data_cfg, measures.Settings(rows=5, samples=3, gallery=12, bins=1, batch_size=1, seed=0, sampling={}))
    for _ in range(2):  # read, then kept
        gallery = np.concatenate(list(data.gallery()))
        blue = [*range(9), 100, 101, 102]  # how synthetic images are told apart
        assert gallery[:, 0, 0, 2].tolist() == blue
    assert [image[0, 0, 2] for image in data.gallery_images(np.array([11, 8, 0]))] == [102, 8, 0]
    index = data.wholes("heldout").batch["index"]
    assert gallery[data.gallery_row("heldout", index)][:, 0, 0, 2].tolist() == (100 + index).tolist()
    assert data.wholes("train").batch["image"].shape == (3, SIZE, SIZE, 3) and data.crops("train").batch["image"].shape == (5, LOW, LOW, 3)
    whole = data.uncropped("train").batch
    assert whole["image"].shape == (5, SIZE, SIZE, 3) and whole["index"].tolist() == data.crops("train").batch["index"].tolist()
    assert set(data.wholes("train").batch["index"]) <= set(data.crops("train").batch["index"].tolist())


def test_gallery_is_limited_but_holds_what_is_looked_for(tmp_path):
    """Catches a gallery without some sample's own image, one that is read whole whatever the limit, and places counted in the whole."""
    synthetic.write_prepared(tmp_path, images=40, size=SIZE, heldout=20)
    sizes = {"image_size": SIZE, "lowres_size": 0, "crop_size": 0, "text_length": synthetic.TEXT_LENGTH}
    data_cfg = sizes | {"path": str(tmp_path), "flip": False, "caption": "first", "workers": 0, "cache_mib": 0}
    data = measures.Data(data_cfg, measures.Settings(rows=6, samples=6, gallery=30, bins=1, batch_size=1, seed=0, sampling={}))
    images = np.concatenate(list(data.gallery()))
    assert 30 <= len(images) <= 30 + 2 * 6
    for split in data.counts:
        rows = data.wholes(split).batch
        places = data.gallery_row(split, rows["index"])
        np.testing.assert_array_equal(images[places], rows["image"])
        np.testing.assert_array_equal(np.stack(data.gallery_images(places)), rows["image"])


def test_whole_images_are_denoised_a_few_at_a_time():
    """Catches noise of a crop's size for whole images, and whole images by as many as crops."""

    class Crops(Toy):
        crop_size, lowres_size = LOW, LOW

        def draw(self, key, b, size=None):
            return super().draw(key, b) | {"size": jnp.full(b, size, jnp.float32)}

    probe = measures.Probe(Crops(), measures.Settings(rows=N, samples=N, gallery=2 * N, bins=1, batch_size=8 * (SIZE // LOW) ** 2, seed=0, sampling={}))
    seen = []
    sizes = lambda params, batch, draws: seen.append(len(batch["index"])) or draws["size"]
    probe._errors["size"] = jax.jit(lambda *args: probe._at_noise(sizes, *args))
    assert (probe.errors("size", {}, Marked().uncropped("train"), False, "size") == SIZE).all()
    assert max(seen) == 8


@pytest.mark.parametrize("t, size", [(0.2, 0.5), (0.5, 0.1)])
def test_x_hat_error_follows_from_the_error_of_eps(t, size):
    """Catches the loss reported as error of x-hat, and x-hat without the bounds that a sampler gives it."""
    image = jnp.full((2, SIZE, SIZE, 3), 128, jnp.uint8)
    eps = jnp.asarray(np.random.default_rng(0).standard_normal((2, SIZE, SIZE, 3)), jnp.float32)
    draws = {"t": jnp.full(2, t), "eps": eps}
    alpha, sigma = process.alpha_sigma(schedule.cosine(draws["t"]), 1)
    found = measures.x_error(Base(eps, size), {}, {"image": image}, draws)
    np.testing.assert_allclose(found, (sigma / alpha * size) ** 2, rtol=1e-4)
    bounded = measures.x_error(Base(eps, -1000.0), {}, {"image": image}, draws)
    np.testing.assert_allclose(bounded, (1 - 128 / 127.5 + 1) ** 2, rtol=1e-4)


def test_measures_that_do_not_apply_are_refused_by_name():
    """Catches an unknown name passed over in silence, and super-resolution measures tried on a base stage."""
    settings = measures.Settings(rows=1, samples=1, gallery=12, bins=1, batch_size=1, seed=0, sampling={})
    toy, base = Toy(), Base()
    assert measures.choose([], toy, settings) == list(measures.MEASURES)
    assert measures.choose([], base, settings) == ["loss", "sensitivity", "retrieval"]
    assert measures.choose(["retrieval", "loss"], base, settings) == ["loss", "retrieval"]
    for name, message in (("denoising", "base is a base stage"), ("los", "is unknown")):
        with pytest.raises(ValueError, match=message):
            measures.choose([name], base, settings)
    with pytest.raises(ValueError, match="--rows 0"):
        measures.Settings(rows=0, samples=1, gallery=12, bins=1, batch_size=1, seed=0, sampling={})
