"""The folder source reads every form of captions; an unreadable one is one clear line."""

import json
import os

import pytest

from imagen_jax.data.sources.folder import FolderSource
from tests.data import synthetic


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
    """Catches lost rows or captions of a file, forgotten images, the order of the disk."""
    lines = [
        {"file": "b.png", "caption": "one"},
        {"file": "deep/c.PNG", "captions": ["x", "y"]},
        {"file": "b.png", "caption": "two"},
    ]
    (folder / "captions.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    source = FolderSource(folder, 0.0)
    assert list(captions(source).items()) == [
        ("a.png", []),
        ("b.png", ["one", "two"]),
        ("deep/c.PNG", ["x", "y"]),
    ]
    assert source[1].image == (folder / "b.png").read_bytes() and {
        source[i].split for i in range(3)
    } == {"train"}


def test_captions_in_csv(folder):
    """Catches quoted commas that split a caption, and an ignored column split."""
    (folder / "captions.csv").write_text(
        'file,caption,split\na.png,"red, round",heldout\nb.png,blue,\n', encoding="utf-8"
    )
    source = FolderSource(folder, 0.0)
    assert captions(source) == {"a.png": ["red, round"], "b.png": ["blue"], "deep/c.PNG": []}
    assert [source[i].split for i in range(3)] == ["heldout", "train", "train"]
    with pytest.raises(ValueError, match="names its own splits, leave --heldout at 0"):
        FolderSource(folder, 0.1)


def test_captions_in_text_files(folder):
    """Catches text files missed in subfolders, and several lines read as one caption."""
    (folder / "a.txt").write_text("first\nsecond\n")
    (folder / "deep" / "c.txt").write_text("dög", "utf-8")
    assert captions(FolderSource(folder, 0.0)) == {
        "a.png": ["first", "second"],
        "b.png": [],
        "deep/c.PNG": ["dög"],
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"captions.jsonl": '{"file": "a.png", "caption": "x"}\n{"file": "b.png"}'},
            "captions.jsonl:2 is not an object with",
        ),
        ({"captions.jsonl": "not json"}, "captions.jsonl:1 is not an object with"),
        (
            {"captions.jsonl": '{"file": "a.png", "captions": "x"}'},
            "file and captions must be text",
        ),
        (
            {"captions.jsonl": '{"file": "a.png", "caption": "x", "split": "test"}'},
            "neither train nor heldout",
        ),
        (
            {"captions.jsonl": '{"file": "../b.png", "caption": "x"}'},
            "../b.png is not in the directory",
        ),
        ({"captions.csv": "file,caption\n/etc/a.png,x\n"}, "/etc/a.png is not in the directory"),
        ({"captions.csv": "name,text\na.png,x\n"}, "must name the columns file and caption"),
        (
            {"captions.csv": "file,caption\na.png\n"},
            "captions.csv:2: 1 columns, but the first line names 2",
        ),
        ({"captions.csv": "file,caption\n", "captions.jsonl": ""}, "keep one"),
        (
            {"captions.csv": "file,caption,split\na.png,x,train\na.png,y,heldout\n"},
            "a.png is in both splits",
        ),
    ],
)
def test_bad_captions_files_are_one_clear_line(folder, files, message):
    """Catches captions read as letters, wrong columns or splits accepted, tracebacks."""
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        FolderSource(folder, 0.0)
    assert "\n" not in str(error.value)


def test_folder_without_images_or_missing(tmp_path):
    """Catches an empty or misspelt directory prepared as an empty data set."""
    with pytest.raises(ValueError, match="holds no images"):
        FolderSource(tmp_path, 0.0)
    with pytest.raises(ValueError, match="is not a directory"):
        FolderSource(tmp_path / "misspelt", 0.0)


def test_description_is_the_listing_not_the_place(folder, tmp_path):
    """Catches a moved folder taken for another source, or changed captions for the same."""
    (folder / "a.txt").write_text("first")
    moved = tmp_path / "elsewhere" / "pictures"
    before = FolderSource(folder, 0.0).describe()
    moved.parent.mkdir()
    folder.rename(moved)
    assert FolderSource(moved, 0.0).describe() == before
    (moved / "a.txt").write_text("changed")
    assert FolderSource(moved, 0.0).describe() != before


def test_one_text_file_that_is_not_utf8_costs_one_item(folder):
    """Catches a .txt in another encoding that ends the run, without its name."""
    (folder / "a.txt").write_bytes("the painter\u2019s square".encode("cp1252"))
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfone\x0cpart\r\n\r\ntwo\xe2\x80\xa8lines\r\n")
    source = FolderSource(folder, 0.0)
    assert source[0].fault == (
        "unreadable_captions",
        "a.txt:1 is not UTF-8 text (byte 0x92): save the file as UTF-8",
    )
    assert source[1].captions == ["one\x0cpart", "", "two\u2028lines"] and not source[1].fault


def test_a_named_pipe_is_not_waited_for(folder):
    """Catches a .txt or a captions file that is a pipe: reading it would never end."""
    os.mkfifo(folder / "a.txt")
    source = FolderSource(folder, 0.0)
    assert source[0].fault == (
        "unreadable_captions",
        "a.txt is a named pipe or a device, not a file",
    )
    os.mkfifo(folder / "captions.csv")
    with pytest.raises(ValueError, match="captions.csv is a named pipe"):
        FolderSource(folder, 0.0)


def test_a_row_may_spell_its_file_differently(folder):
    """Catches captions lost to ./ of `find`, to \\ of Windows and to split accents of macOS."""
    (folder / "cafe\u0301.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "captions.csv").write_text(
        "file,caption\n./a.png,x\ndeep\\c.PNG,y\ncaf\u00e9.png,z\n"
    )
    assert captions(FolderSource(folder, 0.0)) == {
        "a.png": ["x"],
        "b.png": [],
        "cafe\u0301.png": ["z"],
        "deep/c.PNG": ["y"],
    }


def test_the_text_file_of_a_camera_in_capitals(folder):
    """Catches captions in C.TXT that are not read."""
    (folder / "deep" / "c.TXT").write_text("a caption")
    assert captions(FolderSource(folder, 0.0))["deep/c.PNG"] == ["a caption"]
