"""Shards of the right size in the wrong place are found when they are first read."""

import json
import pickle
import re
import shutil

import pytest

from imagen_jax.data import first_records, records
from imagen_jax.data.prepare import passes
from imagen_jax.data.prepare.preview import Bytes
from tests.data.synthetic_source import NamedEncoder, named, prepare, tree, two_encoders


class Negated(NamedEncoder):
    """Another encoder with features of the same size."""

    def features(self, text):
        return -super().features(text)


def shard(store, number):
    return records.shard_name(store, "train", number, 3)


def swap(root, store):
    """Exchanges the first two shards of a store, which have the same size."""
    paths = [root / shard(store, number) for number in (0, 1)]
    contents = [path.read_bytes() for path in paths]
    assert len(contents[0]) == len(contents[1]) and contents[0] != contents[1]
    for path, content in zip(paths, reversed(contents)):
        path.write_bytes(content)


def refused(name):
    return pytest.raises(ValueError, match=f"{re.escape(name)} is not the shard that the manifest")


def test_features_of_another_encoder_are_refused(folder, two, tmp_path):
    """Catches a training on the features of another encoder, whose shards have the same sizes."""
    others = two_encoders() | {"wide": Negated("wide fake", 12, 5, 6)}
    prepare(folder, tmp_path / "others", named(others))
    copied = shutil.copytree(two, tmp_path / "copied")
    shutil.copytree(tmp_path / "others/captions_wide", copied / "captions_wide", dirs_exist_ok=True)
    prepared = records.Prepared(copied)
    assert prepared.features("tiny")[0].embedding.shape[1] == 4
    with refused(shard("captions_wide", 0)) as caught:
        prepared.features("wide")[3]
    assert "prepare_data --verify" in str(caught.value)
    with pytest.raises(ValueError, match="captions_wide.* is damaged or another shard"):
        prepare(folder, copied, named())


def test_permuted_shards_are_refused(two, tmp_path):
    """Catches captions and images that are read from each other's place, also by data workers."""
    copied = shutil.copytree(two, tmp_path / "copied")
    swap(copied, "captions")
    swap(copied, "images")
    prepared = records.Prepared(copied)
    for store, opened in (("captions", prepared.captions()), ("images", prepared.images("train"))):
        for reader in (opened, pickle.loads(pickle.dumps(opened))):
            with refused(shard(store, 1)):
                reader[8]
            with refused(shard(store, 1)):  # the first error does not count as a comparison
                reader[9]
    assert prepared.captions()[16].text


def test_unfinished_work_with_permuted_shards_is_done_again(folder, two, tmp_path, monkeypatch):
    """Catches a continued preparation that publishes shards in the wrong place."""
    monkeypatch.setattr(passes, "preview", lambda *_: Bytes(0, 0, 0))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(passes, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(folder, tmp_path / "data", named())
    for store in ("captions", "captions_tiny", "images"):
        swap(tmp_path / "data", store)
    prepare(folder, tmp_path / "data", named())
    assert tree(tmp_path / "data") == tree(two)


def test_data_of_earlier_versions_are_read(folder, two, tmp_path):
    """Catches earlier data that is refused, or has another hash, without the checksums."""
    copied = shutil.copytree(two, tmp_path / "copied")
    (copied / first_records.FILE).unlink()
    prepared = records.Prepared(copied)
    assert prepared.hash == records.Prepared(two).hash
    assert prepared.captions()[8].text == records.Prepared(two).captions()[8].text
    prepare(folder, copied, named())  # is complete


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "first_records.json"), ('{"manifest": "0", "sha256": {}}', "another manifest")],
)
def test_checksums_that_are_damaged_are_one_line(two, tmp_path, content, message):
    """Catches a traceback for a damaged file, and checksums of other data."""
    copied = shutil.copytree(two, tmp_path / "copied")
    sums = json.loads((copied / first_records.FILE).read_text())["sha256"]
    assert sums.keys() == records.Prepared(two).manifest["shards"].keys()
    (copied / first_records.FILE).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        records.Prepared(copied).captions()
    assert "remove the file" in str(caught.value)
