"""Sources: every form of captions is read, and what cannot be read is one clear line."""

import json
import pickle

import numpy as np
import pytest

from imagen_jax import prepare_data
from imagen_jax.data import records, sources
from tests.data import synthetic
from tests.data.synthetic_source import SETTINGS, FakeEncoder


@pytest.fixture
def folder(tmp_path):
    directory = tmp_path / "pictures"
    (directory / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/c.PNG"):
        (directory / name).write_bytes(synthetic.encode(synthetic.gradient(16)))
    return directory


def captions(source):
    return {item.id: item.captions for item in (source[i] for i in range(len(source)))}


def test_captions_in_jsonl(folder):
    """Catches: several lines or several captions of one file lost, images the file does not name forgotten, order of the disk."""
    lines = [{"file": "b.png", "caption": "one"}, {"file": "deep/c.PNG", "captions": ["x", "y"]}, {"file": "b.png", "caption": "two"}]
    (folder / "captions.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    source = sources.FolderSource(folder, 0.0)
    assert list(captions(source).items()) == [("a.png", []), ("b.png", ["one", "two"]), ("deep/c.PNG", ["x", "y"])]
    assert source[1].image == (folder / "b.png").read_bytes() and {source[i].split for i in range(3)} == {"train"}


def test_captions_in_csv(folder):
    """Catches: quoted commas split, the split column ignored."""
    (folder / "captions.csv").write_text('file,caption,split\na.png,"red, round",heldout\nb.png,blue,\n', encoding="utf-8")
    source = sources.FolderSource(folder, 0.0)
    assert captions(source) == {"a.png": ["red, round"], "b.png": ["blue"], "deep/c.PNG": []}
    assert [source[i].split for i in range(3)] == ["heldout", "train", "train"]
    with pytest.raises(ValueError, match="names its own splits, leave --heldout at 0"):
        sources.FolderSource(folder, 0.1)


def test_captions_in_text_files(folder):
    """Catches: text files beside images in sub-directories missed, several lines taken as one caption."""
    (folder / "a.txt").write_text("first\nsecond\n")
    (folder / "deep" / "c.txt").write_text("dög", "utf-8")
    assert captions(sources.FolderSource(folder, 0.0)) == {"a.png": ["first", "second"], "b.png": [], "deep/c.PNG": ["dög"]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"captions.jsonl": '{"file": "a.png", "caption": "x"}\n{"file": "b.png"}'}, "captions.jsonl:2 is not an object with"),
        ({"captions.jsonl": "not json"}, "captions.jsonl:1 is not an object with"),
        ({"captions.jsonl": '{"file": "a.png", "captions": "x"}'}, "file and captions must be text"),
        ({"captions.jsonl": '{"file": "a.png", "caption": "x", "split": "test"}'}, "neither train nor heldout"),
        ({"captions.jsonl": '{"file": "../b.png", "caption": "x"}'}, "../b.png is not in the directory"),
        ({"captions.csv": "file,caption\n/etc/a.png,x\n"}, "/etc/a.png is not in the directory"),
        ({"captions.csv": "name,text\na.png,x\n"}, "must name the columns file and caption"),
        ({"captions.csv": "file,caption\na.png\n"}, "captions.csv:2: file and captions must be text"),
        ({"captions.csv": "file,caption\n", "captions.jsonl": ""}, "keep one"),
        ({"captions.csv": "file,caption,split\na.png,x,train\na.png,y,heldout\n"}, "a.png is in both splits"),
    ],
)
def test_bad_captions_files_are_one_clear_line(folder, files, message):
    """Catches: a caption read as letters, a wrong column or split name accepted, tracebacks."""
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        sources.FolderSource(folder, 0.0)
    assert "\n" not in str(error.value)


def test_folder_without_images_or_missing(tmp_path):
    """Catches: an empty or misspelt directory prepared as an empty data set."""
    with pytest.raises(ValueError, match="holds no images"):
        sources.FolderSource(tmp_path, 0.0)
    with pytest.raises(ValueError, match="is not a directory"):
        sources.FolderSource(tmp_path / "misspelt", 0.0)


