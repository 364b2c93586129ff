"""prepare_data: which images and captions it keeps, and that it lists everything else."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import records
from tests.data import synthetic
from tests.data.synthetic_source import is_complete, prepare, skipped


@pytest.fixture
def messy(tmp_path):
    """A folder with one of every kind of unusable item."""
    folder = tmp_path / "messy"
    folder.mkdir()
    image = synthetic.encode(synthetic.gradient(32, 1))
    files = {
        "good.png": image,
        "twin.png": image,
        "cut.png": image[: len(image) // 2],
        "text.png": b"no image",
        "empty.png": b"",
    }
    files |= {
        "small.png": synthetic.encode(synthetic.gradient(8)),
        "mute.png": synthetic.encode(synthetic.gradient(32, 2)),
    }
    files |= {
        "blank.png": synthetic.encode(synthetic.gradient(32, 3)),
        "unlisted.png": synthetic.encode(synthetic.gradient(32, 4)),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    captions = {
        name: ["a ramp"] for name in ("cut.png", "text.png", "empty.png", "small.png", "gone.png")
    }
    captions |= {
        "good.png": ["a  ramp ", "a ramp", "one two three four five six seven"],
        "twin.png": ["the same ramp"],
    }
    captions |= {"mute.png": [], "blank.png": [" \t", "", "bad \ud83d", "fine"]}
    lines = [json.dumps({"file": name, "captions": texts}) for name, texts in captions.items()]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_nothing_is_dropped_silently(messy, tmp_path, capsys):
    """Catches unusable images and captions that are lost or not counted, and an unnamed size."""
    output = tmp_path / "data"
    manifest = prepare(messy, output, heldout=0.0, min_size=16)
    assert "train, 0 heldout images, smallest side 32 pixels, " in capsys.readouterr().out
    lines = {(line["id"], line["reason"]) for line in skipped(output)}
    assert lines == {
        ("cut.png", "broken_image"),
        ("text.png", "broken_image"),
        ("empty.png", "broken_image"),
        ("gone.png", "missing_image"),
        ("small.png", "small_image"),
        ("mute.png", "no_caption"),
        ("unlisted.png", "no_caption"),
        ("twin.png", "duplicate_image"),
        ("blank.png", "empty_caption"),
        ("blank.png", "invalid_caption"),
        ("good.png", "duplicate_caption"),
        ("caption 2", "truncated_caption"),
    }
    counted = {
        "broken_image": 3,
        "missing_image": 1,
        "small_image": 1,
        "no_caption": 2,
        "duplicate_image": 1,
    }
    counted |= {"empty_caption": 2, "invalid_caption": 1, "duplicate_caption": 1}
    assert (
        manifest["counts"]["skipped"] == counted and manifest["counts"]["truncated_captions"] == 1
    )
    assert not [line for line in skipped(output) if "0x" in line.get("detail", "")], (
        "an address, which changes from run to run"
    )
    prepared = records.Prepared(output)
    rows = {
        row.id: row.caption_ids
        for row in (prepared.images("train")[i] for i in range(prepared.num_images("train")))
    }
    texts = [prepared.captions()[i].text for i in range(manifest["counts"]["captions"])]
    assert {name: [texts[i] for i in ids] for name, ids in rows.items()} == {
        "good.png": ["a ramp", "one two three four five six seven", "the same ramp"],
        "blank.png": ["fine"],
    }


def test_a_double_in_the_other_split_is_not_trained_on(tmp_path):
    """Catches captions of a held-out picture merged into the training split, or vice versa."""
    folder = tmp_path / "twins"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(synthetic.encode(synthetic.gradient(32)))
    (folder / "captions.csv").write_text(
        "file,caption,split\na.png,first,heldout\nb.png,second,train\n"
    )
    manifest = prepare(folder, tmp_path / "data", heldout=0.0)
    assert (
        manifest["counts"]["images"] == {"train": 0, "heldout": 1}
        and manifest["counts"]["captions"] == 1
    )
    assert skipped(tmp_path / "data") == [
        {
            "id": "b.png",
            "reason": "duplicate_image_in_other_split",
            "of": "a.png",
            "captions": ["second"],
        }
    ]


def test_no_good_image_is_a_clear_error(tmp_path):
    """Catches an empty data set that is written as if it were complete."""
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"nothing")
    (folder / "a.txt").write_text("a caption")
    (folder / "metadata.jsonl").write_text("")
    message = "no usable image in .*, such as broken_image: a.png, ignored_file: metadata.jsonl"
    with pytest.raises(ValueError, match=message):
        prepare(folder, tmp_path / "data")
    assert not is_complete(tmp_path / "data")


def test_odd_images_are_stored_so_that_any_reader_sees_the_same(tmp_path):
    """Catches black transparency, turned photographs, clipped 16 bits, JPEGs encoded again."""
    folder = tmp_path / "odd"
    folder.mkdir()
    clear = np.zeros((20, 20, 4), np.uint8)
    clear[:10] = (255, 0, 0, 255)
    Image.fromarray(clear).save(folder / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned a quarter clockwise to stand upright
    Image.fromarray(synthetic.gradient(24)[:12]).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(synthetic.gradient(20, 9)).convert("L").save(folder / "grey.png")
    Image.fromarray(synthetic.gradient(20, 8)).save(folder / "plain.jpg")
    Image.fromarray(np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)).save(
        folder / "deep.png"
    )
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(path.stem)
    prepare(folder, tmp_path / "data", heldout=0.0)
    store = records.Prepared(tmp_path / "data").images("train")
    rows = {store[i].id: store[i] for i in range(len(store))}
    images = {name: Image.open(io.BytesIO(row.image)) for name, row in rows.items()}
    assert {image.mode for image in images.values()} == {"RGB"}
    pixels = np.asarray(images["clear.png"])
    assert (pixels[:10] == (255, 0, 0)).all() and (pixels[10:] == 255).all()
    np.testing.assert_allclose(
        np.asarray(images["deep.png"])[..., 0].reshape(-1), np.linspace(0, 255, 400), atol=1.01
    )
    assert (rows["turned.jpg"].height, rows["turned.jpg"].width) == (24, 12) and images[
        "turned.jpg"
    ].size == (12, 24)
    assert rows["plain.jpg"].image == (folder / "plain.jpg").read_bytes()


def test_files_of_every_day(tmp_path):
    """Catches one bad file that ends the run, and what is changed or not read without a line."""
    folder = tmp_path / "everyday"
    (folder / "real").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.png", "real/c.png", "._a.png"]):
        (folder / name).write_bytes(synthetic.encode(synthetic.gradient(16, i)))
    (folder / "link").symlink_to("real")
    (folder / "notes.md").write_text("not looked at")
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfone\xe2\x80\x8b ramp\n")
    (folder / "b.txt").write_bytes(b"caf\xe9")
    (folder / "real" / "c.txt").write_text("two\u2028ramps", encoding="utf-8")
    manifest = prepare(folder, tmp_path / "data", heldout=0.0)
    assert skipped(tmp_path / "data") == [
        {
            "id": "a.png",
            "reason": "removed_characters",
            "detail": "1 x U+200B",
            "caption": "one ramp",
        },
        {
            "id": "b.png",
            "reason": "unreadable_captions",
            "detail": "b.txt:1 is not UTF-8 text (byte 0xe9): save the file as UTF-8",
        },
        {
            "id": "link",
            "reason": "linked_folder_again",
            "detail": "read as real",
        },
        {"id": "._*", "reason": "ignored_file", "count": 1, "files": ["._a.png"]},
        {"id": "*.md", "reason": "ignored_file", "count": 1, "files": ["notes.md"]},
    ]
    assert manifest["counts"]["skipped"]["ignored_file"] == 2
    captions = records.Prepared(tmp_path / "data").captions()
    assert [captions[i].text for i in range(2)] == ["one ramp", "two ramps"]


def test_a_caption_of_any_length_is_cut_and_noted(tmp_path):
    """Catches a long caption in a table that ends in a traceback."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(synthetic.encode(synthetic.gradient(16)))
    (tmp_path / "in" / "captions.csv").write_text(f"file,caption\na.png,{'word ' * 28_000}\n")
    manifest = prepare(tmp_path / "in", tmp_path / "data", heldout=0.0)
    assert manifest["counts"]["truncated_captions"] == 1
