"""The pipeline: the content of a batch, which depends on (seed, step) alone."""

import itertools
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from imagen_jax.data import examples, pipeline, records
from tests.data import synthetic


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return synthetic.write_prepared(tmp_path_factory.mktemp("prepared"))


def config(path, **changes):
    base = {
        "path": str(path),
        "image_size": 16,
        "lowres_size": 0,
        "crop_size": 0,
        "text_length": 6,
        "batch_size": 4,
        "workers": 0,
        "flip": True,
        "caption": "random",
        "cache_mib": 0,
    }
    return base | synthetic.SQUARES | changes


SR = {"image_size": 64, "lowres_size": 16, "crop_size": 32}


def take(count, cfg, seed=0, start_step=0, rows=None):
    reader = pipeline.batches(cfg, seed, start_step, rows=rows)
    try:
        return list(itertools.islice(reader, count))
    finally:
        reader.close()


def assert_same(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(
                a[name].astype(np.float32), b[name].astype(np.float32), err_msg=name
            )


def test_shapes_and_types(path):
    """Catches a missing key, float images, text of another type, other rows."""
    batch = take(1, config(path, **SR), rows=(2, 3))[0]
    shapes = {name: (value.shape, value.dtype) for name, value in batch.items()}
    assert shapes == {
        "image": ((2, 32, 32, 3), np.uint8),
        "lowres": ((2, 8, 8, 3), np.uint8),
        "text": ((2, 6, synthetic.DIM), ml_dtypes.bfloat16),
        "text_mask": ((2, 6), np.bool_),
        "index": ((2,), np.int64),
        "caption_id": ((2,), np.int64),
    }
    assert "lowres" not in take(1, config(path))[0]


# Rows of the global batch of 4 that 1, 2 and 4 processes read; in the last, a process's devices do
# not hold neighbouring rows.
SHARES = {
    "1": [(0, 1, 2, 3)],
    "2": [(0, 1), (2, 3)],
    "4": [(0,), (1,), (2,), (3,)],
    "2 apart": [(0, 2), (1, 3)],
}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_global_batch_does_not_depend_on_processes(path, shares):
    """Catches processes that shuffle alone, read others' rows, or key choices by their share."""
    whole = take(6, config(path, **SR))
    parts = [take(6, config(path, **SR), rows=rows) for rows in shares]
    order = np.argsort(np.concatenate(shares))
    joined = [
        {k: np.concatenate([part[n][k] for part in parts])[order] for k in whole[n]}
        for n in range(6)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("start_step", [0, 3])
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_processes_read_every_row_once_an_epoch_together(path, shares, start_step):
    """Catches rows lost or read twice by several processes.

    An epoch (10 images) ends inside a batch, and a resume changes the number of processes.
    """
    before = take(start_step, config(path))
    after = [
        take(10 - start_step, config(path), start_step=start_step, rows=rows) for rows in shares
    ]
    steps = [batch["index"].tolist() for batch in before] + [
        [i for part in after for i in part[n]["index"].tolist()] for n in range(10 - start_step)
    ]
    stream = [
        steps[n][order]
        for n in range(10)
        for order in (np.argsort(np.concatenate(shares)) if n >= start_step else range(4))
    ]
    assert (np.sort(np.reshape(stream, (4, 10)), axis=1) == np.arange(10)).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers(path, workers):
    """Catches random state of a worker, and batches in the order in which they are finished."""
    assert_same(
        take(5, config(path, **SR, workers=workers), start_step=1),
        take(5, config(path, **SR), start_step=1),
    )


def test_start_step_is_skipping(path):
    """Catches a resume that restarts the epoch, or choices counted from the start of the run."""
    assert_same(take(3, config(path, **SR), start_step=4), take(7, config(path, **SR))[4:])


def test_seed_changes_order_and_choices(path):
    """Catches an unused seed, and one that does not repeat its batches."""
    assert_same(take(2, config(path), seed=3), take(2, config(path), seed=3))
    first, second = take(2, config(path), seed=3), take(2, config(path), seed=4)
    assert any((a["index"] != b["index"]).any() for a, b in zip(first, second, strict=True))


def test_every_row_once_an_epoch(path):
    """Catches sampling with replacement, a dropped last batch, the same order every epoch."""
    rows = np.concatenate([batch["index"] for batch in take(10, config(path))])
    epochs = rows.reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_captions_are_covered_and_belong_to_their_image(path):
    """Catches only first captions, and captions of another image or another caption_id."""
    batches = take(40, config(path))
    rows, ids = (
        np.concatenate([batch[name] for batch in batches]) for name in ("index", "caption_id")
    )
    assert set(ids) == set(range(20)) and (ids // 2 == rows).all()
    for batch in batches[:5]:
        for text, mask, caption_id in zip(
            batch["text"], batch["text_mask"], batch["caption_id"], strict=True
        ):
            length = 1 + caption_id % 6
            np.testing.assert_array_equal(text[:length], synthetic.embedding(caption_id, length))
            assert mask.sum() == length and mask[:length].all() and not text[length:].any()
    assert (take(1, config(path, caption="first"))[0]["caption_id"] % 2 == 0).all()


def test_choices_are_independent_of_one_another(path):
    """Catches an ablation of one random choice that changes another."""
    full, still = take(4, config(path, **SR)), take(4, config(path, **SR, flip=False))
    single = take(4, config(path, **SR, caption="first"))
    for a, b, c in zip(full, still, single, strict=True):
        assert (a["caption_id"] == b["caption_id"]).all() and (a["image"] == c["image"]).all()
        mirrored = (a["image"] == b["image"][:, :, ::-1]).all(axis=(1, 2, 3))
        assert (mirrored | (a["image"] == b["image"]).all(axis=(1, 2, 3))).all()
    assert any((a["image"] != b["image"]).any() for a, b in zip(full, still, strict=True))


def test_crop_and_lowres_show_the_same_window(path):
    """Catches crops at different places or scales, and a low-res picture made from the crop."""
    corners = set()
    for batch in take(20, config(path, **SR, flip=False)):
        for image, lowres in zip(
            batch["image"].astype(int), batch["lowres"].astype(float), strict=True
        ):
            window = image.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
            assert np.abs(window - lowres).max() <= 0.5
            assert (np.diff(image[0, :, 0]) == 4).all() and (np.diff(image[:, 0, 1]) == 4).all()
            corners.add((image[0, 0, 1] // 4, image[0, 0, 0] // 4))
    rows, columns = ({corner[axis] for corner in corners} for axis in (0, 1))
    assert rows == columns == set(range(0, 33, 4))


def test_flip_mirrors_target_and_lowres_together(path):
    """Catches only one of the pair mirrored, or mirrored top to bottom."""
    seen = set()
    for batch in take(6, config(path, image_size=64, lowres_size=16)):
        for image, lowres in zip(
            batch["image"].astype(int), batch["lowres"].astype(int), strict=True
        ):
            seen.add(bool(image[0, 0, 0] > image[0, -1, 0]))
            assert (image[0, 0, 0] > image[0, -1, 0]) == (lowres[0, 0, 0] > lowres[0, -1, 0])
            assert image[0, 0, 1] < image[-1, 0, 1]
    assert seen == {True, False}


def test_cache_changes_no_batch(path):
    """Catches cached pixels that are cropped, mirrored or changed in place, and cached captions."""
    assert_same(take(12, config(path, **SR, cache_mib=8)), take(12, config(path, **SR)))
    assert_same(take(12, config(path, **SR, cache_mib=8, workers=2)), take(12, config(path, **SR)))


def test_cache_decodes_once_and_keeps_its_limit(path, monkeypatch):
    """Catches a cache that is never hit, and one that grows past its limit."""
    decoded = []
    original = pipeline.transforms.decode_window

    def decode(*args):
        decoded.append(
            threading.current_thread()
        )  # a reader closed by an earlier test may still finish a batch
        return original(*args)

    monkeypatch.setattr(pipeline.transforms, "decode_window", decode)
    cached = config(path, image_size=64, cache_mib=1)
    single = pipeline._plain(cached, "train")
    for row in [0, 1, 0, 1]:
        single.make(row, 0.0, (0.0, 0.0), False)
    assert decoded.count(threading.main_thread()) == 2
    small = examples.PixelCache(3 * 16 * 16 * 3)
    for row in range(5):
        small.put(row, np.zeros((16, 16, 3), np.uint8), (0,))
    assert [small.get(row) is not None for row in range(5)] == [True, True, True, False, False]


def test_eval_rows_are_plain(path):
    """Catches random choices, corner crops or rows of the wrong split in evaluation."""
    batch = pipeline.eval_rows(config(path, **SR), [2, 0], "heldout")
    assert batch["index"].tolist() == [2, 0] and batch["caption_id"].tolist() == [0, 0]
    assert (batch["image"][:, 0, 0] == [[64, 64, 102], [64, 64, 100]]).all()
    whole = pipeline.eval_rows(config(path, image_size=64), [3], "train")
    assert (whole["image"][0] == synthetic.gradient(64, 3)).all()


def test_one_image_is_enough(tmp_path):
    """Catches a shuffle or an epoch that needs more rows than a batch has."""
    single = synthetic.write_prepared(tmp_path, images=1, heldout=0)
    assert (take(3, config(single))[2]["index"] == 0).all()
    with pytest.raises(ValueError, match="no images in split 'heldout'"):
        pipeline.batches(config(single), 0, 0, split="heldout")


@pytest.mark.parametrize("workers", [0, 2])
def test_close_leaves_nothing_running(path, workers):
    """Catches worker processes or reading threads that survive close()."""
    import multiprocessing

    for _ in range(
        2
        # the first reader starts Grain's one thread pool for unlinking shared memory, which lives
        # as long as the process
    ):
        threads = threading.active_count()
        reader = pipeline.batches(config(path, workers=workers), 0, 0)
        next(reader)
        reader.close()
    deadline = time.monotonic() + 10
    while (
        multiprocessing.active_children() or threading.active_count() > threads
    ) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children() and threading.active_count() <= threads


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shard_is_a_clear_error(tmp_path, workers):
    """Catches a flipped bit read as data, skipped, or reported without the file's name."""
    root = synthetic.write_prepared(tmp_path, shard_rows=100)
    shard = root / records.shard_name("images", "train", 0, 1)
    content = bytearray(shard.read_bytes())
    content[1500] ^= 1  # the rest of so small a file is padding
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"images-train\.array_record-00000-of-00001 is damaged"):
        take(10, config(root, workers=workers))
    with pytest.raises(ValueError, match="checksum differs"):
        records.Prepared(root).verify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 128}, "side of only 64 pixels, but data.image_size is 128"),
        ({"text_length": 5}, "captions of up to 6 tokens"),
        ({"image_size": 64, "lowres_size": 24}, "not a multiple"),
        (
            {"image_size": 64, "lowres_size": 16, "crop_size": 30},
            "is not a multiple of data.image_size . data.lowres_size, 4",
        ),
        ({"crop_size": 32}, "larger than data.image_size"),
    ],
)
def test_config_that_does_not_fit_is_one_clear_line(path, changes, message):
    """Catches enlarged images, cut features and crops that do not align, all accepted."""
    with pytest.raises(ValueError, match=message) as error:
        pipeline.batches(config(path, **changes), 0, 0)
    assert "\n" not in str(error.value)


def test_the_field_decode_reaches_training_and_evaluation(path, monkeypatch):
    """Catches a decoder that ignores the field in batches or in the rows of an evaluation."""
    seen = []
    original = pipeline.transforms.decode_window

    def decode(encoded, size, rule, view):
        if threading.current_thread() is threading.main_thread():
            seen.append(rule)
        return original(encoded, size, rule, view)

    monkeypatch.setattr(pipeline.transforms, "decode_window", decode)
    for rule in ("exact", "draft"):
        cfg = config(path, decode=rule)
        pipeline._plain(cfg, "train").make(0, 0.0, (0.0, 0.0), False)
        pipeline.eval_rows(cfg, [0], "heldout")
        pipeline.eval_images(cfg, [0], "heldout")
    assert seen == ["exact"] * 3 + ["draft"] * 3
