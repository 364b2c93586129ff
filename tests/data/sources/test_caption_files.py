"""Published lists of prompts as sheets, editors and scripts write them, and damaged ones."""

import json
from collections import Counter

import pytest

from imagen_jax.data.sources import caption_files
from imagen_jax.data.sources.caption_files import Caption

GEMS = [f"a gem number {n}" for n in range(2_000)]


def drawbench_rows():
    """Rows of the size of DrawBench, with its categories."""
    texts = iter(GEMS)
    sizes = caption_files.DRAWBENCH.items()
    return [f"{next(texts)},{category}" for category, size in sizes for _ in range(size)]


def table(rows, header="Prompts,Category", end="\n"):
    return end.join([header, *rows]) + end


def geneval_lines():
    texts = iter(GEMS)
    return [
        json.dumps({"tag": tag, "include": [], "prompt": next(texts)})
        for tag, size in caption_files.GENEVAL.items()
        for _ in range(size)
    ]


def parti_rows(size=1632):
    return [f"{text}\tArts\tBasic\t" for text in GEMS[:size]]


def gpic_lines(size):
    return [
        json.dumps({"key": f"{n:x}", "caption": text, "caption_type": "short"})
        for n, text in enumerate(GEMS[:size])
    ]


@pytest.fixture
def read(tmp_path):
    """Writes a file and reads it: the captions and the notes."""

    def read(reader, content, name="list"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        notes = Counter()
        return list(reader(path, notes)), +notes

    return read


def test_drawbench_as_sheets_export_it(read):
    """Catches a byte-order mark in the first column, \\r\\n in a label, and labels that differ by a
    space, which would be two categories.
    """
    rows = drawbench_rows()
    rows[3] = f'"{GEMS[3]}, and a  ""ring""\u200b",Reddit \u00a0'
    captions, notes = read(caption_files.read_drawbench, "\ufeff" + table(rows, end="\r\n"))
    assert captions[:2] == [Caption(0, GEMS[0], "Reddit"), Caption(1, GEMS[1], "Reddit")]
    assert captions[3] == Caption(3, f'{GEMS[3]}, and a "ring"', "Reddit")
    assert captions[199] == Caption(199, GEMS[199], "Rare Words")
    assert Counter(c.category for c in captions) == caption_files.DRAWBENCH
    assert notes == {"removed_characters": 1}


def with_row(number, row):
    rows = drawbench_rows()
    rows[number] = row
    return table(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table(drawbench_rows()[:-1]), "has 199 prompts, but DrawBench has 200: give the complete"),
        (table([*drawbench_rows(), "x,Text"]), "has 201 prompts, but DrawBench has 200"),
        (with_row(0, "x,Colors"), "has 37 prompts of the category 'Reddit', but DrawBench has 38"),
        (
            with_row(0, "x,Colours"),
            "has the category 'Colours', which DrawBench does not have: the",
        ),
        (with_row(0, "a,b,Reddit"), "list:2 has 3 columns, but the first line names 2: put"),
        (with_row(1, "a gem"), "list:3 has 1 columns, but the first line names 2: put prompts"),
        (with_row(2, " \u200b,Reddit"), "list:4: the prompt is empty; download or copy it again"),
        (with_row(0, '"a gem,Reddit'), "list:2 cannot be read .*: close every quote"),
        (table(drawbench_rows(), "Prompt,Category"), "must name the columns Prompts, Category"),
        (table(drawbench_rows(), "Prompts;Category"), "it is 'Prompts;Category'"),
        ("", "list is empty; download or copy it again"),
        ("Prompts,Category\n", "has 0 prompts, but DrawBench has 200"),
        (table(drawbench_rows()).encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        (b"Prompts,Category\ncaf\xe9,Text\n", r"list:2 is not UTF-8 text \(byte 0xe9\)"),
    ],
)
def test_a_wrong_drawbench(read, content, message):
    """Catches a list of another size or form that is scored as DrawBench."""
    with pytest.raises(ValueError, match=message):
        read(caption_files.read_drawbench, content)


PARTI_HEADER = "Prompt\tCategory\tChallenge\tNote"


