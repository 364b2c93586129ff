"""The cascade: pictures depend on their own seed and prompt only; stages must fit each other."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from imagen_jax import cascade, row_batches, sharding
from imagen_jax.text_inputs import TextFeatures
from imagen_jax.training import resume, state
from imagen_jax.weights import checkpoint, exports
from tests import tiny

ENCODER = {"name": "fake", "weights_sha256": "w", "tokenizer_sha256": "t", "dim": tiny.DIM}
SHARED = {"encoder": "fake", "encoder_dtype": "float32", "which": "ema", "batch_size": 4}
MESH = sharding.batch_mesh(jax.devices()[:1])
NAMES = {"base": "base_64", "sr_1": "sr_256", "sr_2": "sr_1024"}  # tiny: 8, 8 -> 16, 16 -> 32
ONE_LEVEL = {
    "base": tiny.ONE_LEVEL_UNET,
    "sr_1": tiny.ONE_LEVEL_FIELDS,
    "sr_2": tiny.ONE_LEVEL_FIELDS,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A cascade config with three exported stages of random weights."""
    root, fields = tmp_path_factory.mktemp("cascade"), dict(SHARED)
    for name, file in NAMES.items():
        stage_config = tiny.config(file, mesh__fsdp_min_elements=64, **ONE_LEVEL[name])
        stage, _, _ = tiny.stage_and_step(stage_config)
        params = tiny.random_params(stage.init)
        meta = {"config": stage_config, "encoder": ENCODER, "manifest_hash": "m", "step": 1}
        exports.export_params(params, meta, root / f"{name}.safetensors")
        sampling = dict(
            method="ancestral",
            steps=3,
            gamma=0.2,
            w=2.0,
            threshold="dynamic",
            percentile=99.5,
            aug_level=0.2,
        )
        fields[name] = {"checkpoint": str(root / f"{name}.safetensors"), "sampling": sampling}
    return fields


@pytest.fixture(scope="module")
def stages(config):
    return cascade.place(cascade.load_cascade(config, mesh=MESH))


def features(*captions: int) -> list[dict[str, TextFeatures]]:
    """Random unpadded features, one entry per caption number."""
    draw = lambda c: np.random.default_rng(c).standard_normal((1 + c % 6, tiny.DIM))
    return [{"": TextFeatures(draw(c).astype(ml_dtypes.bfloat16))} for c in captions]


def pictures(stages, seeds, text, batch_size, **more) -> list[list[np.ndarray]]:
    """[stage][picture]."""
    batches = list(cascade.generate(stages, seeds, text.__getitem__, batch_size, **more))
    assert [row for batch in batches for row in batch.rows] == list(range(len(seeds)))
    return [np.concatenate([batch.images[i] for batch in batches]) for i in range(len(stages))]


@pytest.mark.parametrize("names", [["base", "sr1"], ["base", "sr_2"], []])
def test_other_stages_are_refused(config, names):
    """Catches a KeyError for a stage that does not exist, and a stage that is skipped."""
    with pytest.raises(ValueError, match="give consecutive stages of base,sr_1,sr_2"):
        cascade.run_stages(config, names)


def test_sizes_and_variety(stages):
    """Catches stages in the wrong order, rows lost with the last batch, one seed for all rows."""
    got = pictures(stages, [1, 2, 3, 4, 5], features(1, 2, 3, 4, 5), 4)
    assert [g.shape for g in got] == [(5, 8, 8, 3), (5, 16, 16, 3), (5, 32, 32, 3)]
    assert all(g.dtype == np.uint8 and g.std() > 5 and (g[0] != g[1]).any() for g in got)


def test_other_prompts_change_nothing(stages):
    """Catches thresholds, noise or norms that are shared within a batch (design bug 3)."""
    mine = pictures(stages, [7, 1, 2, 3], features(5, 1, 2, 3), 4)
    theirs = pictures(stages, [7, 4, 5, 6], features(5, 8, 9, 10), 4)
    for a, b in zip(mine, theirs):
        np.testing.assert_array_equal(a[0], b[0])
        assert (a[1] != b[1]).any()


def test_other_batch_size_moves_no_pixel_by_more_than_one(stages):
    """Catches keys that depend on the position in the batch."""
    for a, b in zip(
        pictures(stages[:2], [7, 8, 9], features(5, 6, 7), 4),
        pictures(stages[:2], [7, 8, 9], features(5, 6, 7), 1),
    ):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_a_stage_alone_draws_what_it_draws_in_the_cascade(config, stages):
    """Catches noise keyed to the position among the stages that run, not to the stage."""
    whole = pictures(stages, [7, 8], features(5, 6), 4)
    alone = pictures(
        cascade.place(cascade.load_cascade(config, ["sr_1", "sr_2"], MESH)),
        [7, 8],
        features(5, 6),
        4,
        lowres=whole[0],
    )
    np.testing.assert_array_equal(alone[1], whole[2])


