"""Which files of a folder are read: through links, past what cannot be read, and what is noted."""

import errno
import os

import pytest

from imagen_jax.data.sources import folder as folder_module
from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.data.sources.walk import files_below
from tests.data import synthetic

PNG = synthetic.encode(synthetic.gradient(8))


def fill(directory, *names):
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_bytes(PNG)


def ids(source):
    return [source[i].id for i in range(len(source))]


def test_linked_folders_are_read(tmp_path):
    """Catches pictures behind symbolic links that are missing without a note."""
    fill(tmp_path / "disk1", "a.png")
    fill(tmp_path / "disk2" / "deep", "b.png")
    fill(tmp_path / "root", "c.png")
    (tmp_path / "root" / "one").symlink_to("../disk1")
    (tmp_path / "root" / "two").symlink_to(tmp_path / "disk2")
    (tmp_path / "disk2" / "more").symlink_to(tmp_path / "disk3")
    fill(tmp_path / "disk3", "d.png")
    source = FolderSource(tmp_path / "root", 0.0)
    assert ids(source) == ["c.png", "one/a.png", "two/deep/b.png", "two/more/d.png"]
    assert source[1].image == PNG and source.notes() == []


def test_each_folder_is_read_once_under_its_own_name(tmp_path):
    """Catches a walk that never ends in a cycle of links, and a link that renames a real folder."""
    fill(tmp_path / "root" / "real", "a.png")
    (tmp_path / "root" / "again").symlink_to("real")
    (tmp_path / "root" / "real" / "up").symlink_to("..")
    files, notes = files_below(tmp_path / "root")
    assert files == ["real/a.png"]
    assert [(note["id"], note["reason"]) for note in notes] == [
        ("again", "linked_folder_again"),
        ("real/up", "linked_folder_again"),
    ]


def test_files_that_are_not_looked_at_are_counted(tmp_path):
    """Catches other suffixes, orphaned captions and shadow files of macOS lost in silence."""
    fill(tmp_path, "a.png", "b.heic", "c.heic", "d.heic", "e.heic")
    for name in ("a.txt", "orphan.txt", "._a.png", "._a.txt", "README"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07\xff" if name[0] == "." else b"x")
    source = FolderSource(tmp_path, 0.0)
    assert ids(source) == ["a.png"] and source[0].captions == ["x"]
    assert source.notes() == [
        {"id": "._*", "reason": "ignored_file", "count": 2, "files": ["._a.png", "._a.txt"]},
        {"id": "*", "reason": "ignored_file", "count": 1, "files": ["README"]},
        {
            "id": "*.heic",
            "reason": "ignored_file",
            "count": 4,
            "files": ["b.heic", "c.heic", "d.heic"],
        },
        {"id": "*.txt", "reason": "ignored_file", "count": 1, "files": ["orphan.txt"]},
    ]


def test_notes_on_ignored_files_are_few(tmp_path):
    """Catches a note a file where every file has a suffix of its own."""
    fill(tmp_path, "a.png", *(f"log.{i}" for i in range(200)))
    notes = FolderSource(tmp_path, 0.0).notes()
    assert len(notes) == folder_module._KINDS + 1
    assert sum(note["count"] for note in notes) == 200


def test_a_folder_without_pictures_says_what_is_there(tmp_path):
    """Catches "no images" without a word on the files of a format that is not read."""
    fill(tmp_path, "a.heic")
    with pytest.raises(ValueError, match=r"holds no images .*; not read: \*.heic ignored_file"):
        FolderSource(tmp_path, 0.0)


def test_what_cannot_be_read_is_noted(tmp_path, monkeypatch):
    """Catches unreadable folders, broken links and names that are not UTF-8 in a traceback."""
    fill(tmp_path, "a.png")
    fill(tmp_path / "secret", "b.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(PNG)
    refuse(monkeypatch, tmp_path / "secret", errno.EACCES)
    source = FolderSource(tmp_path, 0.0)
    assert ids(source) == ["a.png"]
    assert {(note["id"], note["reason"]) for note in source.notes()} == {
        ("secret", "unreadable_folder"),
        ("gone.png", "broken_link"),
        ("caf\\udce9.png", "invalid_file_name"),
    }


def refuse(monkeypatch, directory, number):
    scandir = os.scandir

    def refusing(path):
        if str(path) == str(directory):
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


def test_a_folder_that_may_come_back_is_an_error(tmp_path, monkeypatch):
    """Catches half a data set prepared because a network file system did not answer."""
    fill(tmp_path, "a.png")
    fill(tmp_path / "remote", "b.png")
    refuse(monkeypatch, tmp_path / "remote", errno.ESTALE)
    with pytest.raises(OSError, match="Stale file handle"):
        FolderSource(tmp_path, 0.0)
    refuse(monkeypatch, tmp_path, errno.EACCES)
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        FolderSource(tmp_path, 0.0)


def test_the_output_is_not_a_part_of_the_source(tmp_path):
    """Catches work in progress that changes the notes, and so the bytes, of a continued run."""
    fill(tmp_path, "a.png")
    fill(tmp_path / "data.partial" / "checked", "0.json")
    fill(tmp_path / "data", "manifest.json")
    assert FolderSource(tmp_path, 0.0, tmp_path / "data").notes() == []


@pytest.mark.parametrize(
    ("number", "fault"), [(errno.EACCES, "Permission denied"), (errno.ENAMETOOLONG, "too long")]
)
def test_an_unreadable_image_costs_itself(tmp_path, monkeypatch, number, fault):
    """Catches a picture without permission, or with an impossible name, that ends the run."""
    fill(tmp_path, "a.png", "b.png")
    read_bytes = type(tmp_path).read_bytes

    def refusing(path):
        if path.name == "a.png":
            raise OSError(number, os.strerror(number), str(path))
        return read_bytes(path)

    monkeypatch.setattr(type(tmp_path), "read_bytes", refusing)
    source = FolderSource(tmp_path, 0.0)
    assert source[0].image is None and source[0].fault.reason == "unreadable_image"
    assert fault in source[0].fault.detail and source[1].image == PNG


def test_a_name_too_long_for_the_file_system(tmp_path):
    """Catches a file name in a captions file at which the system call itself fails."""
    fill(tmp_path, "a.png")
    (tmp_path / "captions.csv").write_text(f"file,caption\n{'x' * 300}.png,y\na.png,z\n")
    source = FolderSource(tmp_path, 0.0)
    assert [item.image is None for item in (source[0], source[1])] == [False, True]


@pytest.mark.parametrize("url", ["gs://bucket/pictures", "s3://bucket/x", "https://host/x"])
def test_urls_are_refused(url):
    """Catches a URL that pathlib turns into a local path: "gs:/bucket is not a directory"."""
    with pytest.raises(ValueError, match=f"{url} is a URL, only local paths work: mount the"):
        FolderSource(url, 0.0)
