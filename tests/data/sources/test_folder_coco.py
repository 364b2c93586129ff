"""A folder of images whose captions are in the annotation file of COCO."""

import json
import os
import time

import pytest

from imagen_jax.data.prepare.checks import check
from imagen_jax.data.sources import coco
from imagen_jax.data.sources.folder import FolderSource
from tests.data import synthetic

PNG = synthetic.encode(synthetic.gradient(16))


def image(id, name):
    return {"id": id, "file_name": name, "height": 16, "width": 16}


def said(image_id, caption):
    return {"image_id": image_id, "id": 900 - image_id, "caption": caption}


@pytest.fixture
def opened(tmp_path):
    """Writes images and an annotation file; opens the folder."""

    def opened(files, images, annotations, name="captions_val2014.json"):
        for file in files:
            (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / file).write_bytes(PNG)
        content = {"info": {}, "images": images, "annotations": annotations}
        (tmp_path / name).write_text(json.dumps(content))
        return FolderSource(tmp_path, 0.0)

    return opened


def items(source):
    return {item.id: item for item in (source[i] for i in range(len(source)))}


def reasons(source):
    return {key: check(item, 0).reason for key, item in items(source).items()}


def test_captions_are_joined_by_id(opened):
    """Catches a join by order, a caption lost, and a published size asked of a part of COCO."""
    images = [image(7, "b.png"), image(3, "deep/a.png")]
    annotations = [said(3, "one"), said(7, " blue\u200b "), said(3, "two")]
    source = opened(["deep/a.png", "b.png"], images, annotations)
    found = items(source)
    assert {key: item.captions for key, item in found.items()} == {
        "b.png": [" blue\u200b "],
        "deep/a.png": ["one", "two"],
    }
    assert all(item.image == PNG and not item.fault for item in found.values())
    assert source.notes() == []


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("val2014/1.png", "1.png"),
        ("1.png", "val2014/1.png"),
        ("all/1.png", "val2014/1.png"),
        ("val2014/1.png", ".\\val2014\\1.png"),
        ("caf\u0065\u0301.png", "caf\u00e9.png"),
        ("val2014/caf\u0065\u0301.png", "caf\u00e9.png"),
        ("1.png", "/data/coco/1.png"),
        ("1.png", "../1.png"),
    ],
)
def test_an_image_in_another_folder(opened, file, name):
    """Catches the folders of COCO's archives, or spellings of a name, that lose all captions."""
    found = items(opened([file], [image(1, name)], [said(1, "a ramp")]))
    assert list(found) == [file] and found[file].captions == ["a ramp"]
    assert found[file].image == PNG and not found[file].fault


@pytest.mark.parametrize(
    ("files", "names", "captions", "detail"),
    [
        (
            ["x/1.png", "y/1.png"],
            ["1.png"],
            {"1.png": ["c0"], "x/1.png": [], "y/1.png": []},
            "several images have this name: x/1.png, y/1.png",
        ),
        (
            ["all/1.png"],
            ["train/1.png", "val/1.png"],
            {"all/1.png": [], "train/1.png": ["c0"], "val/1.png": ["c1"]},
            "all/1.png may be another image of this name",
        ),
        (
            ["val/1.png"],
            ["train/1.png", "val/1.png"],
            {"train/1.png": ["c0"], "val/1.png": ["c1"]},
            "val/1.png may be another image of this name",
        ),
        (["1.png"], ["2.png"], {"1.png": [], "2.png": ["c0"]}, "no image of the folder has this"),
        (["1.png"], ["1.txt"], {"1.png": [], "1.txt": ["c0"]}, "no image of the folder has this"),
    ],
)
def test_no_caption_goes_to_another_image(opened, files, names, captions, detail):
    """Catches a base name that several images share: the wrong one would get the caption."""
    annotations = [said(i, f"c{i}") for i in range(len(names))]
    source = opened(files, [image(i, name) for i, name in enumerate(names)], annotations)
    found = items(source)
    assert {key: item.captions for key, item in found.items()} == captions
    faults = [item.fault for item in found.values() if item.fault]
    assert all(fault.reason == "missing_image" for fault in faults)
    assert faults[0].detail.startswith(detail)


def test_a_name_does_not_lead_out_of_the_folder(tmp_path, opened):
    """Catches a file outside the folder that is read as an image of it."""
    outside = tmp_path.parent / "outside.png"
    outside.write_bytes(PNG)
    names = [str(outside), "../outside.png"]
    annotations = [said(0, "a"), said(1, "b"), said(2, "c")]
    images = [image(i, name) for i, name in enumerate([*names, "in.png"])]
    source = opened(["in.png"], images, annotations)
    assert reasons(source) == dict.fromkeys(names, "missing_image") | {"in.png": ""}
    assert all(items(source)[name].image is None for name in names)


