"""Batches from several prepared directories and from buckets of aspect ratios."""

import collections
import shutil
import tempfile

import numpy as np
import pytest

from imagen_jax import stage_sizes
from imagen_jax.data import buckets, examples, image_sizes, index_files, pipeline, records, sets
from tests.data import synthetic
from tests.data.test_pipeline import SHARES, assert_same, config, take

# Height and width of images in turn: 3 of 5 are wide, the others high or square.
SHAPES = [(64, 96), (96, 64), (64, 100), (70, 70), (66, 99)]
BUCKETS = ((16, 24), (24, 16), (16, 16))


@pytest.fixture(scope="module", autouse=True)
def temporary(tmp_path_factory):
    """An empty directory for temporary files; sizes are read and sorted in several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        patch.setattr(image_sizes, "CHUNK", 3)
        patch.setattr(image_sizes, "ROWS", 4)
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    root = tmp_path_factory.mktemp("first") / "data"
    return synthetic.write_prepared(root, images=10, shapes=SHAPES)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    root = tmp_path_factory.mktemp("second") / "data"
    return synthetic.write_prepared(root, images=7, shapes=[(96, 160)])


@pytest.fixture
def rows_only(monkeypatch):
    """Examples without pictures and text, for tests that need many: sizes of images instead."""

    def make(self, row, *_):
        return {
            "index": np.int64(row),
            "set": np.int64(self.set or 0),
            "size": np.array(self.target),
        }

    monkeypatch.setattr(examples.Examples, "make", make)


def mixed(*sets, **changes):
    return config("", mixture=tuple((str(path), weight) for path, weight in sets), **changes)


def kinds(first, second):
    """Configs of every new kind of batch, by name."""
    both = (first, 3.0), (second, 1.0)
    sizes = {"image_size": 16, "lowres_size": 4}
    return {
        "mixture": mixed(*both, **sizes),
        "buckets": config(first, **sizes, buckets=BUCKETS),
        "all": mixed(*both, **sizes, buckets=BUCKETS, view="random_crop", view_scale=(0.5, 1.0)),
    }


@pytest.mark.parametrize("kind", ["mixture", "buckets", "all"])
def test_batches_do_not_depend_on_processes_or_restarts(first, second, kind):
    """Catches state from before a restart, or of a process's share of the rows."""
    cfg = kinds(first, second)[kind]
    whole = take(5, cfg)
    assert_same(take(2, cfg, start_step=3), whole[3:])
    assert_same(take(5, cfg | {"cache_mib": 4}), whole)
    for name in ("2", "4", "2 apart"):
        shares = SHARES[name]
        parts = [take(5, cfg, rows=rows) for rows in shares]
        order = np.argsort(np.concatenate(shares))
        joined = [
            {name: np.concatenate([part[n][name] for part in parts])[order] for name in whole[n]}
            for n in range(5)
        ]
        assert_same(joined, whole)
    other = take(5, cfg, seed=1)
    assert any((a["index"] != b["index"]).any() for a, b in zip(whole, other, strict=True))


@pytest.mark.slow
def test_batches_do_not_depend_on_workers(first, second):
    """Catches state of a worker, and rows or sizes that do not reach it."""
    cfg = kinds(first, second)["all"]
    whole = take(5, cfg)
    assert_same(take(4, cfg | {"workers": 2, "cache_mib": 4}, start_step=1), whole[1:])


