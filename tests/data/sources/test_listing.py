"""captions.jsonl and captions.csv as spreadsheets, editors and scripts write them."""

import json

import pytest

from imagen_jax.data.sources.listing import read_csv, read_jsonl

LONG = "word " * 28_000  # more than the csv module's default limit for a field


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def rows(read, path, *args):
    return [(file, captions) for file, captions, _ in read(path, [], *args)]


def test_byte_order_marks(write):
    """Catches a mark that hides the first column, the first object or, in joined files, a name."""
    table = write("captions.csv", "\ufefffile,caption\r\na.png,red\r\n\ufeffb.png,blue\r\n")
    assert rows(read_csv, table) == [("a.png", ["red"]), ("b.png", ["blue"])]
    part = '\ufeff{"file": "a.png", "caption": "red"}\n'
    assert rows(read_jsonl, write("captions.jsonl", part * 2)) == [("a.png", ["red"])] * 2


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x0c", "\x85", "\x1c", "\x0b"])
def test_line_separators_inside_a_caption(write, character):
    """Catches `splitlines`: a caption cut in two, or valid JSON called broken."""
    text = f"one{character}caption"
    line = json.dumps({"file": "a.png", "caption": "?"}).replace("?", text)
    if character not in "\x0b\x0c\x1c":  # JSON wants these escaped
        assert rows(read_jsonl, write("captions.jsonl", f"{line}\n")) == [("a.png", [text])]
    table = write("captions.csv", f"file,caption\na.png,{text}\nb.png,x\n")
    assert rows(read_csv, table) == [("a.png", [text]), ("b.png", ["x"])]


@pytest.mark.parametrize("missing", ["NaN", "null", "Infinity"])
def test_a_missing_caption_is_empty(write, missing):
    """Catches a table's marker of a missing value that ends the whole preparation."""
    lines = f'{{"file": "a.png", "caption": {missing}}}\n{{"file": "b.png", "captions": {missing}}}'
    lines += f'\n{{"file": "c.png", "captions": ["x", {missing}]}}\n'
    assert rows(read_jsonl, write("captions.jsonl", lines)) == [
        ("a.png", [""]),
        ("b.png", [""]),
        ("c.png", ["x", ""]),
    ]


def test_a_caption_of_any_length(write):
    """Catches the csv module's limit of 131,072 characters a field, as a traceback."""
    table = write("captions.csv", f"file,caption\na.png,{LONG}\n")
    assert rows(read_csv, table) == [("a.png", [LONG])]


def test_quoted_captions_are_read_whole(write):
    """Catches quotes taken for damage: commas, line feeds and doubled quotes are text."""
    table = 'file,caption\na.png,"red, ""round""\nand ripe"\n\n,\nb.png,a "blue" one,,\n'
    assert rows(read_csv, write("captions.csv", table), {"a.png", "b.png"}) == [
        ("a.png", ['red, "round"\nand ripe']),
        ("b.png", ['a "blue" one']),
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "file,caption\na.png,x\nb.png,green, by hand, on white\nc.png,y\na.png,u,v\n",
            "captions.csv:3 has more columns .*too many: 2.: put captions with commas",
        ),
        ("file,split,caption\na.png,train\n", "captions.csv:2: 2 columns, but .* names 3"),
        ('file,caption\na.png,x\nb.png,"green\nc.png,y\n', "captions.csv:3 cannot be read .*close"),
        ('file,caption\na.png,"green\nb.png,"blue"\n', "captions.csv:2 cannot be read .*expected"),
        (
            'file,caption\na.png,"green\nb.png,a 5 inch"\nc.png,y\n',
            "captions.csv:2: a quote takes in the rows after it: close every quote",
        ),
        ('file,caption\na.png,"stop" sign\n', "captions.csv:2 cannot be read .*write a quote"),
        ("file;caption\na.png;x\n", "with commas between; it is 'file;caption'"),
        ("", "must name the columns file and caption"),
        ("file,caption,\na.png,x,\nb.png,green, by hand\n", "captions.csv:3 has more columns"),
        ("file,caption,caption\na.png,x,y\n", "names the column caption twice"),
        ("file,caption\n,a lost caption\n", "captions.csv:2 cannot be used: '' is not the name of"),
        (b"file,caption\na.png,x\nb.png,caf\xe9\n", "captions.csv:3 is not UTF-8 text"),
        ("file,caption\n".encode("utf-16"), "captions.csv is UTF-16 text: save it as UTF-8"),
    ],
)
def test_a_table_that_would_lose_text_is_refused(write, table, message):
    """Catches a caption cut at a comma, rows swallowed by a quote, columns and text lost."""
    with pytest.raises(ValueError, match=message):
        read_csv(write("captions.csv", table), [], {"a.png", "b.png", "c.png"})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            b'{"file": "a.png", "caption": "x"}\n{"file": "b.png", "caption": "caf\xe9"}\n',
            ":2 is not",
        ),
        ('{"file": "a.png", "caption": "x"}\n{"file": "b.pn', "jsonl:2 is not an object with"),
        ('{"file": "a.png", "caption": "x", "caption": "y"}', "jsonl:1 .*caption occurs twice"),
        ('{"file": "a.png", "caption": "x", "captions": ["y"]}', "caption is not one of captions"),
        ("[" * 100_000, "jsonl:1 is not an object with"),
        ('{"file": "a\\ud83d.png", "caption": "x"}', "is not the name of a file"),
        ('{"file": "", "caption": "x"}', "'' is not the name of a file"),
        ('{"file": "a.png", "caption": 5}', "file and captions must be text"),
        ('{"file": "a.png", "caption": "x", "split": ["train"]}', "neither train nor heldout"),
    ],
)
def test_a_broken_line_is_named(write, lines, message):
    """Catches errors without file and line, and exceptions that are no ValueError."""
    with pytest.raises(ValueError, match=message):
        read_jsonl(write("captions.jsonl", lines), [])


SOUND = '{"file": "a.png", "caption": "x"}\n{"file": "b.png", "captions": ["y"], "caption": "y"}\n'


@pytest.mark.parametrize(
    "line",
    [
        '{"file": "c.pn',
        "[]",
        "7",
        '{"file": "c.png"}',
        '{"file": "c.png", "caption": {"en": "x"}}',
        '{"file": "c.png", "caption": "x", "id": ' + "9" * 5000 + "}",
        '{"file": "c.png", "caption": "x", "id": ' + "[" * 100_000,
        '{"file": "../c.png", "caption": "x"}',
    ],
)
def test_a_damaged_line_costs_only_itself(write, line):
    """Catches one line of many that ends the preparation, or that is left out without a note."""
    notes = []
    listed = read_jsonl(write("captions.jsonl", SOUND + line + "\n"), notes)
    assert [row[:2] for row in listed] == [("a.png", ["x"]), ("b.png", ["y"])]
    assert [(note["id"], note["reason"]) for note in notes] == [
        ("captions.jsonl:3", "unreadable_row")
    ]
    assert notes[0]["detail"].startswith("is not an object with file and caption(s): ")


def test_a_csv_row_without_a_file_costs_only_itself(write):
    """Catches a stray row of a spreadsheet that ends the preparation."""
    notes = []
    table = write("captions.csv", "file,caption\na.png,x\nb.png,y\n,note to self\n")
    assert [row[0] for row in read_csv(table, notes)] == ["a.png", "b.png"]
    assert notes == [
        {
            "id": "captions.csv:4",
            "reason": "unreadable_row",
            "detail": "cannot be used: '' is not the name of a file",
        }
    ]
