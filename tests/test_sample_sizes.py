"""`sample --size`: sizes, records, sets and contact sheets of pictures that are not square."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from imagen_jax import drawing, drawn_sets, picture_set, pictures, sample, schema
from imagen_jax.picture_set import Requests
from tests import test_cascade, test_drawing

config = test_cascade.config  # the fixture: a cascade of tiny random stages, 8 -> 16 -> 32
STAGES = ["base", "sr_1"]
encoder = test_drawing.encoder


@pytest.fixture
def complete(config):
    mesh = {"data": 2, "fsdp": 4, "model": 1, "spatial": 1}
    fields = config | {"sr_2": config["sr_2"] | {"checkpoint": ""}, "mesh": mesh}
    return schema.complete_cascade(fields)


def draw(config, output, size=None, stages=STAGES, image="", record=None, prompt="a"):
    requests = Requests([prompt], 1, record["seed"] if record else 5)
    assert sample.sample(config, requests, stages, image, output, record, size) == 0


def size_of(path):
    return Image.open(path).size[::-1]


@pytest.mark.slow
@pytest.mark.usefixtures("encoder")
def test_pictures_of_a_size_and_their_records(complete, tmp_path, capsys):
    """Catches squares, earlier pictures named by one side, a set of another size that is continued
    or overwritten, a record without the size, one with it for squares, and another picture from it.
    """
    wide, again = tmp_path / "wide", tmp_path / "again"
    draw(complete, wide, (8, 24))
    assert "warning: not trained on images" in capsys.readouterr().out
    assert size_of(wide / "0000_a.png") == (8, 24)
    assert size_of(wide / "0000_a_4x12.png") == (4, 12)
    record = sample.read_record(wide / "0000_a.json")
    assert record["size"] == [8, 24]
    draw(record["config"], again, tuple(record["size"]), record["stages"], record=record)
    assert (again / "0000_a.png").read_bytes() == (wide / "0000_a.png").read_bytes()
    draw(complete, wide, (8, 24))
    assert sorted(path.name for path in wide.glob("*_a.png")) == ["0000_a.png"]
    capsys.readouterr()
    draw(complete, wide, stages=["base"])
    assert "warning" not in capsys.readouterr().out
    assert size_of(wide / "0001_a.png") == (8, 8)
    squares = json.loads((wide / "0001_a.json").read_text())
    assert "size" not in squares and squares.keys() | {"size"} == record.keys()
    draw(complete, wide, (8, 8), stages=["base"])  # the squares again
    assert not capsys.readouterr().out.startswith("\n")
    sets = [path.name for path in wide.glob("set_*.json")]
    assert sorted(sets) == ["set_0000.json", "set_0001.json"]


@pytest.mark.usefixtures("encoder")
def test_an_image_is_cut_to_the_size_and_up_sampled(complete, tmp_path):
    """Catches an --image that is cut to a square, squeezed or enlarged, for a picture that is none,
    height and width exchanged, and a record without the size.
    """
    image = np.random.default_rng(0).integers(0, 256, (4, 12, 3), np.uint8)
    path = pictures.write_png(tmp_path / "x.png", image)
    draw(complete, tmp_path / "out", (8, 24), ["sr_1"], str(path))
    assert size_of(tmp_path / "out" / "0000_a.png") == (8, 24)
    assert sample.read_record(tmp_path / "out" / "0000_a.json")["size"] == [8, 24]
    np.testing.assert_array_equal(sample.read_image(str(path), (4, 12)), image)
    larger = np.repeat(np.repeat(np.pad(image, ((1, 1), (0, 0), (0, 0))), 2, 0), 2, 1)  # 12 x 24
    large = pictures.write_png(tmp_path / "large.png", larger)
    np.testing.assert_array_equal(sample.read_image(str(large), (4, 12)), image)
    with pytest.raises(ValueError, match=r"is 12x4 .width x height.* reads 4x12 pixels: give a"):
        draw(complete, tmp_path / "out", (24, 8), ["sr_1"], str(path))


@pytest.mark.usefixtures("encoder")
def test_a_size_that_does_not_fit_is_refused_before_drawing(complete, tmp_path):
    """Catches an error of the network after minutes, without the nearest sizes."""
    with pytest.raises(
        ValueError, match="--size 9x24 .* multiples of 2, the nearest are 8x24 and 10x24"
    ):
        draw(complete, tmp_path / "out", (9, 24))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["8x24", [8], [8, 24, 1], [8, 0], [8, 2.5], [True, 8]])
def test_a_record_with_another_size_is_refused(tmp_path, size):
    """Catches a traceback for an edited record."""
    from tests.test_sample import RECORD

    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORD | {"size": size}))
    with pytest.raises(ValueError, match="it has no valid size"):
        sample.read_record(path)


def test_files_and_bytes_of_a_set_count_both_sides(tmp_path, monkeypatch):
    """Catches an earlier picture of another size that is taken for that of this set, and bytes
    counted as those of squares.
    """
    images = [np.zeros((*size, 3), np.uint8) for size in ((4, 12), (8, 24))]
    requests, record = Requests(["a"], 1, 0), drawn_sets.NO_IMAGE | {"config": {}}
    with drawn_sets.Reservation(tmp_path, requests, record, earlier=[(4, 12)]) as reserved:
        reserved.pictures().add(0, images)
        reserved.finish()
    rows = lambda *sizes: len(picture_set.part_rows(tmp_path, 0, requests, sizes))
    assert (rows((4, 12)), rows((12, 4)), rows((4, 4))) == (1, 0, 0)
    usage = types.SimpleNamespace(free=3 * 5 * 8 * 24 - 1)
    monkeypatch.setattr(drawing.shutil, "disk_usage", lambda _: usage)
    drawing.check_disk(tmp_path, [(4, (8, 24))])
    with pytest.raises(ValueError, match="5 pictures need"):
        drawing.check_disk(tmp_path, [(5, (8, 24))])


def test_columns_of_a_sheet_are_as_wide_as_their_widest_picture(tmp_path):
    """Catches pictures that overlap or are cut, and headings that stand over other columns."""
    wide, tall, square = (np.full((*size, 3), 9, np.uint8) for size in ((4, 12), (12, 4), (8, 8)))
    sheet = pictures.grid([[wide, square], [tall, square]], 24)
    gap = pictures.GAP
    assert sheet.shape == (2 * 24 + 3 * gap, 72 + 24 + 3 * gap, 3)
    dark = sheet[..., 0] == 9
    assert (
        dark[gap : gap + 24, gap : gap + 72].all() and dark[:, gap + 72 + gap : -gap].any(0).all()
    )
    assert dark.sum() == 24 * (72 + 24 + 8 + 24)
    assert pictures.column_starts([[wide, square]], 24) == [gap, 72 + 2 * gap, 96 + 3 * gap]
    path = pictures.write_png(tmp_path / "0000_a.png", np.zeros((8, 24, 3), np.uint8))
    pictures.write_png(tmp_path / "0000_a_4x12.png", wide)
    row = {"row": 0, "prompt": "a", "seed": 0, "sha256": "", "file": path.name}
    (tmp_path / "set_0000.jsonl").write_text(json.dumps(row) + "\n")
    (written,) = picture_set.write_sheets(tmp_path / "set_0000.jsonl", [(4, 12), (8, 24)], wide)
    assert size_of(written)[1] == 2 * 64 + 3 * 3 * 64 + 4 * gap
