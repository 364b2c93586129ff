"""Data in buckets: sources of prepare_data, and prepared data through the cache of shards."""

import errno
import fcntl
import json
import logging
import os

import gcsfs
import pytest
from gcsfs.retry import HttpError

from imagen_jax import storage
from imagen_jax.data import (
    first_records,
    image_sizes,
    index_files,
    manifest_file,
    pipeline,
    records,
    shard_cache,
    shard_reader,
)
from imagen_jax.data.prepare import passes
from imagen_jax.data.shard_cache import Place
from imagen_jax.encoders_in_turn import Encoders
from tests import storage_emulator
from tests.data import synthetic
from tests.data.sources import layouts
from tests.data.synthetic_source import SETTINGS, tree
from tests.data.test_pipeline import assert_same, config, take

TARS_AND_PARQUET = [
    pytest.param("tar_img2dataset"),
    pytest.param("parquet_paths"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("tar_apart", "parquet_binary")),
]
SHARD = "images/images-train.array_record-00001-of-00003"


@pytest.fixture(scope="module")
def server():
    """The environment of a server; set for this process too."""
    with storage_emulator.used() as env:
        yield env


@pytest.fixture
def bucket(server, request):
    """An empty directory in the bucket."""
    return storage_emulator.directory_of(request)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Prepared data: 3 shards of training images, 1 of others, 5 of captions."""
    path = synthetic.write_prepared(tmp_path_factory.mktemp("prepared"))
    manifest = json.loads((path / manifest_file.MANIFEST).read_text())
    sums = {name: first_records.of_file(path / name) for name in manifest["shards"]}
    first_records.write(path, manifest["hash"], sums)
    return path


@pytest.fixture(scope="module")
def remote(server, local):
    """A copy of it in the bucket."""
    path = storage.as_path("--data", f"gs://{storage_emulator.BUCKET}/prepared")
    storage.copy_directory(local, path)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Short pauses, and a directory for temporary files of each test."""
    monkeypatch.setattr(shard_reader, "PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(shard_reader, "_ROOM_POLL_S", 0.01)
    monkeypatch.setattr(index_files.tempfile, "tempdir", str(tmp_path))


def remote_config(remote, tmp_path, **changes):
    cache = {"shard_cache_dir": str(tmp_path / "cache"), "shard_cache_gib": 1.0}
    return config(remote, **cache | changes)


def shards_in(cache):
    """{name of a copy: its bytes}, without locks."""
    found = (path for path in cache.rglob("*") if path.is_file())
    return {path.name: path.stat().st_size for path in found if "array_record" in path.name}


def place_of(cache, shards, local):
    """A cache that has room for `shards` shards of training images."""
    size = (local / SHARD).stat().st_size
    return Place(str(cache), (shards + 0.5) * size / 2**30)


@pytest.mark.parametrize("layout", TARS_AND_PARQUET)
def test_a_source_in_a_bucket_gives_the_same_bytes(layout, bucket, tmp_path):
    """Catches items, names or digests that depend on where shards lie, and damage that failing
    requests seem to be.
    """
    here = tmp_path / "in"
    here.mkdir()
    name, *options = layouts.LAYOUTS[layout](here, layouts.collection(10))
    storage.copy_directory(here, bucket)
    there = name.replace(str(here), os.fspath(bucket))
    for source, output in ((name, "a"), (there, "b")):
        settings = passes.Settings(**SETTINGS)
        passes.prepare(layouts.opened(source, *options), Encoders({}), tmp_path / output, settings)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def write_tars(bucket, tmp_path, count=10):
    (tmp_path / "in").mkdir()
    layouts.LAYOUTS["tar_img2dataset"](tmp_path / "in", layouts.collection(count))
    storage.copy_directory(tmp_path / "in", bucket)


def test_globs_and_missing_shards(bucket, tmp_path, caplog):
    """Catches hidden files that a glob of a local disk leaves out, and shards missed silently."""
    write_tars(bucket, tmp_path)
    storage.copy_file(bucket / "00000.tar", bucket / ".hidden.tar")
    storage.copy_file(bucket / "00000.tar", bucket / "deep" / "00003.tar")
    assert len(layouts.opened(f"webdataset:{bucket}/*.tar")) == 10
    assert len(layouts.opened(f"webdataset:{bucket}/**/*3.tar")) == 5
    found = layouts.opened(f"webdataset:{bucket}/{{00000..00002}}.tar,{bucket}/deep")
    reasons = [(note["id"], note["reason"]) for note in found.notes()]
    assert ("00002.tar", "missing_shard") in reasons and ("deep", "missing_shard") in reasons
    assert "webdataset: 2 of 4 shards do not exist, such as 00002.tar" in caplog.text


@pytest.mark.parametrize(
    "source, message",
    [
        ("webdataset:gs://no-such-bucket/*.tar", "there is no bucket gs://no-such-bucket"),
        ("parquet:gs://BUCKET/{0,1}.parquet", "no file matches"),
        ("parquet:s3://b/x.parquet", "--source parquet s3://b/x.parquet has the scheme s3://"),
        ("folder:gs://BUCKET/x", "is a URL, only local paths work"),
    ],
)
def test_a_source_that_is_not_there_is_one_line(server, source, message):
    """Catches an empty source, or the error of a library."""
    with pytest.raises(ValueError, match=message):
        layouts.opened(source.replace("BUCKET", storage_emulator.BUCKET))


@pytest.mark.parametrize(
    "error",
    [HttpError({"code": 503, "message": "x"}), OSError("Forbidden: b/x"), FileNotFoundError("x")],
)
@pytest.mark.parametrize("layout", ["tar_img2dataset", "parquet_binary"])
def test_a_bucket_that_fails_is_no_damaged_item(layout, error, bucket, tmp_path, monkeypatch):
    """Catches images that are left out because requests failed for a while."""
    (tmp_path / "in").mkdir()
    name, *options = layouts.LAYOUTS[layout](tmp_path / "in", layouts.collection(10))
    storage.copy_directory(tmp_path / "in", bucket)
    source = layouts.opened(name.replace(str(tmp_path / "in"), os.fspath(bucket)), *options)
    item = source[4]

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(gcsfs.core.GCSFile, "_fetch_range", fail)
        with pytest.raises(OSError, match="gs://") as caught:
            source[7]
        assert caught.value.errno in (errno.EIO, errno.EACCES, errno.ENOENT)
    assert source[4] == item and source[7].fault is None


def test_a_tar_is_read_in_blocks(bucket, tmp_path, monkeypatch):
    """Catches a tar read whole, or with a request for each member."""
    write_tars(bucket, tmp_path, 40)
    monkeypatch.setattr("imagen_jax.object_storage.BLOCK_BYTES", 4096)
    asked, fetch = [], gcsfs.core.GCSFile._fetch_range

    def counted(file, start=None, end=None):
        asked.append(end - start)
        return fetch(file, start, end)

    monkeypatch.setattr(gcsfs.core.GCSFile, "_fetch_range", counted)
    source = layouts.opened(f"webdataset:{bucket}/00000.tar")
    opening = len(asked)
    assert [source[i].fault for i in range(len(source))] == [None] * 20
    blocks = -(-(tmp_path / "in" / "00000.tar").stat().st_size // 4096)
    assert max(asked) <= 4096 and opening <= blocks + 1 and len(asked) <= 3 * blocks + 1


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_are_those_of_a_local_copy(local, remote, tmp_path, workers):
    """Catches another order, other captions, a shard of another name."""
    got = take(6, remote_config(remote, tmp_path, workers=workers))
    assert_same(got, take(6, config(local)))
    assert sum(shards_in(tmp_path / "cache").values()) > 0
    copied = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert not any(name.endswith((".tmp", ".lock")) for name in copied)


@pytest.mark.slow
def test_a_mixture_of_a_bucket_and_a_local_set(local, remote, tmp_path):
    """Catches sets that share one cache entry, or another order."""
    other = synthetic.write_prepared(tmp_path / "other", images=6)
    mixture = lambda first: ((str(first), 2.0), (str(other), 1.0))
    got = take(5, remote_config("", tmp_path, mixture=mixture(remote)))
    assert_same(got, take(5, config("", mixture=mixture(local))))


def test_buckets_of_sizes_are_read_from_a_bucket(bucket, tmp_path, monkeypatch):
    """Catches the sizes of images read through a memory map of a path in a bucket, and computed
    where the bucket has them.
    """
    shapes = [(64, 64), (64, 96), (96, 64)]
    here = synthetic.write_prepared(tmp_path / "in", images=12, shapes=shapes)
    buckets = {"buckets": ((16, 16), (16, 24), (24, 16))}
    wanted = take(4, config(here, **buckets))  # writes the files of sizes
    for with_sizes in (False, True):
        names = (n for n in storage.file_names(here) if with_sizes or "sizes-" not in n)
        root = bucket / str(with_sizes)
        for name in names:
            storage.copy_file(here / name, root / name)
        assert (image_sizes.file_of(root, "train")).exists() == with_sizes
        cache = tmp_path / f"cache{with_sizes}"
        for file in tmp_path.glob("imagen_jax-*/*sizes*"):
            file.unlink()
        if with_sizes:
            monkeypatch.setattr(image_sizes, "_write", None)
        assert_same(take(4, remote_config(root, cache, **buckets)), wanted)


def test_training_is_refused_if_its_shards_do_not_fit(local, remote, tmp_path):
    """Catches a run that copies a shard for almost every record."""
    total = sum((local / n).stat().st_size for n in records.Prepared(local).entries("captions"))
    tight = remote_config(remote, tmp_path, shard_cache_gib=total / 2**30)
    with pytest.raises(ValueError, match="training reads .* in random order, but data.shard_cache"):
        pipeline.batches(tight, 0, 0)
    assert shards_in(tmp_path / "cache") == {}


def test_a_full_disk_is_refused_at_the_start(remote, tmp_path, monkeypatch):
    """Catches a disk that fills up after hours."""
    free = shard_cache.shutil.disk_usage(tmp_path)._replace(free=shard_cache.FREE_BYTES + 1000)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda _: free)
    with pytest.raises(ValueError, match="has room for 0.000954 MiB, but .* to a directory on a"):
        pipeline.batches(remote_config(remote, tmp_path), 0, 0)


def test_a_full_disk_is_no_wait(remote, local, tmp_path, monkeypatch):
    """Catches minutes of silence until shards are closed that nobody has open."""
    images = records.Prepared(remote, place_of(tmp_path / "cache", 2, local)).images("train")
    free = shard_cache.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda _: free)
    with pytest.raises(OSError, match="no room for a shard of .* beside 0.25 GiB") as caught:
        images.record(0)
    assert caught.value.errno == errno.ENOSPC


