"""OUTPUT while prepare_data makes it: work files, the manifest, work of earlier versions."""

import os
import shutil
from pathlib import Path

import pytest

from imagen_jax import locks
from imagen_jax.data import records
from imagen_jax.data.prepare import captions, ingest, passes, work_directory
from tests.data.synthetic_source import FakeEncoder, prepare, tree


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("partial/plan/thesis.txt", "partial is in the way"),
        ("partial/thesis.txt", "partial is in the way"),
        ("images/thesis.txt", "data exists and is not prepared data"),
        ("thesis.txt", "data exists and is not prepared data"),
    ],
)
def test_foreign_files_are_neither_published_nor_removed(folder, tmp_path, name, message):
    """Catches files of a user below the names that prepare_data uses."""
    thesis = tmp_path / "data" / name
    thesis.parent.mkdir(parents=True)
    thesis.write_text("keep")
    with pytest.raises(ValueError, match=f"{message}.*: choose another --output"):
        prepare(folder, tmp_path / "data")
    assert thesis.read_text() == "keep"


def test_one_at_a_time(folder, tmp_path):
    """Catches two runs in one directory."""
    with (
        work_directory.locked(tmp_path / "data"),
        pytest.raises(ValueError, match="another process is preparing data in"),
    ):
        prepare(folder, tmp_path / "data")


def test_a_new_volume_is_filled_without_a_rename(folder, whole, tmp_path, monkeypatch):
    """Catches a mount point that is replaced, and directories that are renamed to their place."""
    (tmp_path / "data" / "lost+found").mkdir(parents=True)
    renamed, rename = [], os.rename
    monkeypatch.setattr(Path, "rmdir", lambda path: pytest.fail(f"{path} was removed"))
    monkeypatch.setattr(os, "rename", lambda *paths: renamed.append(paths) or rename(*paths))
    prepare(folder, tmp_path / "data")
    assert tree(tmp_path / "data") == tree(whole) and not renamed


def test_the_manifest_is_written_last(folder, tmp_path, monkeypatch):
    """Catches a file that readers need and that a kill after the manifest leaves out."""
    order, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: order.append(Path(b).name) or replace(a, b))
    prepare(folder, tmp_path / "data")
    assert order[-1] == "manifest.json" and len(order) > 10


def test_what_others_have_written_into_unfinished_work_is_named(folder, tmp_path, monkeypatch):
    """Catches advice to choose another OUTPUT, where days of work are to be continued."""
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(passes, "finish", lambda *_: (_ for _ in ()).throw(Stop()))
        prepare(folder, tmp_path / "data")
    (tmp_path / "data" / "0000_duck.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="unfinished work of prepare_data and 0000_duck.png"):
        prepare(folder, tmp_path / "data")


def leave_work_of_an_earlier_version(folder, output, stop):
    """OUTPUT.partial as earlier versions left it, after images or all shards were written."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(*stop, lambda *_: (_ for _ in ()).throw(Stop()))
        prepare(folder, output)
    earlier, result = output.with_name("data.partial"), output / "partial" / "result"
    result.mkdir()
    for path in list(output.iterdir()):
        if path.name != "partial":
            path.rename(result / path.name)
    (output / "partial").rename(earlier)
    output.rmdir()


@pytest.mark.parametrize("stop", [(captions, "_share"), (passes, "finish")])
def test_work_of_earlier_versions_is_continued(folder, whole, tmp_path, monkeypatch, stop):
    """Catches weeks of work that an update of the program loses, or spoils when it is killed."""
    output, earlier, encoder = tmp_path / "data", tmp_path / "data.partial", FakeEncoder()
    leave_work_of_an_earlier_version(folder, output, stop)
    with pytest.raises(ValueError, match="data is not complete: the same prepare_data command"):
        records.Prepared(output)
    with (
        locks.only_process(earlier, "preparing data in"),
        pytest.raises(ValueError, match="another process is preparing data in"),
    ):
        prepare(folder, output)
    monkeypatch.setattr(ingest, "write_images", lambda *_: pytest.fail("written twice"))
    rename, calls = os.rename, []

    def killed(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise Stop
        rename(*paths)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, "rename", killed)
        prepare(folder, output)
    prepare(folder, output, encoder)
    assert tree(output) == tree(whole) and not earlier.exists()
    assert len(encoder.encoded) == (0 if stop[1] == "finish" else 21)


def test_left_over_work_is_removed(folder, whole, tmp_path):
    """Catches a kill while work files are removed, after which the data is refused."""
    output = Path(shutil.copytree(whole, tmp_path / "data"))
    for left in (
        output / "partial" / "checked" / "0-4.json",
        tmp_path / "data.partial/request.json",
    ):
        left.parent.mkdir(parents=True)
        left.write_text("{}")
    prepare(folder, output)
    assert tree(tmp_path) == {f"data/{name}": digest for name, digest in tree(whole).items()}


def test_a_finished_shard_that_is_cut_short_is_not_complete(folder, whole, tmp_path):
    """Catches a copy that was interrupted and counts as complete."""
    shutil.copytree(whole, tmp_path / "data")
    shard = next((tmp_path / "data" / "images").glob("images-train*"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match="cut short: remove"):
        prepare(folder, tmp_path / "data")
