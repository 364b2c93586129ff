"""The base of sharded sources: patterns, names of shards, shards that are missing or change."""

import hashlib
import os

import pytest

from imagen_jax.data.sources import sharded
from imagen_jax.data.sources.shard_index import Summary
from imagen_jax.data.sources.sharded import ShardedSource
from imagen_jax.data.sources.source import SourceItem


class Lines(ShardedSource):
    """A source whose shards are texts and whose items are their lines."""

    kind = "lines"

    def summarize(self, path):
        data = path.read_bytes()
        return Summary(len(data.split()), hashlib.sha256(data).hexdigest())

    def open_shard(self, path):
        return Shard(self.label(path), path.read_bytes().split())


class Shard:
    def __init__(self, label, lines):
        self._label, self._lines = label, lines

    def __len__(self):
        return len(self._lines)

    def __getitem__(self, position):
        return SourceItem(f"{self._label}/{position}", self._lines[position], [], "train")

    def close(self):
        self._lines = None


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02d}.txt").write_text(" ".join(f"{i}.{j}" for j in range(i % 3)))
    return tmp_path


def read(source):
    return [source[i].image.decode() for i in range(len(source))]


def test_items_of_all_shards_in_order_with_two_open(folder):
    """Catches an empty shard that shifts the items after it, and shards that stay open."""
    source = Lines(f"{folder}/*.txt", {})
    expected = [f"{i}.{j}" for i in range(12) for j in range(i % 3)]
    assert read(source) == expected and len(source._open) == sharded.OPEN_SHARDS
    assert [source[i].image.decode() for i in reversed(range(len(source)))] == expected[::-1]


@pytest.mark.parametrize(
    "pattern, numbers",
    [
        ("{07..09}.txt", [7, 8, 9]),
        ("{11..10}.txt,04.txt", [11, 10, 4]),
        ("0{1,2}.txt", [1, 2]),
        ("0[12].txt", [1, 2]),
        ("1?.txt", [10, 11]),
    ],
)
def test_patterns(folder, pattern, numbers, monkeypatch):
    """Catches a comma in braces taken for a separator, and lost leading zeros."""
    monkeypatch.chdir(folder)
    found = sharded.expand("lines", pattern)
    assert [int(path.stem) for path in found] == numbers


def test_a_path_with_brackets_is_a_file(tmp_path):
    """Catches a file name that is taken for a glob."""
    (tmp_path / "a[1].txt").write_text("x")
    assert sharded.expand("lines", f"{tmp_path}/a[1].txt") == [tmp_path / "a[1].txt"]


def test_shards_that_are_missing_are_noted(folder):
    """Catches a gap in a download that nobody sees, a pipe that blocks, and a folder that ends."""
    (folder / "13.txt").mkdir()
    os.mkfifo(folder / "14.txt")
    source = Lines(f"{folder}/{{10..14}}.txt", {})
    assert read(source) == ["10.0", "11.0", "11.1"]
    notes = [(note["id"], note["reason"]) for note in source.notes()]
    assert notes == [(f"{i}.txt", "missing_shard") for i in (12, 13, 14)]


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("20.txt", "no file matches .*20.txt: check the path"),
        ("{20..22}.txt", "no file matches"),
        ("0?.jpg", "no file matches"),
        ("{01,01}.txt", "01.txt is given twice"),
        ("{00,03}.txt", "lines:.* has no items"),
    ],
)
def test_patterns_without_items_are_errors(folder, pattern, message):
    """Catches a typing error that prepares a part of the data."""
    with pytest.raises(ValueError, match=message):
        Lines(f"{folder}/{pattern}", {})


def test_shards_of_one_stem_have_different_names(tmp_path):
    """Catches items of different shards with one id, and ids that depend on the place."""
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "0.txt").write_text("x")
    source = Lines(f"{tmp_path}/*/0.txt", {})
    assert [item.id for item in map(source.__getitem__, range(2))] == ["a/0/0", "b/0/0"]
    single = Lines(f"{tmp_path}/a/0.txt", {})
    assert single[0].id == "0/0"


def test_description_depends_on_content_not_on_place(folder, tmp_path_factory):
    """Catches a continued run over other shards, and a copy that is refused."""
    copy = tmp_path_factory.mktemp("copy")
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    described = [Lines(f"{place}/*.txt", {"a": 1}).describe() for place in (folder, copy)]
    assert described[0] == described[1]
    (copy / "11.txt").write_text("11.0 11.2")
    assert Lines(f"{copy}/*.txt", {"a": 1}).describe() != described[0]


def test_a_shard_that_changes_is_an_error(folder):
    """Catches items that move to other indices while they are prepared."""
    source = Lines(f"{folder}/*.txt", {})
    (folder / "11.txt").write_text("one")
    with pytest.raises(ValueError, match="11.txt changed while it was being read"):
        read(source)