def test_what_is_missing_costs_only_itself(opened):
    """Catches an annotation or image without the other that ends the run or goes unseen."""
    images = [image(i, f"{i}.png") for i in range(6)]
    images[5] = {"id": 5}
    annotations = [said(0, "good"), said(2, None), said(3, float("nan")), said(4, "\ud83d")]
    annotations += [said(99, "of no image"), said(1, 5), {"image_id": 1, "id": 5}, said(0, "again")]
    files = [f"{i}.png" for i in range(5)] + ["unlisted.png"]
    source = opened(files, [*images, image(6, "6.png"), image(7, "\ud83d.png")], annotations)
    assert reasons(source) == {
        "0.png": "",
        "1.png": "no_caption",
        "2.png": "no_caption",
        "3.png": "no_caption",
        "4.png": "no_caption",
        "6.png": "missing_image",
        "image 99": "missing_image",
        "unlisted.png": "no_caption",
    }
    assert items(source)["0.png"].captions == ["good", "again"]
    assert items(source)["image 99"].fault.detail.endswith("has no image with this id")
    noted = {note["id"]: note["detail"].partition(":")[0] for note in source.notes()}
    assert {note["reason"] for note in source.notes()} == {"unreadable_row"}
    name = "captions_val2014.json"
    assert noted == {
        f"{name}:images[5]": "has no valid 'file_name'",
        f"{name}:images[7]": "has the file_name '\\ud83d.png', which is not the name of a file",
        f"{name}:annotations[5]": "has no valid 'caption'",
        f"{name}:annotations[6]": "has no valid 'caption'",
    }


NAME = "captions_x.json"
ONE = {"images": [image(1, "a.png")], "annotations": [said(1, "x")]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({NAME: json.dumps(ONE)[:-3]}, r"captions_x.json is not valid JSON \(.*\); download"),
        ({NAME: ""}, "captions_x.json is empty; download"),
        ({NAME: "version https://git-lfs.github.com/spec/v1\n"}, "x.json is a Git LFS pointer"),
        ({NAME: "[" * 100_000}, "captions_x.json is not valid JSON"),
        ({NAME: '{"images": [' + "9" * 9999 + "]}"}, "captions_x.json is not valid JSON"),
        ({NAME: "{}".encode("utf-16")}, "captions_x.json is not valid JSON"),
        ({NAME: "[]"}, "captions_x.json is damaged .it is not a JSON object.; .* rename a file"),
        ({NAME: '{"a": "a caption"}'}, "captions_x.json is damaged .it has no images."),
        ({NAME: json.dumps(ONE | {"annotations": {}})}, "annotations is {}, not of type list"),
        (
            {NAME: json.dumps(ONE | {"annotations": [{"image_id": 1, "bbox": []}]})},
            r"captions_x.json:annotations\[0\] has no valid 'caption': give a file of captions",
        ),
        (
            {NAME: json.dumps(ONE | {"images": [{"id": "1", "file_name": "a.png"}]})},
            r"captions_x.json:images\[0\] has no valid 'id'",
        ),
        (
            {NAME: json.dumps(ONE | {"images": [image(1, "a.png"), image(1, "b.png")]})},
            "has the image id 1 twice, for a.png and b.png",
        ),
        (
            {"captions_train.json": json.dumps(ONE), "captions_val.json": json.dumps(ONE)},
            r"several captions files \(captions_train.json, captions_val.json\): keep one",
        ),
        (
            {NAME: json.dumps(ONE), "captions.jsonl": ""},
            r"several captions files \(captions.jsonl, captions_x.json\): keep one",
        ),
    ],
)
def test_a_bad_annotation_file_is_one_clear_line(tmp_path, files, message):
    """Catches tracebacks, an instances file without captions, and one of two files chosen."""
    (tmp_path / "a.png").write_bytes(PNG)
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        FolderSource(tmp_path, 0.0)
    assert "\n" not in str(error.value)


def test_a_pipe_is_no_annotation_file(tmp_path):
    """Catches a named pipe that is waited for without end."""
    (tmp_path / "a.png").write_bytes(PNG)
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(ValueError, match="captions_x.json is a named pipe"):
        FolderSource(tmp_path, 0.0)


def test_other_files_are_no_annotation_file(tmp_path, opened):
    """Catches an annotation file of a subfolder, or another JSON file, taken for the captions."""
    (tmp_path / "deep").mkdir()
    for name in ("deep/captions_a.json", "instances_val2014.json", "captions_.txt"):
        (tmp_path / name).write_text("no JSON")
    source = opened(["a.png"], [image(1, "a.png")], [said(1, "x")])
    assert items(source)["a.png"].captions == ["x"]
    assert {note["id"]: note["count"] for note in source.notes()} == {"*.json": 2, "*.txt": 1}


def test_the_time_is_linear(tmp_path):
    """Catches a search of all files for each name: 20,000 names would take a minute."""
    count = 20_000
    files = [f"val2014/{i:012d}.jpg" for i in range(count)]
    content = {
        "images": [image(i, f"{i:012d}.jpg") for i in range(0, 2 * count, 2)],
        "annotations": [said(i, "a caption") for i in range(0, 2 * count, 2)],
    }
    (tmp_path / NAME).write_text(json.dumps(content))
    start = time.monotonic()
    rows, absent = coco.read_listed(tmp_path / NAME, set(files), files, [])
    assert time.monotonic() - start < 10
    assert len(rows) == count and len(absent) == count // 2
    assert rows[1] == ("val2014/000000000002.jpg", ["a caption"], "")


def test_a_listed_file_is_not_called_ignored(tmp_path):
    """Catches an image with an unusual suffix that is read, but noted as not read."""
    (tmp_path / "a.jfif").write_bytes(PNG)
    (tmp_path / "captions.csv").write_text("file,caption\na.jfif,a ramp\n")
    source = FolderSource(tmp_path, 0.0)
    assert reasons(source) == {"a.jfif": ""} and source.notes() == []