def test_the_bound_holds_and_the_last_used_shards_stay(local, remote, tmp_path, monkeypatch):
    """Catches a cache that grows, one that deletes what is needed next, and one that stops when
    all of it is open.
    """
    place = place_of(tmp_path / "cache", 2, local)
    images = records.Prepared(remote, place).images("train")
    wanted = records.Prepared(local).images("train")
    monkeypatch.setattr(shard_reader, "_ROOM_S", 5.0)
    kept = lambda: {int(name.split("-")[2]) for name in shards_in(tmp_path / "cache")}
    reads = ((0, {0}), (4, {0, 1}), (0, {0, 1}), (9, {0, 2}), (5, {1, 2}), (0, {0, 1}))
    for number, (row, shards) in enumerate(reads):
        assert images.record(row) == wanted.record(row) and kept() == shards
        assert sum(shards_in(tmp_path / "cache").values()) <= place.most_bytes
        if number in (1, 2):  # afterwards the reader has to close them itself
            images.close_copies()


def test_files_that_are_not_copies_stay(local, remote, tmp_path):
    """Catches a cache that deletes other files of its directory, such as a mounted disk, to make
    room; one whose bound they use up; and an unfinished copy of a killed process that stays.
    """
    place = place_of(tmp_path / "cache", 1, local)
    images = records.Prepared(remote, place).images("train")
    images.record(0)
    own = images._cache.path(SHARD).parent
    others = [place.directory / name for name in ("fast/run/1/shards.safetensors", "x.tmp")]
    others += [place.directory / "prepared" / SHARD, own / "notes.txt"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10**6))
        os.utime(path, (0, 0))
    left = own / f".{os.path.basename(SHARD)}.123.0a1b2c3d.tmp"
    left.touch()
    images.record(9)
    assert all(path.exists() for path in others) and not left.exists()


