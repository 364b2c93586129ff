"""Files, locks and directories in a bucket, on an emulator of Cloud Storage that fails at times."""

import json
import os
import subprocess
import sys
import threading
import time

import gcsfs
import pytest
from gcsfs.retry import HttpError

from imagen_jax import (
    checksums,
    exit_codes,
    goodput,
    line_logs,
    locks,
    object_storage,
    output_paths,
    storage,
)
from tests import storage_emulator, tiny

FAILING, DELAY_S = 0.05, 0.01


@pytest.fixture(scope="module")
def server():
    """The environment of a server; set for this process too."""
    with storage_emulator.used(FAILING, DELAY_S) as env:
        yield env


@pytest.fixture
def bucket(server, request):
    """An empty directory in the bucket."""
    return storage_emulator.directory_of(request)


@pytest.mark.parametrize(
    "text, message",
    [
        ("s3://b/x", "--output s3://b/x has the scheme s3://, but only gs:// and local paths work"),
        ("hdfs:/x", "has the scheme hdfs://"),
        ("gs://", "names no bucket"),
        ("gs:///", "names no bucket"),
    ],
)
def test_other_schemes_are_refused(text, message):
    """Catches a scheme that becomes the name of a local directory."""
    with pytest.raises(ValueError, match=message):
        storage.as_path("--output", text)


def test_a_local_path_stays_one(tmp_path):
    """Catches a local path read through the functions for buckets."""
    assert storage.as_path("--output", str(tmp_path)) == tmp_path
    assert not object_storage.in_bucket(storage.as_path("--output", "a/b"))


def test_a_path_that_pathlib_has_changed_is_the_same(server):
    """Catches gs:/b/x, which pathlib makes of gs://b/x, read as a local path."""
    path = storage.as_path("--output", "gs:/b/x/")
    assert os.fspath(path) == "gs://b/x" and object_storage.in_bucket(path)


def test_a_missing_bucket_is_one_line(server):
    """Catches an upload of hours that fails at its end because of a wrong name."""
    with pytest.raises(ValueError, match="there is no bucket gs://no-such-bucket"):
        object_storage.check_bucket(
            "--output", storage.as_path("--output", "gs://no-such-bucket/x")
        )


def test_an_object_is_no_output_directory(bucket):
    """Catches a workdir below an object, which hides it from those who read it."""
    storage.write_json(bucket / "config.json", {})
    with pytest.raises(ValueError, match="--workdir gs://.*config.json is a file"):
        output_paths.output_directory("workdir", os.fspath(bucket / "config.json"))
    assert output_paths.output_directory("workdir", os.fspath(bucket)) == bucket


def test_files_and_listings(bucket, tmp_path):
    """Catches names relative to another directory, those of a neighbour with the same beginning,
    and listings that do not show what was just written.
    """
    assert storage.entry_names(bucket) == [] and storage.file_names(bucket) == []
    storage.write_json(bucket / "a.json", {"x": 1})
    storage.write_lines(bucket / "deep" / "er" / "b.txt", ["1\n", b"2\n"])
    storage.write_atomically(bucket.parent / f"{bucket.name}2" / "c", b"other")
    assert storage.read_json(bucket / "a.json") == {"x": 1}
    assert storage.file_names(bucket) == ["a.json", "deep/er/b.txt"]
    assert storage.entry_names(bucket) == ["a.json", "deep"]
    assert (bucket / "deep" / "er" / "b.txt").read_bytes() == b"1\n2\n"
    storage.copy_file(bucket / "a.json", tmp_path / "copy.json")
    assert json.loads((tmp_path / "copy.json").read_bytes()) == {"x": 1}
    storage.remove(bucket / "deep")
    assert storage.file_names(bucket) == ["a.json"]
    storage.remove(bucket)
    assert storage.entry_names(bucket) == [] and (bucket.parent / f"{bucket.name}2" / "c").exists()


def test_an_interrupted_upload_leaves_the_old_file(bucket):
    """Catches a part of a file stored under its name, which closing a file of gcsfs does."""
    storage.write_atomically(bucket / "x", b"old")

    def lines():
        yield b"new" * 3_000_000
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_lines(bucket / "x", lines())
    assert (bucket / "x").read_bytes() == b"old"


def test_a_file_of_several_requests_is_whole(bucket):
    """Catches a lost or repeated part of an upload whose requests fail at times."""
    content = os.urandom(11_000_000)
    storage.write_atomically(bucket / "large", content)
    storage.write_atomically(bucket / "empty", b"")
    assert (bucket / "large").read_bytes() == content and (bucket / "empty").read_bytes() == b""


def test_a_failed_upload_names_the_object(bucket, monkeypatch):
    """Catches a message that names the temporary file of an upload, which is gone by then."""

    def fail(*_, **__):
        raise HttpError({"code": 503, "message": "away"})

    monkeypatch.setattr(gcsfs.core.GCSFile, "_upload_chunk", fail)
    monkeypatch.setattr(gcsfs.core.GCSFile, "_simple_upload", fail, raising=False)
    with pytest.raises(OSError, match="away") as error:
        storage.write_atomically(bucket / "x", b"content")
    assert error.value.filename == f"{bucket}/x"


