"""Windows of images, against positions computed by hand, and the views of batches."""

import itertools

import numpy as np
import pytest

from imagen_jax.data import pipeline, transforms, views
from imagen_jax.data.views import View
from tests.data import synthetic
from tests.data.test_pipeline import SR, assert_same, config, take


@pytest.mark.parametrize(
    "size, target, view, box",
    [
        ((100, 40), (16, 16), View(), (30, 0, 70, 40)),
        ((41, 100), (16, 16), View(), (0, 29, 41, 70)),
        ((100, 40), (16, 16), View(1.0, (0.0, 0.0)), (0, 0, 40, 40)),
        ((100, 40), (16, 16), View(1.0, (0.999, 0.999)), (60, 0, 100, 40)),
        ((100, 40), (16, 16), View(1.0, (0.5, 0.5)), (30, 0, 70, 40)),
        ((100, 40), (16, 16), View(0.5, (0.999, 0.0)), (0, 20, 20, 40)),
        ((100, 40), (16, 16), View(0.5, (0.0, 0.999)), (80, 0, 100, 20)),
        ((640, 480), (48, 64), View(), (0, 0, 640, 480)),
        ((640, 640), (48, 64), View(), (0, 80, 640, 560)),
        ((640, 640), (64, 48), View(0.75, (0.999, 0.0)), (0, 160, 360, 640)),
    ],
)
def test_windows(size, target, view, box):
    """Catches width and height exchanged, a row for a column, a scale of the target, a window that
    never reaches the last pixel, and one of another aspect ratio.
    """
    assert views.window(size, target, view) == box


def test_a_window_covers_the_target_wherever_the_scaled_image_does():
    """Catches a side rounded below the target's, and a window outside the image."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        target = tuple(int(side) for side in rng.integers(1, 40, 2))
        scale, corner = rng.uniform(0.3, 1.0), tuple(rng.random(2))
        height, width = (int(np.ceil(side / scale)) + int(rng.integers(50)) for side in target)
        left, top, right, bottom = views.window((width, height), target, View(scale, corner))
        assert left >= 0 and right <= width and top >= 0 and bottom <= height
        assert bottom - top >= target[0] and right - left >= target[1]


def test_the_window_of_an_image_is_averaged_to_the_target():
    """Catches a window of another place, and a target with height and width exchanged."""
    image = np.random.default_rng(0).integers(0, 256, (48, 100, 3)).astype(np.uint8)
    view = View(0.5, (0.999, 0.25))  # 24 x 32 pixels at row 24, column 17
    wanted = image[24:48, 17:49].reshape(6, 4, 8, 4, 3).mean(axis=(1, 3))
    got = transforms.decode_window(synthetic.encode(image), (6, 8), "exact", view)
    assert got.shape == (6, 8, 3) and np.abs(got - wanted).max() <= 1


@pytest.mark.parametrize("size", [(640, 320), (321, 643)])
@pytest.mark.parametrize("view", [View(), View(0.8, (0.9, 0.1)), View(1.0, (0.0, 0.999))])
def test_draft_shows_the_same_window(size, view):
    """Catches a window that is scaled with the wrong factor, or in pixels of the full size."""
    encoded = synthetic.encode(synthetic.gradient(size), "JPEG", quality=98, subsampling=0)
    target = (12, 20)
    left, top, right, bottom = views.window(size[::-1], target, view)
    assert transforms.draft_factor((left, top, right, bottom), target) > 1
    exact, draft = (
        transforms.decode_window(encoded, target, rule, view).astype(float)
        for rule in ("exact", "draft")
    )
    for colour, pixel in (
        (0, 256 / size[1] * (right - left) / 20),
        (1, 256 / size[0] * (bottom - top) / 12),
    ):
        assert np.abs(draft - exact)[..., colour].max() < 0.5 * pixel + 2


def test_the_drawn_views():
    """Catches draws exchanged, a scale outside the range, and a view that is not random."""
    draw = lambda view, draws: views.drawn({"view": view, "view_scale": (0.5, 0.75)}, draws)
    assert draw("centre", (0.1, 0.2, 0.3)) == View(1.0, None)
    assert draw("short_side", (0.1, 0.2, 0.3)) == View(1.0, (0.2, 0.3))
    assert draw("random_crop", (0.0, 0.2, 0.3)) == View(0.5, (0.2, 0.3))
    assert draw("random_crop", (0.8, 0.2, 0.3)) == View(0.7, (0.2, 0.3))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Images of 64 x 128 pixels; a column's red is twice its number, a row's green four times."""
    root = tmp_path_factory.mktemp("wide")
    return synthetic.write_prepared(root, shapes=[(64, 128)])