def test_super_resolution_reads_the_image_before_it(stages):
    """Catches a stage that ignores its low-res input (design bug 1)."""
    images = np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
    got = pictures(stages[1:2], [7, 7], features(5, 5), 4, lowres=images)[0].astype(float)
    assert np.abs(got[0] - got[1]).mean() > 1


class LazyImages(Sequence):
    """Low-res images that remember which rows were read."""

    def __init__(self, images):
        self.images, self.read = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        self.read.append(row)
        return self.images[row]


@pytest.mark.parametrize("resident", [True, False])
def test_low_res_images_are_read_when_they_are_needed(stages, config, resident):
    """Catches the images of all rows in memory, rows that are not drawn among them, and the input
    of another row.
    """
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3)).astype(np.uint8)
    text, chosen = features(*range(9)), [0, 1, 5, 6]
    pair = stages[1:] if resident else cascade.load_cascade(config, ["sr_1", "sr_2"], MESH)
    lazy = LazyImages(images)
    # the checker of types reads a random image as well
    unchecked = getattr(cascade.generate, "__wrapped__", cascade.generate)
    batches = unchecked(pair, range(9), text.__getitem__, 1, lazy, chosen)
    first = next(batches)
    seen = len(lazy.read)
    rest = list(batches)
    assert lazy.read == chosen and seen <= (2 if resident else 4)
    drawn = np.concatenate([batch.images[0] for batch in [first, *rest]])
    whole = cascade.generate(pair, range(9), text.__getitem__, 1, images, chosen)
    np.testing.assert_array_equal(drawn, np.concatenate([b.images[0] for b in whole]))


def test_what_does_not_chain_is_refused(config, tmp_path):
    """Catches a cascade of stages with other sizes, another text encoder, or no stage."""
    with pytest.raises(ValueError, match="outputs 8x8 images, but .* expects 16x16"):
        cascade.load_cascade(
            config | {"sr_1": config["sr_2"], "sr_2": config["sr_2"] | {"checkpoint": ""}}
        )
    params, meta = checkpoint.load_params(config["sr_1"]["checkpoint"])
    meta["encoder"] = ENCODER | {"weights_sha256": "other"}
    exports.export_params(params, meta, tmp_path / "other.safetensors")
    other = config | {"sr_1": config["sr_1"] | {"checkpoint": str(tmp_path / "other.safetensors")}}
    with pytest.raises(ValueError, match="text encoder"):
        cascade.load_cascade(other)
    meta["encoder"] = ENCODER | {"layer": 11}
    exports.export_params(params, meta, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="do not share a text encoder .layer"):
        cascade.load_cascade(other)
    with pytest.raises(ValueError, match="stage base has no checkpoint"):
        cascade.load_cascade(SHARED | {name: config[name] | {"checkpoint": ""} for name in NAMES})
    with pytest.raises(ValueError, match="no embedded checkpoint 'nothing'"):
        cascade.resolve("embedded:nothing")


def test_too_long_a_caption_is_refused(stages):
    """Catches features that are cut without an error."""
    long = np.zeros((7, tiny.DIM), ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match="tokens"):
        pictures(stages[:1], [0], [{"": TextFeatures(long)}], 1)


def test_start_from_other_weights():
    """Catches a warm start that changes only some of the EMAs, or takes weights of
    another model.
    """
    stage, optimizer, _ = tiny.stage_and_step(tiny.config(**tiny.ONE_LEVEL_UNET))
    fresh = jax.jit(lambda: state.initial_state(stage, optimizer, 0, 2))()
    device = jax.tree.map(lambda leaf: leaf.sharding, fresh)
    params = jax.tree.map(lambda p: np.asarray(p + 1, ml_dtypes.bfloat16), fresh.params)
    warm = state.with_params(fresh, params, device)
    for tree in (warm.params, warm.ema, *warm.ema_tracks):
        assert float(tree["stem"]["bias"][0]) == 1.0 and tree["stem"]["bias"].dtype == jnp.float32
    del params["stem"]["bias"]
    with pytest.raises(ValueError, match="stem/bias first: it is missing"):
        state.with_params(fresh, params, device)


