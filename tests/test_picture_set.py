"""Sets of pictures: numbers that belong to one set, rows written once, continued sets."""

import concurrent.futures
import dataclasses
import errno
import fcntl
import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagen_jax import picture_set, pictures, set_reservations
from imagen_jax.picture_set import PictureSet, Requests

IMAGE = np.zeros((4, 4, 3), np.uint8)
JOB = {"prompts_sha256": "x"}


def reserve(directory, job=JOB, count=5):
    with set_reservations.reserve(directory, job, count) as first:
        return first


def new_set(directory, prompts=("a red apple", "ein Käse"), first=0, process="p"):
    requests = Requests(list(prompts), 1, 7)
    part = picture_set.part_path(directory, first, process)
    return PictureSet(directory, requests, {"stages": ["base"]}, first, part)


def test_numbers_follow_pictures_and_sets(tmp_path):
    """Catches a set that begins inside another one, whose pictures are not written yet, or at the
    number of an older picture.
    """
    pictures.write_png(tmp_path / "0007_old.png", IMAGE)
    assert reserve(tmp_path, JOB, 5) == 8
    assert reserve(tmp_path, {"other": 1}, 3) == 13
    assert reserve(tmp_path / "new") == 0


def test_the_same_job_continues_its_set(tmp_path):
    """Catches an interrupted command that begins again, and another command that continues it."""
    first = reserve(tmp_path)
    assert reserve(tmp_path) == first
    assert reserve(tmp_path, JOB, 6) != first  # more pictures
    with set_reservations.reserve(tmp_path, JOB, 5) as held:
        # The first process is alive, so the second draws a set of its own.
        assert held == first != reserve(tmp_path)


def test_written_pictures_are_those_of_one_job(tmp_path):
    """Catches a check of the disk that passes because of the pictures of other settings."""
    first = reserve(tmp_path, {"other": 1}, 2)
    new_set(tmp_path, first=first).add(0, [IMAGE])
    assert picture_set.count_written(tmp_path, {"other": 1}, 2) == 1
    assert picture_set.count_written(tmp_path, {"other": 1}, 3) == 0
    assert picture_set.count_written(tmp_path, JOB, 2) == 0
    assert picture_set.count_written(tmp_path / "none", JOB, 2) == 0