def test_heldout_fraction_is_by_id():
    """Catches: a split that depends on order or run, or whose fraction is off; growing it must only add ids."""
    ids = [f"{i}.png" for i in range(4000)]
    small, large = ({i for i in ids if sources.hashed_split(i, fraction) == "heldout"} for fraction in (0.1, 0.25))
    assert abs(len(small) / 4000 - 0.1) < 0.02 and abs(len(large) / 4000 - 0.25) < 0.03 and small < large
    assert not any(sources.hashed_split(i, 0.0) == "heldout" for i in ids)


def test_description_is_the_listing_not_the_place(folder, tmp_path):
    """Catches: a moved folder taken for another source, or changed captions for the same."""
    (folder / "a.txt").write_text("first")
    moved = tmp_path / "elsewhere" / "pictures"
    before = sources.FolderSource(folder, 0.0).describe()
    moved.parent.mkdir()
    folder.rename(moved)
    assert sources.FolderSource(moved, 0.0).describe() == before
    (moved / "a.txt").write_text("changed")
    assert sources.FolderSource(moved, 0.0).describe() != before


@pytest.fixture
def dataset(tmp_path):
    """A TFDS directory of four images, with a single caption, a list of captions, and captions inside objects."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    objects = tfds.features.Sequence({"text": text, "area": np.float32})
    image = tfds.features.Image(shape=(None, None, 3))
    features = tfds.features.FeaturesDict({"image": image, "title": text, "many": tfds.features.Sequence(text), "objects": objects})
    rows = []
    for i in range(4):
        picture = synthetic.encode(synthetic.gradient(16, i), "JPEG")
        parts = [{"text": f"part {i}.{k}", "area": 1.0} for k in range(2)]
        rows.append({"image": picture, "title": f"title {i}", "many": [f"m{i}"] * i, "objects": parts})
    name = records.shard_name("captions", "train", 0, 1)
    shards = {name: records.write_shard(tmp_path, name, [features.serialize_example(row) for row in rows])}
    records.write_tfds_metadata(tmp_path, "captions", features, shards)
    return tmp_path / "captions"


@pytest.mark.parametrize(
    ("feature", "expected"),
    [("title", ["title 2"]), ("many", ["m2", "m2"]), ("objects/text", ["part 2.0", "part 2.1"])],
)
def test_tfds_captions(dataset, feature, expected):
    """Catches: bytes instead of text, one letter a caption, nested captions unreachable, images decoded and encoded again."""
    source = pickle.loads(pickle.dumps(sources.TfdsSource(str(dataset), None, "train", "image", feature, 0.0)))
    item = source[2]
    assert len(source) == 4 and item.captions == expected and item.id == "train-000000002"
    assert item.image == synthetic.encode(synthetic.gradient(16, 2), "JPEG")


def test_tfds_is_prepared_in_processes(dataset, tmp_path):
    """Catches: a TFDS reader that cannot be sent to a worker."""
    source = sources.TfdsSource(str(dataset), None, "train", "image", "title", 0.0)
    settings = prepare_data.Settings(**SETTINGS | {"processes": 2})
    manifest = prepare_data.prepare(source, FakeEncoder(), tmp_path / "data", settings)
    assert manifest["counts"]["images"] == {"train": 4, "heldout": 0} and manifest["counts"]["captions"] == 4
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
    """Catches: tracebacks out of TFDS for a misspelt split, feature or name."""
    options = {"name": str(dataset), "data_dir": None, "split": "train", "image": "image", "caption": "title", "heldout": 0.0}
    with pytest.raises(ValueError, match=message) as error:
        sources.TfdsSource(**options | changes)
    assert "\n" not in str(error.value)


def test_open_source_by_name(folder):
    """Catches: a name taken for another kind of source, a held-out fraction that would overrule the emoji's own split."""
    options = {"tfds_dir": None, "tfds_split": "train", "tfds_image": "image", "tfds_caption": "caption"}
    assert isinstance(sources.open_source(f"folder:{folder}", 0.1, **options), sources.FolderSource)
    assert sources.open_source("emoji", 0.0, **options).describe()["name"] == "emoji"
    for spec, message in [("emoji:x", "is not emoji"), ("folder:", "is not emoji"), ("emoji", "leave --heldout at 0")]:
        with pytest.raises(ValueError, match=message):
            sources.open_source(spec, 0.1, **options)