def test_partiprompts_has_no_quoting(read):
    """Catches a csv reader, which takes quotes at the start of a prompt off and joins rows."""
    rows = parti_rows()
    rows[0] = '"A G E M" on a wall\tArts\tBasic\tits "note'
    rows[1] = "a gem \tArts\tBasic"  # an editor that cuts white space off at the end of a line
    captions, notes = read(caption_files.read_partiprompts, table(rows, PARTI_HEADER))
    assert captions[0] == Caption(0, '"A G E M" on a wall', "Arts")
    assert captions[1] == Caption(1, "a gem", "Arts")
    assert len(captions) == 1632 and not notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table(parti_rows(1631), PARTI_HEADER), "has 1,631 prompts, but PartiPrompts has 1,632"),
        (table(parti_rows(), "Prompt\tCategory"), "must name the columns Prompt, Category, Chall"),
        (table(['"a ""gem"""\tArts\tBasic\t'], PARTI_HEADER), "list:2 has doubled quotes: a spre"),
        (table(["\tArts\tBasic\t"], PARTI_HEADER), "list:2: the prompt is empty"),
    ],
)
def test_wrong_partiprompts(read, content, message):
    """Catches a cut or changed list that is scored as PartiPrompts."""
    with pytest.raises(ValueError, match=message):
        read(caption_files.read_partiprompts, content)


def test_geneval(read):
    """Catches prompts that are numbered within their category: the id names the folder."""
    captions, _ = read(caption_files.read_geneval, "\n".join(geneval_lines()))
    assert captions[99] == Caption(99, GEMS[99], "position")
    assert captions[100] == Caption(100, GEMS[100], "two_object")
    assert len(captions) == 553


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (geneval_lines()[1:], "has 552 prompts, but GenEval has 553"),
        (geneval_lines()[1:] + geneval_lines()[-1:], "has 99 prompts of the category 'position'"),
        (["{", *geneval_lines()], r"list:1 is not valid JSON \(.*\); download or copy it again"),
        (["[1]", *geneval_lines()], "list:1 has no text 'tag': each line must be an object with"),
        (['{"tag": "colors"}'], "list:1 has no text 'prompt'"),
        (
            ['{"tag": "position", "prompt": "x"}', *geneval_lines()[1:]],
            "list:1 has no list `include`",
        ),
    ],
)
def test_wrong_geneval(read, lines, message):
    """Catches an incomplete list, whose score is published as GenEval's."""
    with pytest.raises(ValueError, match=message):
        read(caption_files.read_geneval, "\n".join(lines))


def test_gpic(read, monkeypatch):
    """Catches a category that is not the type of the caption, and a lost key."""
    monkeypatch.setattr(caption_files, "GPIC", 40)
    lines = gpic_lines(40)
    lines[20] = "\ufeff" + lines[20]  # of files that were joined
    captions, _ = read(caption_files.read_gpic, "\n".join(lines))
    assert captions[31] == Caption(31, GEMS[31], "short", "1f")
    assert len(captions) == 40


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (gpic_lines(9), "has 9 prompts, but the fixed test captions of GPIC has 50,000"),
        (gpic_lines(9) + gpic_lines(1), "list:10 has the key '0' of line 1: write each test"),
        (['{"key": "a", "caption": "x"}'], "has no text 'caption_type'"),
        (['{"key": "a", "caption": "\\ud83d", "caption_type": "tag"}'], "is not valid Unicode"),
    ],
)
def test_wrong_gpic(read, lines, message):
    """Catches captions of another split, and a key whose image would count twice."""
    with pytest.raises(ValueError, match=message):
        read(caption_files.read_gpic, "\n".join(lines))


def test_a_prompt_file(read, caplog):
    """Catches blank lines that shift ids or go uncounted, and rules other than those of sample."""
    text = "\ufeffa red gem\r\n\r\n \u200b\na green\u2028gem\x0c\ra blue\u200b gem"
    captions, notes = read(caption_files.read_prompt_file, text)
    assert captions == [
        Caption(0, "a red gem"),
        Caption(1, "a green gem"),
        Caption(2, "a blue gem"),
    ]
    assert notes == {"blank_line": 2, "removed_characters": 1}
    assert "removed 1 x U+200B from the prompt 'a blue gem'" in caplog.text


def test_a_pointer_is_no_prompt_file(read):
    """Catches the three lines of a Git LFS pointer, sampled as prompts."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    with pytest.raises(ValueError, match="list is a Git LFS pointer instead of the file itself"):
        read(caption_files.read_prompt_file, pointer)