def test_resume_check():
    """Catches a changed experiment that resumes, and a harmless change that is refused."""
    saved = {"config": tiny.config(), "manifest_hash": "a", "encoder": ENCODER}
    same = {"config": tiny.config(), "manifest_hash": "a", "encoder": ENCODER}
    assert resume.check(saved, same) == []
    same["config"]["train"]["steps"] = 99
    same["config"]["mesh"]["fsdp"] = 4
    assert resume.check(saved, same) == ["mesh.fsdp: 1 -> 4", "train.steps: 8 -> 99"]
    same["config"]["optim"]["accumulation"] = 2
    assert "optim.accumulation: 1 -> 2" in resume.check(saved, same)
    older = {
        **saved,
        "config": {
            **saved["config"],
            "sampling": {k: v for k, v in saved["config"]["sampling"].items() if k != "grid"},
        },
    }
    assert resume.check(older, saved) == []
    for part, field, value in (
        ("optim", "lr", 0.5),
        ("data", "batch_size", 16),
        ("model", "channels", 32),
        ("diffusion", "text_drop", 0.2),
        ("diffusion", "process", "flow"),
    ):
        other = {
            "config": tiny.config(**{f"{part}__{field}": value}),
            "manifest_hash": "a",
            "encoder": ENCODER,
        }
        with pytest.raises(ValueError, match=f"{part}.{field}"):
            resume.check(saved, other)
    with pytest.raises(ValueError, match="manifest_hash"):
        resume.check(saved, saved | {"manifest_hash": "b"})
    with pytest.raises(ValueError, match="encoder.weights_sha256"):
        resume.check(saved, saved | {"encoder": ENCODER | {"weights_sha256": "x"}})
    moved = saved | {"encoder": ENCODER | {"name": "renamed", "max_length": 9, "pooling": "end"}}
    changed = ["encoder.max_length", "encoder.name", "encoder.pooling"]
    assert [line.partition(":")[0] for line in resume.check(saved, moved)] == changed
    for config in (saved["config"], same["config"]):
        config["optim"]["decay"] = "cosine"
    with pytest.raises(ValueError, match="train.steps"):
        resume.check(saved, same)
    for config in (saved["config"], same["config"]):
        config["optim"]["decay"], config["model"]["dropout"] = "constant", 0.1
    with pytest.raises(ValueError, match="optim.accumulation"):
        resume.check(saved, same)


def test_a_resume_compares_what_named_encoders_determine():
    """Catches a renamed encoder that is refused, and one with another pooled vector that is not."""
    columns = dict(encoders=["t5", "clip"], dims=[4, 4], lengths=[8, 8], pooled_dims=[0, 5])
    config = tiny.config(text__dim=0, text__drops=[0.0, 0.0])
    config["text"] |= columns
    meta = lambda **t5: {"config": config, "encoder": {"encoders": {"t5": ENCODER | t5}}}
    lines = resume.check(meta(), meta(name="moved", pooling="end"))
    assert [line.partition(":")[0] for line in lines] == [
        "encoder.encoders.t5.name",
        "encoder.encoders.t5.pooling",
    ]
    clip = lambda **fields: {"config": config, "encoder": {"encoders": {"clip": ENCODER | fields}}}
    for refused in (meta(dim=9), clip()):
        with pytest.raises(ValueError, match="encoder.encoders"):
            resume.check(meta(), refused)
    with pytest.raises(ValueError, match="encoders.clip.pooling: None -> 'end'"):
        resume.check(clip(), clip(pooling="end"))


def test_a_picture_that_is_not_finite_is_an_error(stages):
    """Catches NaN that becomes a black picture with a record as if all were well."""
    params = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), stages[0].params)
    broken = dataclasses.replace(stages[0], params=params)
    with pytest.raises(FloatingPointError, match="1 of 1 images with values that are not finite"):
        next(cascade.generate([broken], [0], features(1).__getitem__, 1))


