"""Prepared data on disk: TFDS opens it without TensorFlow, and damage is refused."""

import builtins
import errno
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import weakref

import ml_dtypes
import numpy as np
import pytest
from array_record.python import array_record_module

from imagen_jax import storage
from imagen_jax.data import caption_records, manifest_file, records, shard_reader
from imagen_jax.data.caption_records import CaptionRow
from imagen_jax.text_inputs import TextInput
from tests.data import synthetic


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return synthetic.write_prepared(tmp_path_factory.mktemp("prepared"))


def test_rows_come_back(path):
    """Catches a row from the wrong shard, changed bytes, padded or converted embeddings."""
    prepared = records.Prepared(path)
    images, captions = prepared.images("train"), prepared.captions()
    assert (len(images), len(captions), len(prepared.images("heldout"))) == (10, 20, 3)
    for row in range(10):
        image = images[row]
        assert image.image == synthetic.encode(synthetic.gradient(64, row))
        assert (image.id, image.caption_ids, image.height) == (
            f"image-{row}",
            (2 * row, 2 * row + 1),
            64,
        )
    assert captions[13].text == "caption 13" and captions[13].embedding.dtype == "bfloat16"
    np.testing.assert_array_equal(captions[13].embedding, synthetic.embedding(13, 2))
    with pytest.raises(IndexError, match="rows 0 to 9, not 10"):
        images[10]


