"""One collection in every layout gives the same prepared data, record for record."""

import hashlib

import numpy as np
import pytest

from imagen_jax.data import records
from imagen_jax.data.prepare import ingest, passes
from imagen_jax.data.prepare.checks import check
from imagen_jax.encoders_in_turn import Encoders
from tests.data.sources import layouts
from tests.data.sources.layouts import Picture
from tests.data.synthetic_source import SETTINGS, FakeEncoder

LAYOUT = pytest.mark.parametrize("layout", layouts.LAYOUTS.values(), ids=layouts.LAYOUTS.keys())
REAL = layouts.collection(8)[0].data


def stored(output):
    """[(SHA-256, image, height, width, texts)] by SHA-256, and {text: features}."""
    prepared = records.Prepared(output)
    prepared.verify()
    rows = [prepared.captions()[i] for i in range(len(prepared.captions()))]
    assert prepared.num_images("heldout") == 0
    images = []
    for i in range(prepared.num_images("train")):
        row = prepared.images("train")[i]
        texts = sorted(rows[at].text for at in row.caption_ids)
        digest = hashlib.sha256(row.image).hexdigest()
        images.append((digest, row.image, row.height, row.width, texts))
    return sorted(images), {row.text: row.embedding for row in rows}, len(rows)


def expected(pictures):
    """Images by SHA-256, computed without a source."""
    twin, kept = pictures[5], {}
    for i, picture in enumerate(pictures):
        if i not in (2, 5):
            side = 16 + i % 7
            kept[i] = (picture.data, side, side, {*picture.captions})
    kept[1][3].update(twin.captions)
    rows = [
        (hashlib.sha256(data).hexdigest(), data, height, width, sorted(texts))
        for data, height, width, texts in kept.values()
    ]
    return sorted(rows)


def compare(layout, count, tmp_path, how=ingest.ingest, **changes):
    """Prepares a collection in a layout and compares it with what was written.

    how: the engine, as for `passes.prepare`.
    """
    pictures = layouts.collection(count)
    (tmp_path / "in").mkdir()
    source = layouts.opened(*layout(tmp_path / "in", pictures))
    encoder = FakeEncoder(16)
    settings = passes.Settings(**SETTINGS | {"min_size": 8} | changes)
    manifest = passes.prepare(source, Encoders.single(encoder), tmp_path / "out", settings, how)
    images, captions, rows = stored(tmp_path / "out")
    assert images == expected(pictures)
    texts = {text for _, _, _, _, found in images for text in found}
    assert captions.keys() == texts and rows == len(texts)
    for text, features in captions.items():
        np.testing.assert_array_equal(features, encoder.features(text))
    usable = [text for i, p in enumerate(pictures) if i != 2 for text in p.captions]
    assert manifest["counts"]["skipped"] == {
        "small_image": 1,
        "duplicate_image": 1,
        "duplicate_caption": len(usable) - len(texts),
    }


@LAYOUT
def test_every_layout_gives_the_same_stores(layout, tmp_path):
    """Catches an image or caption that a layout loses, changes or gives to another item."""
    compare(layout, 10, tmp_path)


@pytest.mark.slow
@LAYOUT
def test_sixty_pictures(layout, tmp_path):
    """Catches losses at the borders of row groups and shards."""
    compare(layout, 60, tmp_path)


@pytest.mark.slow
@pytest.mark.long
@LAYOUT
def test_two_thousand_pictures(layout, tmp_path):
    """Catches losses at the borders of chunks, and between processes."""
    compare(layout, 2000, tmp_path, processes=2, shard_size=256)


def by_two_beam_workers():
    """The engine of `passes.prepare` on Beam's own runner."""
    pytest.importorskip("apache_beam", reason="needs the extra `beam`")
    from imagen_jax.data.prepare import beam_ingest

    workers = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    return beam_ingest.on_runner(["--runner=DirectRunner", *workers])


@pytest.mark.slow
@pytest.mark.parametrize("layout", layouts.ONE_OF_EACH_KIND.values(), ids=layouts.ONE_OF_EACH_KIND)
def test_sixty_pictures_with_beam(layout, tmp_path):
    """Catches a source that does not survive the way to a worker of Beam."""
    compare(layout, 60, tmp_path, by_two_beam_workers())


@pytest.mark.slow
@pytest.mark.long
@LAYOUT
def test_two_thousand_pictures_with_beam(layout, tmp_path):
    """Catches losses at the borders of blocks, and between workers."""
    compare(layout, 2000, tmp_path, by_two_beam_workers(), shard_size=256)


BAD = {
    "no bytes": (b"", ["x"], "broken_image"),
    "a page": (b"<html>404 Not Found</html>", ["x"], "broken_image"),
    "a cut image": (REAL[: len(REAL) // 2], ["x"], "broken_image"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', ["x"], "broken_image"),
    "a small image": (layouts.collection(8)[2].data, ["x"], "small_image"),
    "a blank caption": (REAL, [" \u00a0\t"], "no_caption"),
    "an invisible caption": (REAL, ["\u200b\ufeff"], "no_caption"),
    "blank captions": (REAL, [" ", "\u200b"], "no_caption"),
    "a bad image and caption": (b"", [" "], "broken_image"),
}


@LAYOUT
def test_a_bad_picture_has_the_same_reason_in_every_layout(layout, tmp_path):
    """Catches a layout that fails on a bad picture, or that calls it something else."""
    pictures = layouts.collection(8)[6:]
    for i, (data, captions, _) in enumerate(BAD.values()):
        pictures.insert(1, Picture(f"{7 + i:09d}", "jpg", data, captions))
    pictures = sorted(
        (Picture(f"{i:09d}", p.suffix, p.data, p.captions) for i, p in enumerate(pictures)),
        key=lambda picture: picture.key,
    )
    source = layouts.opened(*layout(tmp_path, pictures))
    found = [check(source[i], 8).reason for i in range(len(source))]
    assert found == ["", *(reason for _, _, reason in reversed(BAD.values())), ""]
