"""Sets of pictures, `sample` and `evaluate --cascade` in a bucket, on an emulator that fails."""

import io
import re
import signal
import time

import numpy as np
import pytest
from PIL import Image

from imagen_jax import line_logs, locks, picture_set, set_reservations, storage
from imagen_jax.picture_set import PictureSet, Requests
from tests import processes, storage_emulator, tiny_cascade

IMAGE = np.zeros((4, 4, 3), np.uint8)
JOB = {"prompts_sha256": "x"}
PROMPTS = [f"{colour} {thing}" for colour in ("red", "blue") for thing in "apple cat sun".split()]


@pytest.fixture(scope="module")
def server():
    """A server that does not fail, for tests that need no retries, which take seconds."""
    with storage_emulator.used():
        yield


@pytest.fixture
def bucket(server, request):
    """An empty directory in the bucket."""
    return storage_emulator.directory_of(request)


@pytest.fixture
def failing_bucket():
    """An empty directory of a server that fails at times and answers late."""
    with storage_emulator.used(failing=0.03, delay=0.01):
        yield storage.as_path("--output", f"gs://{storage_emulator.BUCKET}/out")


def new_set(directory, prompts, first=0, process="p", earlier=((4, 4),)):
    requests = Requests(list(prompts), 1, 7)
    part = picture_set.part_path(directory, first, process)
    return PictureSet(directory, requests, {"stages": ["base"]}, first, part, earlier)


def reserve(directory, job=JOB, count=5):
    with set_reservations.reserve(directory, job, count) as first:
        return first


def test_a_set_of_a_bucket_is_one_command_s(bucket):
    """Catches two commands that draw in one set, a set that begins inside another one, and a lock
    that stays when its command has ended.
    """
    assert reserve(bucket) == reserve(bucket) == 0
    assert reserve(bucket, {"other": 1}, 3) == 5
    assert storage.entry_names(bucket) == ["set_0000.json", "set_0005.json"]
    with locks.BucketLock(bucket, "drawing", renew_s=0.3, name="set_0000.lock"):
        assert reserve(bucket) == 8
    assert reserve(bucket) == 0
    storage.write_atomically(bucket / "0020_old.png", b"x")
    storage.write_atomically(bucket / "set_0030.json", b"{")  # damaged
    storage.write_atomically(bucket / "set_0030.part-x.jsonl.0001", b"")
    assert set_reservations.free_number(bucket) == 31