def test_sets_of_many_commands_do_not_overlap(tmp_path):
    """Catches two commands that start at the same time with the same numbers."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [(tmp_path, {"job": i}, 1 + i % 3) for i in range(24)]
        firsts = list(pool.map(lambda job: reserve(*job), jobs))
    numbers = [first + i for first, (_, _, count) in zip(firsts, jobs) for i in range(count)]
    assert sorted(numbers) == list(range(48))


def test_an_error_of_the_work_is_not_taken_for_a_number_in_use(tmp_path):
    """Catches a FileExistsError inside the context that reserves one more set."""
    with pytest.raises(FileExistsError, match="other"), set_reservations.reserve(tmp_path, JOB, 5):
        raise FileExistsError("other")
    assert list(set_reservations.sets(tmp_path)) == [0]


def test_a_set_file_that_was_cut_off_blocks_nothing(tmp_path, caplog):
    """Catches a killed command that makes every later one fail or wait, and one that hides it."""
    (tmp_path / "set_0004.json").write_text('{"count": 1')
    began = time.monotonic()
    assert reserve(tmp_path) == 5 and reserve(tmp_path, {"other": 1}) == 10
    assert time.monotonic() - began < set_reservations.PATIENCE_S / 4
    (warning,) = caplog.messages
    assert "set_0004.json is damaged; its pictures are kept but not continued" in warning


@pytest.mark.parametrize("links", [True, False])
def test_no_set_file_is_left_of_a_full_disk(tmp_path, monkeypatch, links):
    """Catches an empty file under the final name, which no later command can continue."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    if not links:
        monkeypatch.setattr(set_reservations.os, "link", unsupported)
    assert reserve(tmp_path) == 0 == reserve(tmp_path)
    calls = iter([lambda _: None] * (not links))
    monkeypatch.setattr(set_reservations.os, "fsync", lambda file: next(calls, full)(file))
    with pytest.raises(OSError, match=r"No space left .*set_0005\.json"):
        reserve(tmp_path, {"other": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["set_0000.json"]


def test_a_set_file_appears_whole_and_locked(tmp_path, monkeypatch):
    """Catches a reader that takes a set for damaged, or continues it, while it is written."""
    sync, seen = set_reservations.os.fsync, []

    def record(descriptor):
        seen.append([path.name for path in tmp_path.glob("set_*")])
        sync(descriptor)

    monkeypatch.setattr(set_reservations.os, "fsync", record)
    with set_reservations.reserve(tmp_path, JOB, 5) as first:
        assert seen == [[]] and list(set_reservations.sets(tmp_path)) == [first]
        assert reserve(tmp_path) == 5


def test_a_set_file_is_awaited_while_it_is_locked(tmp_path):
    """Catches a set that is taken for damaged while another process writes it."""
    path, content = tmp_path / "set_0000.json", {"count": 7, "sha256": "", "job": {}}
    with open(path, "x") as file, concurrent.futures.ThreadPoolExecutor(1) as pool:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = pool.submit(set_reservations.sets, tmp_path)
        time.sleep(0.3)
        assert not found.done()
        file.write(json.dumps(content))
        file.flush()
        assert found.result(timeout=5) == {0: content}


@pytest.mark.parametrize("damage", ["", None, '{"count": 1'])
@pytest.mark.parametrize("kept", ["folders", "part", "manifest"])
def test_no_set_begins_inside_one_whose_file_is_damaged(tmp_path, monkeypatch, kept, damage):
    """Catches pictures that a later set replaces, because the folders of large sets and the rows of
    the damaged set are not counted.
    """
    monkeypatch.setattr(picture_set, "FOLDER_SIZE", 2)
    large = new_set(tmp_path, prompts=["a"] * 4, first=reserve(tmp_path, JOB, 4))
    for row in range(4):
        large.add(row, [IMAGE])
    if kept == "manifest":
        large.finish()
    if kept == "folders":
        large.part.unlink()
    else:  # the pictures are elsewhere, and will come back
        shutil.rmtree(tmp_path / "000000"), shutil.rmtree(tmp_path / "000002")
    (tmp_path / "set_0000.json").unlink()
    if damage is not None:
        (tmp_path / "set_0000.json").write_text(damage)
    assert reserve(tmp_path, {"other": 1}, 4) == 4


def test_a_manifest_lists_every_row_with_its_checksum(tmp_path):
    """Catches rows in the order of the processes, and a checksum of pixels instead of the file."""
    one, two = new_set(tmp_path, process="1"), new_set(tmp_path, process="2")
    two.add(1, [IMAGE, np.full((8, 8, 3), 9, np.uint8)])
    with pytest.raises(ValueError, match=r"1 of 2 pictures .* are missing, row 0 first"):
        one.finish()
    one.add(0, [IMAGE, np.full((8, 8, 3), 8, np.uint8)])
    rows = [json.loads(line) for line in one.finish().read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a red apple", "ein Käse"]
    assert [row["seed"] for row in rows] == [7, 8]
    for row, value in zip(rows, (8, 9)):
        data = (tmp_path / row["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        assert np.asarray(Image.open(tmp_path / row["file"])).flat[0] == value
    names = {path.name for path in tmp_path.iterdir()}
    assert {"0000_a_red_apple.png", "0000_a_red_apple_4.png", "0001_ein_k_se.json"} <= names
    assert not any("part" in name for name in names)
    record = json.loads((tmp_path / "0001_ein_k_se.json").read_text())
    assert record == {"prompt": "ein Käse", "seed": 8, "stages": ["base"]}


@pytest.mark.parametrize("damage", [".png", "_4.png", ".json", "line"])
def test_a_row_counts_once_its_files_and_its_line_are_whole(tmp_path, damage):
    """Catches a line that a killed process cut off, and a picture that was deleted since: without
    that of an earlier stage, no contact sheet can be drawn.
    """
    images = [IMAGE, np.zeros((8, 8, 3), np.uint8)]
    written = lambda: [row["row"] for row in picture_set.part_rows(tmp_path, 0, None, [(4, 4)])]
    part = new_set(tmp_path)
    for row in (0, 1):
        part.add(row, images)
    if damage == "line":
        part.part.write_bytes(part.part.read_bytes()[:-9])
    else:
        (tmp_path / f"0001_ein_k_se{damage}").unlink()
    assert written() == [0]
    with pytest.raises(ValueError, match="1 of 2 pictures .* are missing, row 1 first"):
        dataclasses.replace(part, earlier=[(4, 4)]).finish()
    new_set(tmp_path, process="later").add(1, images)
    assert written() == [0, 1]
    part.finish()


def test_large_sets_are_divided_into_folders(tmp_path, monkeypatch):
    """Catches one folder with every picture of a large set, and files that the manifest names
    without their folder.
    """
    monkeypatch.setattr(picture_set, "FOLDER_SIZE", 2)
    large = new_set(tmp_path, prompts=["a"] * 3, first=1)
    for row in range(3):
        large.add(row, [IMAGE])
    rows = [json.loads(line) for line in large.finish().read_text().splitlines()]
    files = ["000000/0001_a.png", "000002/0002_a.png", "000002/0003_a.png"]
    assert [row["file"] for row in rows] == files
    assert list(picture_set.chunks(tmp_path / "set_0001.jsonl", 2, 1)) == [rows[:2]]
    (tmp_path / "notes.txt").touch()
    reserve(tmp_path)
    picture_set.remove_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_each_row_has_its_prompt_and_seed():
    """Catches --count pictures of one prompt with one seed, and rows in another order."""
    requests = Requests(["a", "b"], 3, 5)
    rows = [(requests.prompt(row), requests.seed(row)) for row in range(len(requests))]
    assert rows == [("a", 5), ("a", 6), ("a", 7), ("b", 8), ("b", 9), ("b", 10)]
    assert requests.job != Requests(["b", "a"], 3, 5).job


def test_rows_without_a_valid_seed_are_refused():
    """Catches seeds that wrap, or an error after hours at the first row with such a seed."""
    assert Requests(["a", "b"], 3, 2**32 - 6).seed(5) == 2**32 - 1
    with pytest.raises(ValueError, match=r"6 pictures from --seed 4294967291 on .* a smaller"):
        Requests(["a", "b"], 3, 2**32 - 5)


def test_pictures_are_read_when_they_are_used(tmp_path):
    """Catches all pictures of a shard in memory before the first one is used, and a picture that
    is not the one that the manifest lists.
    """
    made = new_set(tmp_path, ["a", "b", "c"])
    for row in range(3):
        made.add(row, [IMAGE + row])
    lazy = picture_set.Pictures(tmp_path, picture_set.manifest_rows(made.finish()))
    (tmp_path / "0000_a.png").unlink()
    assert len(lazy) == 3 and [image.flat[0] for image in lazy[1:3]] == [1, 2]
    pictures.write_png(tmp_path / "0001_b.png", IMAGE + 9)
    assert lazy[2].flat[0] == 2
    with pytest.raises(ValueError, match="0001_b.png was changed since it was drawn; delete it"):
        lazy[1]


def test_a_picture_is_decoded_from_the_bytes_that_were_hashed(tmp_path, monkeypatch):
    """Catches a file that is read twice, and pixels of another content than the checksum's."""
    made = new_set(tmp_path, ["a"])
    made.add(0, [IMAGE + 3])
    lazy = picture_set.Pictures(tmp_path, picture_set.manifest_rows(made.finish()))

    def read_once(path, read=Path.read_bytes):
        data = read(path)
        path.unlink()
        return data

    monkeypatch.setattr(Path, "read_bytes", read_once)
    assert (lazy[0] == 3).all()


def test_a_picture_that_is_drawn_again_is_listed_anew(tmp_path):
    """Catches a manifest with the checksum of a picture that was deleted."""
    new_set(tmp_path, ["a"], process="1").add(0, [IMAGE])
    made = new_set(tmp_path, ["a"], process="1")
    made.finish()
    for value, process in enumerate("2143", 1):
        (tmp_path / "0000_a.png").unlink()
        again = new_set(tmp_path, ["a"], process=process)
        again.add(0, [IMAGE + value])
    lazy = picture_set.Pictures(tmp_path, picture_set.manifest_rows(again.finish()))
    assert (lazy[0] == 4).all()


def drawn_set(directory, prompts=("a", "b", "c")):
    """The manifest of a complete set of one process."""
    made = new_set(directory, prompts)
    for row in range(len(prompts)):
        made.add(row, [IMAGE + row])
    return made.finish()


def change(manifest, number, **fields):
    """Changes fields of one row of a manifest."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[number] |= fields
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "fields",
    [{"prompt": "c"}, {"seed": 9}, {"row": 3}, {"row": -2}, {"file": "../b.png"}, {"file": "/b"}],
)
def test_a_row_of_other_requests_counts_as_missing(tmp_path, fields):
    """Catches a manifest that is trusted: a prompt with the picture of another one, for example."""
    manifest = drawn_set(tmp_path / "set")
    for outside in (tmp_path / "b.png", tmp_path / "set" / "b.png"):
        pictures.write_png(outside, IMAGE)
        outside.with_suffix(".json").touch()
    if fields == {"file": "/b"}:
        fields = {"file": str(tmp_path / "b.png")}
    change(manifest, 1, **fields)
    requests = Requests(["a", "b", "c"], 1, 7)
    found = picture_set.part_rows(tmp_path / "set", 0, requests)
    assert [row["row"] for row in found] == [0, 2]


def test_rows_are_read_in_order(tmp_path):
    """Catches features and captions that are paired by the position of a line."""
    manifest = drawn_set(tmp_path)
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[::-1]))
    assert [row["prompt"] for row in picture_set.manifest_rows(manifest)] == ["a", "b", "c"]
    assert [row["prompt"] for row in picture_set.part_rows(tmp_path, 0)] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="lists row 2 in place of row 0; run the command that"):
        list(picture_set.chunks(manifest, 2, 2))
    for wrong, there, number in (([0, 2], 2, 1), ([0, 1, 1, 2], 1, 2), ([1, 2], 1, 0)):
        manifest.write_bytes(b"".join(lines[i] for i in wrong))
        with pytest.raises(ValueError, match=f"lists row {there} in place of row {number}; run"):
            picture_set.manifest_rows(manifest)


DAMAGES = {
    "blank": (b"\n", "Expecting value"),
    "not JSON": (b"{row: 1}\n", "Expecting property name"),
    "not UTF-8": (b'{"row": "\xff"}\n', "can't decode"),
    "not a row": (b"[1]\n", "it is not a JSON object"),
    "too deep": (b"[" * 100_000 + b"\n", "recursion"),
    "incomplete": (b'{"row": 1}\n', "it has no prompt"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_named_and_repaired(tmp_path, damage):
    """Catches a raw error without file and line, and one that the same command does not repair."""
    manifest = drawn_set(tmp_path)
    whole, (line, reason) = manifest.read_bytes(), DAMAGES[damage]
    first, *others = whole.splitlines(keepends=True)
    manifest.write_bytes(b"".join([first, line, *others]))
    for read in (picture_set.manifest_rows, lambda path: list(picture_set.chunks(path, 9, 9))):
        with pytest.raises(ValueError, match=rf"set_0000.jsonl, line 2, .*{reason}.*; run the com"):
            read(manifest)
    new_set(tmp_path, ["a", "b", "c"]).finish()
    assert manifest.read_bytes() == whole


def test_a_whole_manifest_is_not_written_again(tmp_path):
    """Catches a complete set that cannot be evaluated in a read-only directory."""
    manifest = drawn_set(tmp_path)
    before = manifest.stat().st_ino
    assert new_set(tmp_path, ["a", "b", "c"]).finish() == manifest
    assert manifest.stat().st_ino == before


@pytest.mark.parametrize("content", [b"", b"no picture", "cut"])
def test_a_damaged_picture_is_named(tmp_path, content):
    """Catches an error of PIL that names no file, or is taken for a transient failure."""
    path = pictures.write_png(tmp_path / "0000_a_16.png", IMAGE)
    path.write_bytes(path.read_bytes()[:45] if content == "cut" else content)
    for given in (None, path.read_bytes()):
        with pytest.raises(ValueError, match=r"0000_a_16.png is damaged .*; delete it, then run"):
            pictures.read_png(path, content=given)
    with pytest.raises(FileNotFoundError, match=r"0001.png"):
        pictures.read_png(tmp_path / "0001.png")


def test_changed_pictures_are_found(tmp_path, monkeypatch, capsys):
    """Catches the rows of other pictures, and a check of a large set that shows no progress."""
    rows = picture_set.manifest_rows(drawn_set(tmp_path))
    pictures.write_png(tmp_path / "0001_b.png", IMAGE + 9)
    assert picture_set.changed_rows(tmp_path, rows) == rows[1:2]
    assert not capsys.readouterr().err
    monkeypatch.setattr(picture_set, "MANY", 2)
    picture_set.changed_rows(tmp_path, rows)
    assert "pictures checked" in capsys.readouterr().err