def test_tfds_opens_both_stores_without_tensorflow(path):
    """Catches metadata that TFDS cannot read, and features that need TensorFlow."""
    program = f"""
import sys, ml_dtypes, tensorflow_datasets as tfds
images = tfds.builder_from_directory({str(path / "images")!r})
captions = tfds.builder_from_directory({str(path / "captions")!r}).as_data_source("train")
train = images.as_data_source("train")
assert (len(train), len(images.as_data_source("heldout")), len(captions)) == (10, 3, 20)
assert train[7]["image"].shape == (64, 64, 3) and train[7]["image"][0, 0, 2] == 7
assert list(train[7]["caption_ids"]) == [14, 15] and captions[9]["embedding"].shape == (4, 8)
import imagen_jax.data.pipeline
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(
    ("embedding", "sha256"), [("bfloat16", "b4f6fa686e7c11e6"), ("int8", "f959e9acd5d33b30")]
)
def test_records_of_one_unnamed_encoder_keep_their_bytes(embedding, sha256):
    """Catches records that differ from those that data of the formats 1 and 2 have."""
    row = records.CaptionRow("a red apple", synthetic.embedding(3, 2))
    record = records.serialize_caption(row, embedding)
    assert hashlib.sha256(record).hexdigest()[:16] == sha256


def test_shard_bytes_depend_on_the_records_alone(tmp_path):
    """Catches time stamps or threads that make equal runs differ, and a temporary file left."""
    rows = [np.random.default_rng(i).bytes(2000) for i in range(30)]
    name = records.shard_name("captions", "train", 0, 1)
    first, second = (records.write_shard(tmp_path / side, name, iter(rows)) for side in "ab")
    assert first == second and first["rows"] == 30
    assert [p.name for p in (tmp_path / "a" / "captions").iterdir()] == [name.split("/")[1]]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("write() failed: No space left on device; x", errno.ENOSPC),
        ("write() failed: Disk quota exceeded; x", errno.EDQUOT),
        ("write() failed: File too large; x", errno.EFBIG),
        ("failed; x", errno.EIO),
    ],
)
def test_a_disk_that_is_full_is_an_os_error(tmp_path, monkeypatch, text, number):
    """Catches a full disk in a traceback, as ArrayRecord raises RuntimeError."""
    from array_record.python import array_record_module

    class Full:
        def __init__(self, *_): ...

        def write(self, record):
            raise RuntimeError(text)

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match="shard") as caught:
        records.write_shard(tmp_path, "images/shard", [b"x"])
    assert caught.value.errno == number and "; x" not in str(caught.value)


class Away:
    """A reader whose file could not be opened."""

    def read(self, positions):
        raise RuntimeError("no such row")


def test_a_file_system_that_is_away_is_waited_for(path, monkeypatch):
    """Catches a shard called damaged because its file system did not answer."""
    monkeypatch.setattr(shard_reader, "PAUSES_S", (0.0, 0.0))
    store = records.Prepared(path).images("train")
    record = store.record(7)
    shard = next(iter(store._readers))
    store._readers[shard] = shard_reader.Opened(Away(), None)
    assert store.record(7) == record
    monkeypatch.setattr(store, "_open", lambda shard: shard_reader.Opened(Away(), None))
    store._readers[shard] = shard_reader.Opened(Away(), None)
    with pytest.raises(
        OSError, match="row 7 could not be read, though the file matches its checksum"
    ) as caught:
        store.record(7)
    assert storage.is_away(caught.value)
    away = OSError(errno.ESTALE, "Stale file handle")
    monkeypatch.setattr(shard_reader, "sha256_file", lambda path: (_ for _ in ()).throw(away))
    with pytest.raises(OSError, match="row 7 cannot be read: Stale file handle"):
        store.record(7)


def test_incomplete_or_foreign_directories_are_refused(path, tmp_path):
    """Catches training on data without manifest, of another format, edited or cut short."""
    with pytest.raises(ValueError, match="is not prepared data"):
        records.Prepared(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    for change, message in [
        ({"format_version": 0}, "has format 0"),
        ({"max_length": 7}, "was changed after"),
    ]:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=message):
            records.Prepared(tmp_path)
    root = synthetic.write_prepared(tmp_path / "cut")
    shard = root / records.shard_name("captions", "train", 2, 5)
    shard.write_bytes(shard.read_bytes()[:-1])
    message = "captions-train.array_record-00002-of-00005 is missing or cut short"
    captions = records.Prepared(root).captions()
    assert captions[7].text == "caption 7" and captions[12].text == "caption 12"
    with pytest.raises(ValueError, match=message):
        captions[8]
    shard.unlink()
    with pytest.raises(ValueError, match=message):
        records.Prepared(root)


class Operations:
    """Counts the file operations below a directory, by path; `open` counts those of every kind."""

    def __init__(self, monkeypatch, root):
        self.paths = []
        for name in ("stat", "listdir", "scandir", "open"):
            self._count(monkeypatch, os, name, root)
        self._count(monkeypatch, builtins, "open", root)
        self._count(monkeypatch, io, "open", root)  # of pathlib
        self._count(monkeypatch, array_record_module, "ArrayRecordReader", root)

    def _count(self, monkeypatch, module, name, root):
        call = getattr(module, name)

        def counted(path=".", *args, **kwargs):
            if not isinstance(path, int) and os.fspath(path).startswith(str(root)):
                self.paths.append(os.path.relpath(path, root))
            return call(path, *args, **kwargs)

        monkeypatch.setattr(module, name, counted)


def test_opening_does_not_depend_on_the_number_of_shards(tmp_path, monkeypatch):
    """Catches a file operation for each shard that exists, at the start or in a data worker."""
    found = {}
    for rows in (20, 1):
        root = synthetic.write_prepared(tmp_path / str(rows), shard_rows=rows)
        with monkeypatch.context() as patch:
            counted = Operations(patch, root)
            prepared = records.open_once(root)
            stores = [prepared.images("train"), prepared.captions()]
            opening = list(counted.paths)
            worker = [pickle.loads(pickle.dumps(store)) for store in stores]
            assert counted.paths == opening
            assert worker[0][3].id == "image-3" and worker[1][7].text == "caption 7"
        found[rows] = len(opening), len(counted.paths) - len(opening)
        assert len(list((root / "captions").glob("*.array_record*"))) == 20 // rows
    assert found[20] == found[1] and found[1][0] < 15 and found[1][1] == 4


def test_data_are_opened_once(path, tmp_path, monkeypatch):
    """Catches a manifest that is read for every batch, and one that is not read after a change."""
    first = records.open_once(path)
    assert records.open_once(str(path)) is first and first.captions() is first.captions()
    monkeypatch.chdir(path.parent)
    assert records.open_once(path.name) is first
    root = synthetic.write_prepared(tmp_path / "data", images=2)
    before = records.open_once(root)
    synthetic.write_prepared(root, images=3)
    after = records.open_once(root)
    assert (before.num_images("train"), after.num_images("train")) == (2, 3)


def test_few_shards_stay_open(path, monkeypatch):
    """Catches a run that reaches the limit of open files, and a shard that is opened twice."""
    monkeypatch.setattr(shard_reader, "most_open", lambda: 2)
    captions = pickle.loads(pickle.dumps(records.Prepared(path).captions()))
    opened, open_shard = [], captions._open
    monkeypatch.setattr(captions, "_open", lambda i: opened.append(i) or open_shard(i))
    texts = [captions[row].text for row in (0, 4, 1, 8, 2, 5)]
    assert texts == [f"caption {row}" for row in (0, 4, 1, 8, 2, 5)]
    assert opened == [0, 1, 2, 1] and list(captions._readers) == [0, 1]


def test_all_readers_share_the_open_files(path, monkeypatch):
    """Catches data of several encoders or sets that reaches the limit of open files."""
    limits = (512, 512)
    monkeypatch.setattr(shard_reader.resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(shard_reader, "_all_readers", weakref.WeakSet())
    assert shard_reader.most_open() == 128
    prepared = records.Prepared(path)
    stores = [prepared.images("train"), prepared.images("heldout"), prepared.captions()]
    assert shard_reader.most_open() == 512 // 2 // 3
    stores.append(pickle.loads(pickle.dumps(stores[0])))
    assert shard_reader.most_open() == 512 // 2 // 4
    limits = (1 << 20, 1 << 20)
    assert shard_reader.most_open() == 4096


def test_text_that_does_not_fit_is_refused(path):
    """Catches another text width or length that is found in the jitted step, or never."""
    prepared = records.Prepared(path)
    prepared.check_text([TextInput("", synthetic.DIM, 6)])
    with pytest.raises(ValueError, match="width 8 .encoder fake., but the config asks for 16"):
        prepared.check_text([TextInput("", 16, 6)])
    with pytest.raises(ValueError, match="captions of up to 6 tokens, but data.text_length is 4"):
        prepared.check_text([TextInput("", 8, 4)])


def test_each_directory_is_opened_once(tmp_path, monkeypatch):
    """Catches a mixture of many sets whose manifests are read again for every use."""
    opened = []
    monkeypatch.setattr(records.Prepared, "__init__", lambda self, path, _: opened.append(path))
    paths = [tmp_path / str(i) for i in range(100)]
    for path in paths:
        path.mkdir()
        (path / manifest_file.MANIFEST).write_text("{}")
    first = [records.open_once(path) for path in paths]
    assert [records.open_once(path) for path in paths] == first and len(opened) == len(paths)
    (paths[0] / manifest_file.MANIFEST).write_text("{ }")
    assert records.open_once(paths[0]) is not first[0] and len(opened) == len(paths) + 1


def test_texts_are_read_without_their_features(monkeypatch):
    """Catches a tokenizer that decodes a mebibyte of features for each caption."""
    row = CaptionRow("a red apple", np.ones((3, 4), ml_dtypes.bfloat16))
    record = caption_records.serialize_caption(row)
    monkeypatch.setattr(caption_records, "_read", None)
    seen, features_of = [], caption_records.caption_features
    monkeypatch.setattr(
        caption_records, "caption_features", lambda *a: (seen.append(a), features_of(*a))[1]
    )
    assert caption_records.parse_text(record) == "a red apple" and seen == [(0,)]