def test_a_set_of_a_bucket_is_written_and_continued(bucket, monkeypatch):
    """Catches lines before their files, lines that another process lists twice, a missing picture
    that counts, and a folder of a large set.
    """
    monkeypatch.setattr(picture_set, "FOLDER_SIZE", 3)
    monkeypatch.setattr(line_logs, "PART_BYTES", 300)
    prompts = ["a", "b", "c", "d", "e", "f"]
    one, two = (new_set(bucket, prompts, process=name) for name in ("1", "2"))
    images = [[IMAGE, np.full((8, 8, 3), row, np.uint8)] for row in range(6)]
    one.add_all([0, 1, 2, 3], images[:4])
    assert len(picture_set.part_rows(bucket, 0)) == 3  # a full file is stored, the rest is not
    one.close()
    written = lambda: [row["row"] for row in picture_set.part_rows(bucket, 0, None, [(4, 4)])]
    assert written() == [0, 1, 2, 3]
    assert len(storage.file_names(bucket)) > 13  # the part has several files
    storage.remove(bucket / "000000" / "0001_b_4.png")
    assert written() == [0, 2, 3]
    two.add_all([1, 4], [images[1], images[4]])
    with pytest.raises(ValueError, match="1 of 6 pictures of gs://.* are missing, row 5 first"):
        two.finish()
    two.add(5, images[5])
    manifest = two.finish()
    rows = picture_set.manifest_rows(manifest)
    assert [row["prompt"] for row in rows] == prompts
    assert [np.asarray(image)[0, 0, 0] for image in picture_set.Pictures(bucket, rows)] == [
        *range(6)
    ]
    assert storage.entry_names(bucket) == ["000000", "000003", "set_0000.jsonl"]
    assert list(picture_set.chunks(manifest, 4, 1)) == [rows[:4]]
    assert picture_set.changed_rows(bucket, rows) == []
    storage.copy_file(bucket / rows[0]["file"], bucket / rows[2]["file"])
    assert picture_set.changed_rows(bucket, rows) == [rows[2]]
    with pytest.raises(ValueError, match="was changed since it was drawn"):
        picture_set.Pictures(bucket, rows)[2]
    (sheet,) = picture_set.write_sheets(manifest, [(4, 4), (8, 8)])
    assert (
        sheet.name == "sheet_0000.png" and Image.open(io.BytesIO(sheet.read_bytes())).height > 6 * 8
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The stages of a small cascade."""
    return tiny_cascade.write(tmp_path_factory.mktemp("stages"))


def start(files, output, logs, count, *more):
    """`sample` in `count` processes with a device each. logs: see `processes.start`."""
    prompts = logs.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    command = [
        *("-m", "imagen_jax.sample", *tiny_cascade.options(files), f"--prompts={prompts}"),
        *("--count=4", f"--output={output}", "--config.batch_size=2"),
        *("--host_lost=12", "--host_timeout=120", *more),
    ]
    return processes.start(lambda i: command, logs, count, count)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_sampling_in_a_bucket_is_finished(files, failing_bucket, tmp_path):
    """Catches pictures of another set, or none, after a kill of either process; pictures that
    differ from those on a disk; and a record that does not draw its picture again.
    """
    bucket = failing_bucket
    for name, victim in (("first", 0), ("second", 1)):
        logs = tmp_path / name
        running = start(files, bucket, logs, 2)
        end = time.monotonic() + 600
        known = len(storage.file_names(bucket)) if victim else 0
        while len(storage.file_names(bucket)) < known + 12 and time.monotonic() < end:
            assert all(process.poll() is None for process in running), log(logs)
            time.sleep(0.05)
        running[victim].send_signal(signal.SIGKILL)
        assert running[1 - victim].wait(timeout=120) != 0
    processes.finish(start(files, bucket, tmp_path / "third", 2), tmp_path / "third")
    processes.finish(start(files, tmp_path / "out", tmp_path / "disk", 2), tmp_path / "disk")
    mine, theirs = (
        picture_set.manifest_rows(directory / "set_0000.jsonl")
        for directory in (bucket, tmp_path / "out")
    )
    assert len(mine) == 24 and mine == theirs
    names, others = (
        sorted({re.sub(r"^\d+_", "", name) for name in storage.entry_names(directory)})
        for directory in (bucket, tmp_path / "out")
    )
    assert names == others and "hosts.json" in names
    assert not [name for name in names if "part" in name or "lock" in name]
    record = bucket / mine[3]["file"].replace(".png", ".json")
    command = ["-m", "imagen_jax.sample", f"--reproduce={record}", f"--output={bucket / 'again'}"]
    again = processes.start(lambda i: command, tmp_path / "again", 1, 1)
    processes.finish(again, tmp_path / "again")
    (row,) = picture_set.manifest_rows(bucket / "again" / "set_0000.jsonl")
    assert row["prompt"] == mine[3]["prompt"] and row["seed"] == mine[3]["seed"]


def log(logs):
    return processes.log_of(logs, 0).read_text(errors="replace")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_evaluation_of_a_cascade_in_a_bucket(files, failing_bucket, tmp_path):
    """Catches a part of the evaluation that needs a local directory, and results that depend on
    where they are written; a second run computes nothing again.
    """
    bucket, rng = failing_bucket, np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(9):
        pixels = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    base = {"base": files["base"]}
    command = [
        *("-m", "imagen_jax.evaluate", *tiny_cascade.options(base, "cascade")),
        *("--suite=prompts", f"--suite_file={tmp_path / 'prompts.txt'}", "--per_prompt=4"),
        *(f"--images={tmp_path / 'images'}", "--network=efficientnet-lite0", "--metrics=kid"),
    ]

    def run(name, output, *more):
        given = [*command, f"--output={output}", *more]
        started = processes.start(lambda i: given, tmp_path / name, 1, 1)
        processes.finish(started, tmp_path / name)
        return log(tmp_path / name)

    run("disk", tmp_path / "out")
    run("bucket", bucket)
    metrics = [
        storage.read_json(place / "evaluation.json")["metrics"]
        for place in (tmp_path / "out", bucket)
    ]
    assert metrics[0] == metrics[1]
    assert "24 of 24 pictures are there already" in run("again", bucket)
    grid = run("grid", bucket / "grid", "--grid=base.w=1,3")
    assert f"all results: {bucket}/grid/grid.json" in grid
    assert len(storage.read_json(bucket / "grid" / "grid.json")["points"]) == 2
    compare = ["-m", "imagen_jax.evaluate", f"--compare={bucket}", f"--compare={tmp_path / 'out'}"]
    compare += [f"--output={bucket / 'compared'}"]
    started = processes.start(lambda i: compare, tmp_path / "compare", 1, 1)
    processes.finish(started, tmp_path / "compare")
    assert storage.read_json(bucket / "compared" / "comparison.json")["differences"]