def test_a_shard_that_another_process_has_open_stays(local, remote, tmp_path, monkeypatch):
    """Catches a file deleted under its reader, and a wait without end."""
    monkeypatch.setattr(shard_reader, "_ROOM_S", 0.1)
    place = place_of(tmp_path / "cache", 1, local)
    images = records.Prepared(remote, place).images("train")
    images.record(0)
    images.close_copies()
    (path,) = [p for p in (tmp_path / "cache").rglob("images-*") if p.is_file()]
    with open(path, "rb") as file:  # as another process has it
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(ValueError, match="has no room for a shard .* and those in it are open"):
            images.record(9)
        assert path.exists()
    images.record(9)
    assert not path.exists()


def test_a_bound_below_one_shard_is_refused(local, remote, tmp_path):
    """Catches an evaluation that waits for room that there never is."""
    with pytest.raises(ValueError, match="has a shard of .*, but shard_cache_gib is .*: set it to"):
        records.Prepared(remote, place_of(tmp_path / "cache", 0, local))


@pytest.mark.parametrize("damage", ["cut", "changed", "replaced"])
def test_a_damaged_copy_is_made_again(local, remote, tmp_path, damage):
    """Catches a copy that a killed process or a full disk has spoilt, and that is used."""
    place, wanted = Place(str(tmp_path / "cache")), records.Prepared(local).images("train")
    images = records.Prepared(remote, place).images("train")
    images.record(4)
    path = images._cache.path(SHARD)
    content = path.read_bytes()
    zeros = b"\0" * len(content)
    path.unlink()
    path.write_bytes({"cut": content[:-1], "changed": zeros, "replaced": content}[damage])
    if damage == "replaced":  # by another shard of the same size
        path.write_bytes((local / SHARD.replace("00001-", "00000-")).read_bytes())
    images = records.Prepared(remote, place).images("train")
    assert [images.record(row) for row in range(10)] == [wanted.record(r) for r in range(10)]
    assert path.read_bytes() == content