@pytest.mark.parametrize(
    "sizes",
    [pytest.param({"data": 2, "fsdp": 2}, marks=pytest.mark.slow), {"fsdp": 2, "spatial": 2}],
)
def test_a_mesh_moves_no_pixel_by_more_than_one(config, stages, sizes):
    """Catches rows that change places between devices, noise drawn per device, and padding that is
    returned or moves a row.
    """
    seeds, text = [7, 8, 9, 10, 11], features(5, 6, 7, 8, 9)
    alone = pictures(stages[:2], seeds, text, 4)
    mesh = sharding.make_mesh({"data": 1, "model": 1, "spatial": 1} | sizes, jax.devices()[:4])
    loaded = cascade.load_cascade(config, ["base", "sr_1"], mesh)
    kernel = cascade.place(loaded)[0].params["stem"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2  # by the rules of training
    for a, b in zip(alone, pictures(cascade.place(loaded), seeds, text, 4)):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


WIDE = [(4, 12), (8, 24)]


def wide(stages):
    """The first two stages, for pictures three times as wide as high."""
    return [stage.with_size(size, i) for i, (stage, size) in enumerate(zip(stages, WIDE))]


def test_pictures_that_are_not_square(stages):
    """Catches a stage that draws squares, and height and width exchanged."""
    seeds, text = [7, 8, 9], features(5, 6, 7)
    drawn = pictures(wide(stages), seeds, text, 4)
    assert [images.shape for images in drawn] == [(3, *size, 3) for size in WIDE]
    assert all(images.std() > 5 for images in drawn)
    with pytest.raises(ValueError, match="needs low-res images of 4x12 .* of 8x24, not of 8x8"):
        pictures([wide(stages)[1]], seeds, text, 4, lowres=np.zeros((3, 8, 8, 3), np.uint8))


@pytest.mark.slow
def test_pictures_that_are_not_square_are_the_same_on_any_mesh(config, stages):
    """Catches images of which a device holds other rows of pixels or other pictures."""
    seeds, text = [7, 8, 9], features(5, 6, 7)
    alone = pictures(wide(stages), seeds, text, 4)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 1, "spatial": 2})
    loaded = cascade.place(cascade.load_cascade(config, ["base", "sr_1"], mesh))
    for a, b in zip(alone, pictures(wide(loaded), seeds, text, 4)):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_stages_that_do_not_fit_together_are_placed_in_turn(config, stages, monkeypatch):
    """Catches a batch whose images or texts are exchanged when one stage runs after the other."""
    seeds, text = [7, 8, 9, 10, 11], features(5, 6, 7, 8, 9)
    monkeypatch.setattr(cascade, "GROUP_BYTES", 2 * 2 * 3 * 8**2)  # of two batches
    loaded = cascade.load_cascade(config, ["base", "sr_1"], MESH)
    assert not any(stage.resident for stage in loaded)
    for a, b in zip(pictures(stages[:2], seeds, text, 2), pictures(loaded, seeds, text, 2)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("first", ["large", ""])
def test_process_0_decides_whether_the_stages_stay_on_the_devices(config, monkeypatch, first):
    """Catches processes with other devices' memory that run the programs in another order."""
    monkeypatch.setattr(cascade.agreement, "gather", lambda text: [first, text])
    loaded = cascade.load_cascade(config, ["base", "sr_1"], MESH)
    assert {stage.resident for stage in cascade.place(loaded)} == {not first}


@pytest.mark.parametrize(
    "processes, sizes, most", [(1, (2, 4), 16), (4, (8, 1), 4), (4, (2, 1), 16)]
)
def test_the_rows_of_a_group_are_the_same_in_all_processes(monkeypatch, processes, sizes, most):
    """Catches groups of batches by the rows of one process, which others may not have: 16 rows."""
    monkeypatch.setattr(row_batches.jax, "process_count", lambda: processes)
    data, fsdp = sizes
    mesh = {"data": data, "fsdp": fsdp, "model": 8 // data // fsdp, "spatial": 1}
    assert row_batches.most_held(15, sharding.make_mesh(mesh)) == most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "sr_1"])
def test_half_precision_parameters_change_no_picture(config, tmp_path, name):
    """Catches a parameter that the network reads in fp32 but that sampling stores in bfloat16."""
    params, meta = checkpoint.load_params(config[name]["checkpoint"])
    meta["config"]["model"]["dtype"] = "bfloat16"
    exports.export_params(params, meta, tmp_path / "x.safetensors")
    section = config[name] | {"checkpoint": str(tmp_path / "x.safetensors")}
    (loaded,) = cascade.load_cascade(config | {name: section}, [name], MESH)
    kernels = [leaf for leaf in jax.tree.leaves(loaded.params) if leaf.dtype != np.float32]
    assert sum(leaf.size for leaf in kernels) > 0.9 * sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
    whole = dataclasses.replace(loaded, params=jax.tree.map(jnp.asarray, params))
    lowres = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    given = {} if name == "base" else {"lowres": lowres}
    draw = lambda stage: pictures([stage], [1, 2], features(1, 2), 2, **given)[0]
    np.testing.assert_array_equal(draw(loaded.on_mesh()), draw(whole))


@pytest.mark.parametrize("name", ["../../etc", "../t5_tiny", "", "base_16.safetensors"])
def test_unknown_embedded_checkpoints_are_refused_with_the_names(name):
    """Catches a name with separators that leaves the folder, and a list of another folder."""
    with pytest.raises(
        ValueError, match=r"no embedded checkpoint .*; choose one of base_16, sr_256"
    ):
        cascade.resolve(f"embedded:{name}")
    assert Path(cascade.resolve("embedded:base_16")).is_file()
