"""The TFDS source: captions of every shape, and mistakes in one clear line."""

import pickle

import numpy as np
import pytest

from imagen_jax.data import records
from imagen_jax.data.prepare import passes
from imagen_jax.data.prepare.checks import check
from imagen_jax.data.sources.tfds import TfdsSource
from imagen_jax.encoders_in_turn import Encoders
from tests.data import synthetic
from tests.data.sources import layouts
from tests.data.synthetic_source import SETTINGS, FakeEncoder


@pytest.fixture
def dataset(tmp_path):
    """A TFDS directory of four images with a caption, a list, and captions inside objects."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    objects = tfds.features.Sequence({"text": text, "area": np.float32})
    image = tfds.features.Image(shape=(None, None, 3))
    features = tfds.features.FeaturesDict(
        {"image": image, "title": text, "many": tfds.features.Sequence(text), "objects": objects}
    )
    rows = []
    for i in range(4):
        picture = synthetic.encode(synthetic.gradient(16, i), "JPEG")
        parts = [{"text": f"part {i}.{k}", "area": 1.0} for k in range(2)]
        rows.append(
            {"image": picture, "title": f"title {i}", "many": [f"m{i}"] * i, "objects": parts}
        )
    name = records.shard_name("captions", "train", 0, 1)
    shards = {
        name: records.write_shard(tmp_path, name, [features.serialize_example(row) for row in rows])
    }
    records.write_tfds_metadata(tmp_path, "captions", features, shards)
    return tmp_path / "captions"


@pytest.mark.parametrize(
    ("feature", "expected"),
    [("title", ["title 2"]), ("many", ["m2", "m2"]), ("objects/text", ["part 2.0", "part 2.1"])],
)
def test_tfds_captions(dataset, feature, expected):
    """Catches bytes for text, a caption a letter, unreachable nested captions, decoded images."""
    source = pickle.loads(
        pickle.dumps(TfdsSource(str(dataset), None, "train", "image", feature, 0.0))
    )
    item = source[2]
    assert len(source) == 4 and item.captions == expected and item.id == "train-000000002"
    assert item.image == synthetic.encode(synthetic.gradient(16, 2), "JPEG")


def test_tfds_is_prepared_in_processes(dataset, tmp_path):
    """Catches a TFDS reader that cannot be sent to a worker."""
    source = TfdsSource(str(dataset), None, "train", "image", "title", 0.0)
    settings = passes.Settings(**SETTINGS | {"processes": 2})
    manifest = passes.prepare(source, Encoders.single(FakeEncoder()), tmp_path / "data", settings)
    assert (
        manifest["counts"]["images"] == {"train": 4, "heldout": 0}
        and manifest["counts"]["captions"] == 4
    )
    assert records.Prepared(tmp_path / "data").captions()[3].text == "title 3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "validation"}, "has no split 'validation' on disk .found train"),
        ({"image": "picture"}, "has no feature 'picture' .it has "),
        ({"caption": "texts/text"}, "has no feature 'texts/text'"),
        ({"caption": "objects/name"}, "has no feature 'objects/name'"),
        ({"name": "no_such_dataset_at_all"}, "is not a TFDS dataset or a directory of one"),
    ],
)
def test_tfds_mistakes_are_one_clear_line(dataset, changes, message):
    """Catches tracebacks out of TFDS for a misspelt split, feature or name."""
    options = {
        "name": str(dataset),
        "data_dir": None,
        "split": "train",
        "image": "image",
        "caption": "title",
        "heldout": 0.0,
    }
    with pytest.raises(ValueError, match=message) as error:
        TfdsSource(**options | changes)
    assert "\n" not in str(error.value)


def test_a_caption_that_is_not_utf8_costs_only_itself(tmp_path):
    """Catches a decoding error that ends the run, and one that costs the neighbours."""
    pictures = layouts.collection(8)
    pictures[3].captions[0] = b"caf\xe9"
    source = layouts.opened(*layouts.tfds_array_record(tmp_path, pictures))
    found = [check(source[i], 0) for i in range(8)]
    assert [item.reason for item in found] == [""] * 3 + ["unreadable_captions"] + [""] * 4
    assert found[3].detail.startswith("not UTF-8 text")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("captions-train.array_record-00001-of-00002", lambda data: data[: len(data) // 2]),
        ("captions-train.array_record-00001-of-00002", lambda _: b""),
        ("captions-train.array_record-00001-of-00002", lambda _: b"<html>404 Not Found</html>"),
        ("captions-train.array_record-00001-of-00002", lambda _: None),
        ("dataset_info.json", lambda data: data[:9]),
        ("features.json", lambda data: data[:9]),
        ("features.json", lambda _: None),
    ],
)
def test_damaged_data_are_named(tmp_path, file, change):
    """Catches a traceback out of TFDS, and a message without the dataset or a remedy."""
    args = layouts.tfds_array_record(tmp_path, layouts.collection(8))
    path = tmp_path / "captions" / file
    data = change(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(ValueError, match=r"captions.* cannot be .*; download or copy it") as error:
        source = layouts.opened(*args)
        assert source[3].captions
        source[4]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()], ids=repr)
def test_an_error_of_the_machine_is_not_damage(dataset, error):
    """Catches "download it again" for a failure after which a retry may succeed."""
    source = TfdsSource(str(dataset), None, "train", "image", "title", 0.0)

    class Failing:
        def __getitem__(self, index):
            raise error

    source._rows = Failing()
    with pytest.raises(type(error)):
        source[0]