def test_sets_have_their_shares_and_epochs_of_their_own(first, second, rows_only):
    """Catches weights by size, sets exchanged, rows left out, and an order that depends on the
    weights of other sets.
    """
    batches = take(70, mixed((first, 3.0), (second, 1.0)))
    found, rows = (np.concatenate([batch[name] for batch in batches]) for name in ("set", "index"))
    assert found.dtype == rows.dtype == np.int64
    assert abs((found == 0).sum() - 210) <= 1
    for which, size in ((0, 10), (1, 7)):
        own = rows[found == which]
        epochs = own[: len(own) // size * size].reshape(-1, size)
        assert len(epochs) >= 10 and (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert len(set(map(tuple, epochs))) == len(epochs)
    evenly = take(70, mixed((first, 1.0), (second, 1.0)))
    other = np.concatenate([batch["index"][batch["set"] == 0] for batch in evenly])
    assert (other == rows[found == 0][: len(other)]).all()


def test_sets_of_one_size_have_different_orders(first, tmp_path, rows_only):
    """Catches one seed for all sets."""
    shutil.copytree(first, tmp_path / "copy")
    batches = take(10, mixed((first, 1.0), (tmp_path / "copy", 1.0)))
    found, rows = (np.concatenate([batch[name] for batch in batches]) for name in ("set", "index"))
    assert (rows[found == 0] != rows[found == 1]).any()


def test_rows_belong_to_their_set(first, second):
    """Catches images or captions of one set under the name of another."""
    pictures = {
        which: pipeline.eval_images(config(path), range(count), "train").astype(int)
        for which, (path, count) in enumerate([(first, 10), (second, 7)])
    }
    for batch in take(5, mixed((first, 1.0), (second, 1.0), flip=False)):
        for which, row, image in zip(batch["set"], batch["index"], batch["image"], strict=True):
            assert (image == pictures[int(which)][row]).all()
        assert (batch["caption_id"] // 2 == batch["index"]).all()
        assert batch["set"].dtype == np.int64
    assert "set" not in take(1, config(first))[0]


def test_a_mixture_of_one_set_is_a_mixture(first):
    """Catches a lone set without the field `set`, or with rows left out."""
    batches = take(3, mixed((first, 0.3)))
    assert not any(batch["set"].any() for batch in batches)
    assert sorted(np.concatenate([b["index"] for b in batches])[:10]) == list(range(10))


@pytest.mark.parametrize(
    "path, mixture, message",
    [
        ("a", (("b", 1.0),), "are both given: set data.path = ''"),
        ("", (), "are both empty: give the directory"),
        ("", (("b", 1.0), ("./b", 2.0)), r"has \./b twice: give each directory once"),
        ("", (("b", 0.0),), "has the weight 0 for b: give a positive one"),
        ("", (("b", 1.0), ("c", -2.0)), "has the weight -2 for c"),
        ("", (("", 1.0),), "has an empty path"),
        ("", ((" ", 1.0),), "has an empty path .' '.: give a directory"),
        (" ", (), "data.path is empty .' '.: give a directory"),
        ("", (("b", 1e308), ("c", 1e308)), "have a sum that is not finite: divide them"),
        ("", (("missing", 1.0),), "missing does not exist"),
    ],
)
def test_wrong_sources_are_one_clear_line(path, mixture, message):
    """Catches a mixture that is ignored, and a set that is drawn never or twice as often."""
    with pytest.raises(ValueError, match=message) as error:
        pipeline.batches(config(path, mixture=mixture), 0, 0)
    assert "\n" not in str(error.value)


def test_names_of_sets_are_unique(first, second):
    """Catches two sets whose numbers are recorded under one name, and a section with both."""
    cfg = mixed((first, 1.0), (second, 1.0))
    found = sets.data_sets(cfg)
    assert found[0] == sets.DataSet("data", str(first), 1.0)
    assert found[1] == sets.DataSet("data-2", str(second), 1.0)
    assert pipeline.open_prepared(found[1].config(cfg)).num_images("train") == 7
    assert sets.data_sets(config(first)) == (sets.DataSet("", str(first), 1.0),)
    with pytest.raises(ValueError, match="read one of them at a time"):
        pipeline.eval_rows(cfg, [0], "train")


def test_the_identity_of_a_mixture_depends_on_its_order(first, second):
    """Catches data that change unnoticed between a run and its resume."""
    one, other = (pipeline.identity(config(path)) for path in (first, second))
    assert one == {"manifest_hash": records.open_once(first).hash}
    both = pipeline.identity(mixed((first, 1.0), (second, 1.0)))
    assert both["mixture_hashes"] == [one["manifest_hash"], other["manifest_hash"]]
    swapped = pipeline.identity(mixed((second, 1.0), (first, 1.0)))
    hashes = {content["manifest_hash"] for content in (one, other, both, swapped)}
    assert len(hashes) == 4


def test_the_nearest_bucket():
    """Catches ratios compared without the logarithm, and ties that depend on rounding."""
    sizes = np.array([(64, 96), (96, 64), (64, 64), (100, 300), (64, 79), (64, 78)], np.uint32)
    assert buckets.nearest(sizes, BUCKETS).tolist() == [0, 1, 2, 0, 0, 2]
    square = np.array([(side, side) for side in range(1, 500)], np.uint32)
    assert not buckets.nearest(square, ((24, 16), (16, 24))).any()
    assert not buckets.nearest(square, ((7, 3), (3, 7))).any()
    # Between 1:1 and 4:1, 2:1 is a tie.
    assert buckets.nearest(
        np.array([(10, 20), (10, 19)], np.uint32), ((8, 32), (8, 8))
    ).tolist() == [0, 1]


def test_the_shapes_of_buckets(first):
    """Catches mixed sizes in a batch, an image in another bucket, and another low-res size."""
    sizes = set()
    for batch in take(6, config(first, image_size=16, lowres_size=4, buckets=BUCKETS)):
        height, width = batch["image"].shape[1:3]
        assert batch["image"].shape == (4, height, width, 3)
        assert batch["lowres"].shape == (4, height // 4, width // 4, 3)
        assert {bucket_of(row) for row in batch["index"]} == {(height, width)}
        sizes.add((height, width))
    assert sizes == set(BUCKETS)


def test_buckets_have_the_shares_of_their_images(first, rows_only):
    """Catches shares that are not those of the images, images left out of an epoch, and buckets
    with the same order.
    """
    names = [bucket_of(i) for i in range(10)]
    seen = collections.defaultdict(list)
    for batch in take(50, config(first, image_size=16, buckets=BUCKETS)):
        ((height, width),) = {tuple(size) for size in batch["size"].tolist()}
        seen[height, width] += batch["index"].tolist()
    assert {size: len(rows) // 4 for size, rows in seen.items()} == {
        (16, 24): 30,
        (24, 16): 10,
        (16, 16): 10,
    }
    high, square = (np.array(seen[size]) for size in ((24, 16), (16, 16)))  # two images each
    assert ((high == high.max()) != (square == square.max())).any()
    for size, rows in seen.items():
        own = names.count(size)
        epochs = np.array(rows[: len(rows) // own * own]).reshape(-1, own)
        assert all(len(set(epoch)) == own for epoch in epochs.tolist())


def bucket_of(i):
    """The bucket of image i of `first`, by hand."""
    return [(16, 24), (24, 16), (16, 24), (16, 16), (16, 24)][i % 5]


def test_pixels_of_a_bucket_are_those_of_the_window(first):
    """Catches a squeezed picture: the centre window of 64 x 100 pixels is 64 x 96."""
    cfg = config(first, image_size=16, buckets=BUCKETS, flip=False)
    for batch in take(10, cfg):
        for image, row in zip(batch["image"], batch["index"], strict=True):
            if row == 2:
                whole = synthetic.gradient((64, 100), 2)[:, 2:98].astype(float)
                wanted = whole.reshape(16, 4, 24, 4, 3).mean(axis=(1, 3))
                assert np.abs(image - wanted).max() <= 1
                return
    raise AssertionError("image 2 did not come")


def test_sets_mix_inside_buckets_by_their_weights(first, second, rows_only):
    """Catches buckets weighted by images alone, and a set's weight applied once more inside."""
    cfg = mixed((first, 1.0), (second, 3.0), buckets=BUCKETS[:2])
    shares = {share.size: share for share in pipeline.bucket_shares(cfg)}
    # Of `first`, 6 of 10 are wide and 2 are squares, which tie and go to the first bucket.
    assert shares[16, 24].images == 8 + 7 and shares[24, 16].images == 2
    assert shares[16, 24].batches == pytest.approx(0.25 * 0.8 + 0.75)
    assert str(shares[24, 16]) == "bucket 24x16: 2 images, 5 % of the batches"
    steps = take(60, cfg)
    wide = [batch["set"] for batch in steps if batch["size"][0, 0] == 16]
    assert len(wide) == 57
    assert np.mean(wide) == pytest.approx(0.75 / 0.95, abs=0.01)
    assert not any(batch["set"].any() for batch in steps if batch["size"][0, 0] == 24)


def test_a_bucket_without_images_never_comes(second):
    """Catches an empty stream, and a step without a batch."""
    cfg = config(second, buckets=((24, 16), (16, 24)))
    assert [share.size for share in pipeline.bucket_shares(cfg)] == [(16, 24)]
    assert {batch["image"].shape for batch in take(5, cfg)} == {(4, 16, 24, 3)}
    assert stage_sizes.of_images(cfg) == ((24, 16), (16, 24))
    assert stage_sizes.of_images(config(second)) == ((16, 16),)
    assert pipeline.bucket_shares(config(second)) == ()


def test_evaluation_reads_squares(first):
    """Catches rows of an evaluation in the size of a bucket."""
    plain, bucketed = config(first), config(first, buckets=BUCKETS)
    rows = [pipeline.eval_rows(cfg, [0, 1, 3], "train") for cfg in (plain, bucketed)]
    assert_same(rows[1:], rows[:1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"buckets": ((64, 96), (96, 64), (80, 80))}, "2 of 10 images that do not cover the size"),
        (
            {"buckets": ((60, 90), (90, 60), (60, 60)), "view": "random_crop"},
            "10 of 10 images .* at data.view_scale.0. = 0.8: .* with sides of 113 or more",
        ),
        ({"buckets": BUCKETS, "crop_size": 8}, "data.crop_size = 8 are both set"),
        ({"buckets": BUCKETS, "lowres_size": 2}, ""),
        ({"buckets": ((16, 20),), "lowres_size": 2}, r"\(16, 20\), whose low-res size is not"),
        ({"buckets": ((16, 24), (16, 24))}, "has a size twice"),
        ({"buckets": ((0, 24),)}, "sides of 1 pixel or more"),
    ],
)
def test_buckets_that_do_not_fit_are_one_clear_line(first, changes, message):
    """Catches enlarged images, low-res sizes that are rounded, and crops that are ignored."""
    cfg = config(first, **changes)
    if not message:
        assert pipeline.bucket_shares(cfg)
        return
    with pytest.raises(ValueError, match=message) as error:
        pipeline.bucket_shares(cfg)
    assert "\n" not in str(error.value)


def test_the_file_of_sizes(tmp_path, first, monkeypatch):
    """Catches sizes of other rows, a changed manifest hash, a file that is read again and again,
    and one of other images that is believed.
    """
    root = tmp_path / "data"
    shutil.copytree(first, root, ignore=lambda *_: {"sizes-train.npy"})
    before = records.Prepared(root).hash
    sizes = image_sizes.open_sizes(records.Prepared(root), "train")
    file = root / "images" / "sizes-train.npy"
    assert [tuple(size) for size in np.load(file)] == 2 * SHAPES
    assert [start for start, _ in sizes.chunks()] == [0, 4, 8]
    assert records.Prepared(root).hash == before
    assert not list(root.glob("images/.*"))
    monkeypatch.setattr(image_sizes, "_write", None)
    cfg = config(root, buckets=BUCKETS)
    take(1, cfg)  # nothing is written
    monkeypatch.undo()
    wrong = np.load(file)
    # A reader of above may still map the file, so it is replaced, not written over.
    file.unlink()
    np.save(file, wrong[::-1])
    with pytest.raises(ValueError, match=r"does not belong to the images: row \d is \d+x\d+, not"):
        take(10, cfg)
    file.unlink()
    np.save(file, wrong[:-1])
    with pytest.raises(ValueError, match="the sizes of 9 images, but there are 10: remove it"):
        image_sizes.open_sizes(records.Prepared(root), "train")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="sizes-train.npy is damaged .*: remove it"):
        image_sizes.open_sizes(records.Prepared(root), "train")


def test_sizes_that_are_written_again_give_other_buckets(tmp_path, first):
    """Catches rows that were sorted into buckets by a wrong file of sizes, after its removal."""
    root = tmp_path / "data"
    shutil.copytree(first, root, ignore=lambda *_: {"sizes-train.npy"})
    cfg = config(root, buckets=BUCKETS[:2], image_size=16)
    file = root / "images" / "sizes-train.npy"
    np.save(file, np.array(2 * SHAPES, np.uint32)[::-1])
    with pytest.raises(ValueError, match="remove it; it is written again"):
        take(10, cfg)
    file.unlink()
    for batch in take(10, cfg):
        assert (batch["index"] % 5 == 1).all() == (batch["image"].shape[1] == 24)


def file_of_rows():
    """The only file of rows of buckets."""
    (file,) = index_files.cache_directory().glob("buckets-*.npy")
    return file


@pytest.mark.parametrize("damage", ["zeros", "short", "text", "counts", "shuffled"])
def test_rows_that_are_damaged_are_written_again(
    first, damage, tmp_path, monkeypatch, rows_only, caplog
):
    """Catches batches of image 0 alone, or a traceback, from a damaged file of rows."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cfg = config(first, buckets=BUCKETS, image_size=16)
    before = take(5, cfg)
    assert "is damaged" not in caplog.text
    file = file_of_rows()
    content, rows = file.read_bytes(), np.load(file)
    assert len(rows) == 10 + 3 + 8
    rows[{"zeros": slice(10), "shuffled": slice(10)}.get(damage, slice(10, 13))] = (
        rows[:10][::-1] if damage == "shuffled" else 0
    )
    file.unlink()
    if damage == "text":
        file.write_text("rows")
    else:
        np.save(file, rows)
    if damage == "short":
        file.write_bytes(content[:-4])
    assert_same(before, take(5, cfg))
    assert f"{file} is damaged; it is written again" in caplog.text
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("row", "message"),
    [(1, r"row 1 is 96x64, not an image of bucket 16x24; remove it"), (99, "is damaged: remove")],
)
def test_a_row_of_another_bucket_is_one_clear_line(first, tmp_path, monkeypatch, row, message):
    """Catches an image in a wrong bucket after the file of rows was compared."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(buckets, "_is_intact", lambda *_: True)
    cfg = config(first, buckets=BUCKETS, image_size=16)
    take(1, cfg)
    file = file_of_rows()
    rows = np.load(file)
    rows[:6] = row
    file.unlink()
    np.save(file, rows)
    with pytest.raises(ValueError, match=message):
        take(9, cfg)


def test_a_read_only_directory_is_enough(tmp_path, first, monkeypatch):
    """Catches data on a read-only disk that cannot be trained on."""
    root = tmp_path / "data"
    shutil.copytree(first, root, ignore=lambda *_: {"sizes-train.npy"})
    original = image_sizes.build_once

    def build(path, write):
        if root in path.parents:
            raise OSError(30, "Read-only file system", str(path))
        original(path, write)

    monkeypatch.setattr(image_sizes, "build_once", build)
    sizes = image_sizes.open_sizes(records.Prepared(root), "train")
    assert sizes.mapped.path.parent == index_files.cache_directory() and len(sizes) == 10