def test_what_is_missing_in_a_bucket_is_one_line(local, bucket, tmp_path, remote):
    """Catches tracebacks of libraries, and a wait for an object that nobody will store."""
    place = Place(str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="prepared data gs://no-such/x: there is no bucket"):
        records.Prepared("gs://no-such/x", place)
    with pytest.raises(ValueError, match="does not exist .no manifest.json"):
        records.Prepared(bucket, place)
    storage.copy_directory(local, bucket)
    opened = records.Prepared(bucket, place)
    storage.remove(bucket / SHARD)
    with pytest.raises(ValueError, match=f"{SHARD} is missing"):
        records.Prepared(bucket, place)
    with pytest.raises(ValueError, match=f"gs://.*{SHARD} is missing: copy the data"):
        opened.images("train").record(4)
    storage.copy_file(local / SHARD.replace("00001-", "00000-"), bucket / SHARD)
    with pytest.raises(ValueError, match="is not the shard that the manifest lists, size or SHA"):
        opened.images("train").record(4)
    assert shards_in(tmp_path / "cache") == {}


def test_a_bucket_that_does_not_answer_is_asked_again(remote, tmp_path, monkeypatch):
    """Catches a training that ends, or a shard called damaged, because requests failed."""
    images = records.Prepared(remote, Place(str(tmp_path / "cache"))).images("train")
    failures = iter([True, True])
    download = shard_cache._download

    def failing(*args):
        if next(failures, False):
            raise OSError(errno.EIO, "503", "gs://x")
        return download(*args)

    monkeypatch.setattr(shard_cache, "_download", failing)
    assert images.record(4)
    monkeypatch.setattr(shard_cache, "_download", lambda *_: failing_always())

    def failing_always():
        raise OSError(errno.EIO, "503", "gs://x")

    with pytest.raises(OSError, match="503") as caught:
        images.record(0)
    assert storage.is_away(caught.value)
    assert all(not name.endswith(".tmp") for name in shards_in(tmp_path / "cache"))


def test_copies_are_made_ahead_and_reported(local, remote, tmp_path, caplog):
    """Catches a start that is silent for hours, and shards that are copied twice."""
    prepared = records.Prepared(remote, Place(str(tmp_path / "cache")))
    wanted = [(prepared.shard_cache, prepared.entries("captions"))]
    with caplog.at_level(logging.INFO, "imagen_jax.data.shard_cache"):
        shard_cache.CopyAhead(wanted).wait()
    assert "copying 5 shards" in caplog.text and "copied 5 of 5 shards, " in caplog.text
    assert len(shards_in(tmp_path / "cache")) == 5
    caplog.clear()
    shard_cache.CopyAhead(wanted).wait()
    assert caplog.text == ""


@pytest.mark.slow
def test_requests_that_fail_at_times_change_nothing(local, tmp_path):
    """Catches an error of one request that ends the work, or leaves something out."""
    with storage_emulator.used(failing=0.05, delay=0.02):
        root = storage.as_path("--data", f"gs://{storage_emulator.BUCKET}/x")
        storage.copy_directory(local, root / "prepared")
        got = take(6, remote_config(root / "prepared", tmp_path))
        assert_same(got, take(6, config(local)))
        write_tars(root, tmp_path, 40)
        there, here = (layouts.opened(f"webdataset:{x}/*.tar") for x in (root, tmp_path / "in"))
        assert there.describe() == here.describe()
        assert [there[i] for i in range(40)] == [here[i] for i in range(40)]