def corners(batches, size):
    """(row, column) of each image's first pixel, at the size in which it is read."""
    return {
        (int(image[0, 0, 1]) // 4, int(image[0, 0, 0]) // 2)
        for batch in batches
        for image in batch["image"]
    }


def test_short_side_reaches_every_place(wide):
    """Catches a window that stays in the centre or misses an end, and one that is not whole."""
    cfg = config(wide, image_size=64, flip=False)
    assert corners(take(2, cfg), 64) == {(0, 32)}
    found = corners(take(4, cfg | {"view": "short_side", "batch_size": 25}), 64)
    assert {row for row, _ in found} == {0} and len(found) > 40
    assert min(found)[1] < 4 and 60 < max(found)[1] <= 64


def test_random_crop_has_every_scale_of_its_range(wide):
    """Catches a scale outside the range or only at its ends, and low-res images of another."""
    cfg = config(wide, image_size=16, lowres_size=4, flip=False, batch_size=64)
    scales = []
    for batch in take(2, cfg | {"view": "random_crop", "view_scale": (0.5, 0.75)}):
        green = batch["image"][..., 1].astype(float)
        scales += list((green[:, -1, 0] - green[:, 0, 0]) / 15 * 16 / 256)
        low = batch["image"].reshape(-1, 4, 4, 4, 4, 3).mean(axis=(2, 4))
        assert np.abs(low - batch["lowres"]).max() <= 1
    assert 0.49 < min(scales) < 0.52 and 0.73 < max(scales) < 0.76
    assert np.mean(scales) == pytest.approx(0.625, abs=0.03)


def test_a_view_changes_no_other_choice(wide):
    """Catches draws of the view that come before those of caption, crop and mirror."""
    centre = take(6, config(wide, **SR))
    moved = take(6, config(wide, **SR, view="short_side"))
    for a, b in zip(centre, moved, strict=True):
        assert (a["caption_id"] == b["caption_id"]).all() and (a["index"] == b["index"]).all()
        # The crop's row; whether it is mirrored.
        assert (a["image"][:, 0, 0, 1] == b["image"][:, 0, 0, 1]).all()
        rising = [batch["image"][:, 0, 0, 0] < batch["image"][:, 0, -1, 0] for batch in (a, b)]
        assert (rising[0] == rising[1]).all()
    assert any((a["image"] != b["image"]).any() for a, b in zip(centre, moved, strict=True))


def test_the_first_four_draws_are_caption_crop_and_mirror(wide):
    """Catches draws in another order, with which an older run would not resume."""
    for view in ("centre", "short_side"):
        single = pipeline._plain(config(wide, **SR, view=view), "train")
        for seed in range(4):
            caption, top, left, mirror = np.random.default_rng(seed).random(4).tolist()
            place = np.random.default_rng(seed).random(7).tolist()[5:]
            window = View(1.0, tuple(place)) if view == "short_side" else views.CENTRE
            wanted = single.make(3, caption, (top, left), mirror < 0.5, window)
            got = single.random_map(3, np.random.default_rng(seed))
            assert_same([got], [wanted])


def test_a_crop_is_cut_out_of_the_window(wide):
    """Catches a crop of the image before the window, and a low-res crop of another place."""
    cfg = config(wide, **SR, view="random_crop", view_scale=(1.0, 1.0), flip=False, batch_size=64)
    columns = set()
    for batch in take(2, cfg):
        low = batch["image"].reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4))
        assert np.abs(low - batch["lowres"]).max() <= 1
        columns |= set((batch["image"][:, 0, 0, 0] // 2).tolist())
    assert min(columns) < 10 and max(columns) > 86 and len(columns) > 40


@pytest.mark.parametrize("view", ["short_side", "random_crop"])
def test_evaluation_and_cache_ignore_the_view(wide, view):
    """Catches rows of an evaluation at random places, and cached pixels of another window."""
    cfg = config(wide, **SR, view=view, view_scale=(1.0, 1.0))
    plain = config(wide, **SR)
    assert_same(
        [pipeline.eval_rows(cfg, [2, 0], "train")], [pipeline.eval_rows(plain, [2, 0], "train")]
    )
    assert_same(take(6, cfg | {"cache_mib": 8}), take(6, cfg))
    single = pipeline._plain(cfg | {"cache_mib": 8}, "train")
    single.make(0, 0.0, (0.0, 0.0), False, View(1.0, (0.0, 0.0)))
    assert single.cache.get((None, 0)) is None
    single.make(0, 0.0, (0.0, 0.0), False)
    assert single.cache.get((None, 0)) is not None


def test_too_small_for_a_window_is_one_clear_line(wide):
    """Catches an image that is enlarged, and a range whose ends are exchanged."""
    cfg = config(wide, image_size=48, view="random_crop")
    assert next(iter(take(1, cfg | {"view_scale": (0.75, 1.0)})))["image"].shape[1] == 48
    with pytest.raises(ValueError, match="0.74 need 65 .* prepare with --min_size 65$") as error:
        pipeline.batches(cfg | {"view_scale": (0.74, 1.0)}, 0, 0)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="give the smaller number first"):
        pipeline.batches(cfg | {"view_scale": (1.0, 0.9)}, 0, 0)
    with pytest.raises(ValueError, match="data.image_size is 65: prepare with --min_size 65"):
        pipeline.batches(cfg | {"view": "short_side", "image_size": 65}, 0, 0)
    list(itertools.islice(pipeline.batches(cfg | {"view_scale": (0.75, 0.75)}, 0, 0), 1))
