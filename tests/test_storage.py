"""Local paths, files without their content, atomic writes."""

import errno
import json
from pathlib import Path

import pytest

from imagen_jax import checksums, locks, storage

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 11000\n"


@pytest.mark.parametrize(
    "path", ["gs://bucket/run", Path("gs://bucket/run"), "s3://b/x", "file:///tmp/x", "gs:/b"]
)
def test_urls_are_refused(path):
    """Catches a check for "://", which a Path does not contain: gs://b becomes the directory gs:"""
    with pytest.raises(ValueError, match="--output .* is a URL, only local paths work"):
        storage.check_local("--output", path)


def test_a_path_that_is_not_utf8_is_refused():
    """Catches a traceback of ArrayRecord after all captions are encoded."""
    storage.check_utf8("--output", "runs/caf\u00e9")
    with pytest.raises(ValueError, match="--output .* is not a UTF-8 path: rename"):
        storage.check_utf8("--output", Path("runs/caf\udce9"))


@pytest.mark.parametrize(
    "path",
    ["", "runs/base", "/mnt/gs/bucket/run", "embedded:base_16", "C:/x", "google/t5", "a:b/c"],
)
def test_local_paths_pass(path):
    """Catches a check that refuses every path with a colon."""
    storage.check_local("--output", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.json is empty; download"),
        (POINTER.encode(), "x.json is a Git LFS pointer .* `git lfs pull`"),
        (b'{"a": [1, 2', "x.json is not valid JSON .* download or copy it again"),
        (b"\xff\xfe{", "x.json is not valid JSON"),
        (b"[" * 100_000, "x.json is not valid JSON"),
    ],
)
def test_bad_json_is_named(tmp_path, content, message):
    """Catches json's own error, which does not say which file is cut short or a pointer."""
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        storage.read_json(path)


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    """Catches a reader that refuses the mark that Windows editors write."""
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert storage.read_json(tmp_path / "x.json") == {"a": 1}


def test_damage_names_a_pointer(tmp_path):
    """Catches a checkpoint in a repository with Git LFS that is only called damaged."""
    (tmp_path / "weights").write_bytes(b"weights")
    checksums.seal(tmp_path)
    sums = (tmp_path / checksums.CHECKSUMS).read_bytes()
    (tmp_path / "weights").write_text(POINTER)
    assert "weights does not match its checksum: it is a Git LFS" in checksums.find_damage(tmp_path)
    (tmp_path / "weights").write_bytes(b"weights")
    (tmp_path / checksums.CHECKSUMS).write_text(POINTER)
    assert checksums.find_damage(tmp_path).startswith("SHA256SUMS is a Git LFS pointer")
    (tmp_path / checksums.CHECKSUMS).write_bytes(sums)
    assert checksums.find_damage(tmp_path) is None


def test_a_full_disk_leaves_the_old_file_alone(tmp_path, monkeypatch):
    """Catches a temporary file that keeps a full disk full, and an error that names no file."""
    storage.write_atomically(tmp_path / "x", b"old")

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "flush", full)
    with pytest.raises(OSError, match="No space left") as error:
        storage.write_atomically(tmp_path / "x", b"new")
    assert error.value.filename == str(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_blocked_file_is_named_by_its_own_name(tmp_path):
    """Catches an error that names the temporary file only."""
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError) as error:
        storage.write_atomically(tmp_path / "x", b"new")
    assert str(error.value).endswith(f"{str(tmp_path / 'x')!r}")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_that_cannot_be_read_is_not_called_the_output(tmp_path):
    """Catches an error of the source that names the file which is written from it."""

    def lines():
        yield b"first"
        raise OSError(errno.EIO, "Input/output error", "source")

    with pytest.raises(OSError, match="Input/output error: 'source'"):
        storage.write_lines(tmp_path / "x", lines())
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_written_are_found(tmp_path):
    """Catches a directory in place of a file, a file or a dangling link in place of a directory,
    and a refusal of what an earlier run has written.
    """
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    storage.check_outputs(tmp_path, ["file", "new"], ["directory", "other"])
    with pytest.raises(ValueError, match=r"/directory is a directory, but a file of that name .*"):
        storage.check_outputs(tmp_path, ["directory"], [])
    for name in ("file", "link"):
        with pytest.raises(ValueError, match=f"/{name} is a file, but a directory .*: remove it"):
            storage.check_outputs(tmp_path, [], [name])


def test_a_whole_directory_does_not_replace_another(tmp_path):
    """Catches the second of two commands with one output, which fails after all of its work."""
    output = tmp_path / "study"
    output.mkdir()
    (output / "key.json").touch()
    with (
        pytest.raises(ValueError, match="is not empty: give another directory"),
        locks.whole_directory(output, "making a study in"),
    ):
        pytest.fail("the work began")
    assert [path.name for path in tmp_path.iterdir()] == ["study"]