def test_a_sealed_directory(bucket):
    """Catches damage that is not found in a bucket, or found where there is none."""
    for name in ("a", "d/b"):
        storage.write_atomically(bucket / name, name.encode())
    assert not checksums.is_sealed(bucket)
    checksums.seal(bucket)
    assert checksums.is_sealed(bucket) and checksums.find_damage(bucket) is None
    storage.write_atomically(bucket / "d" / "b", b"B")
    assert checksums.find_damage(bucket) == "d/b does not match its checksum"
    storage.remove(bucket / "d")
    assert checksums.find_damage(bucket) == "d/b is missing"
    assert checksums.find_damage(bucket / "nothing").endswith("No such file or directory")


def test_the_last_line_of_a_log_is_replaced(bucket, monkeypatch):
    """Catches a shorter log that is not stored, and a replacement in the part before."""
    monkeypatch.setattr(line_logs, "PART_BYTES", 8)
    one = line_logs.LineLog(bucket / "log")
    for text in ("first", "second"):
        one.append("provisional " + text)
        one.flush()
        one.replace(text)
        one.flush()
    assert line_logs.read_lines(bucket / "log") == [b"first\n", b"second\n"]
    one.append("third")
    one.replace("3")
    assert storage.entry_names(bucket) == ["log"]
    one.close()
    assert (bucket / "log.0001").read_bytes() == b"3\n"
    other = line_logs.LineLog(bucket / "log")
    other.append("4")
    other.replace("5")
    other.close()
    assert line_logs.read_lines(bucket / "log") == [b"first\n", b"second\n", b"3\n", b"5\n"]


def test_a_log_without_one_of_its_parts_is_continued(bucket, monkeypatch):
    """Catches lines of the newest part that are stored again in the place of a removed part."""
    monkeypatch.setattr(line_logs, "PART_BYTES", 1)
    log = line_logs.LineLog(bucket / "log")
    for text in ("first", "damaged", "third"):
        log.append(text)
    log.close()
    assert line_logs.keep_lines(bucket / "log", lambda line: b"damaged" not in line) == [
        b"damaged\n"
    ]
    log = line_logs.LineLog(bucket / "log")
    log.append("fourth")
    log.close()
    assert line_logs.read_lines(bucket / "log") == [b"first\n", b"third\n", b"fourth\n"]


def test_a_ledger_is_stored_while_it_grows(bucket):
    """Catches entries of a bucket that appear when the process ends."""
    with goodput.Ledger(bucket, write_s=0.05) as ledger:
        ledger.at(0, "compile")
        end = time.monotonic() + 20
        while len(goodput.read_entries(bucket)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert [list(e["seconds"]) for e in goodput.read_entries(bucket)] == [
            ["start"],
            ["compile"],
        ]
    with goodput.Ledger(bucket) as ledger:
        ledger.at(0, "compile")
    assert [e["process"] for e in goodput.read_entries(bucket)] == [0, 0, 1, 1]


def test_one_of_many_gets_the_lock(bucket):
    """Catches a lock written without a condition, which several processes then hold."""
    start, got, inside, most = threading.Barrier(6), [], [], []

    def take():
        start.wait()
        try:
            with locks.BucketLock(bucket, "writing to", renew_s=0.1, expiry_s=5):
                inside.append(True)
                most.append(len(inside))
                time.sleep(1)
                inside.pop()
        except ValueError as error:
            got.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most and set(most) == {1}
    assert got and all(f"is writing to {bucket}" in text for text in got)


def test_a_lock_is_renewed_and_removed(bucket):
    """Catches a lock that expires while it is held, and one that stays."""
    with locks.BucketLock(bucket, "writing to", renew_s=0.1, expiry_s=2):
        assert locks.is_locked(bucket)
        time.sleep(2.5)
        with pytest.raises(ValueError, match=r"process \d+ on .* is writing to"):
            locks.BucketLock(bucket, "writing to", renew_s=0.1, expiry_s=2).__enter__()
    assert not locks.is_locked(bucket)
    with locks.only_process(bucket, "writing to"):
        pass


HOLDER = """
import sys, time
from imagen_jax import locks, storage
path = storage.as_path("--output", sys.argv[1])
with locks.BucketLock(path, "writing to", renew_s=0.2, expiry_s=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(server, bucket):
    """A process that holds the lock for a while."""
    command = [sys.executable, "-c", HOLDER, os.fspath(bucket), "2"]
    env = os.environ | server | {"PYTHONPATH": str(tiny.ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as held:
        assert held.stdout.readline() == b"held\n"
        yield held
        held.kill()


def test_a_killed_holder_does_not_keep_the_lock(bucket, holder, monkeypatch):
    """Catches a lock that has to be removed by hand, and one that is taken from a living process.

    Once for a process of this machine, once for one of another.
    """
    with pytest.raises(ValueError, match=f"process {holder.pid} on"):
        locks.BucketLock(bucket, "writing to", renew_s=0.2, expiry_s=2).__enter__()
    holder.kill()
    holder.wait()
    monkeypatch.setattr(locks, "_machine", lambda: "another")
    began = time.monotonic()
    with locks.BucketLock(bucket, "writing to", renew_s=0.2, expiry_s=2):
        assert time.monotonic() - began > 2


def test_a_killed_process_of_this_machine_is_known_at_once(bucket, holder):
    """Catches a wait of a minute after each restart on one machine."""
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with locks.BucketLock(bucket, "writing to", renew_s=60, expiry_s=300):
        assert time.monotonic() - began < 20


def test_a_holder_that_lost_its_lock_ends(bucket, holder):
    """Catches a suspended process that wakes up and writes beside its successor."""
    storage.write_atomically(bucket / locks.LOCK, b'{"host": "another", "pid": 1}')
    assert holder.wait(timeout=30) == exit_codes.LOST
    assert b"another process has taken over" in holder.stderr.read()
