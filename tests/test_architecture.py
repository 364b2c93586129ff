"""docs/architecture.md has one row for each file, and no other row."""

import collections
import pathlib
import re

from tests.test_layering import LAYERS

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("imagen_jax", "configs", "launch", "tools")
ROW = re.compile(r"^\| `([\w/]+(?:\.py|/))` \| (.+) \|$", re.MULTILINE)
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROWS = ROW.findall(ARCHITECTURE)


def on_disk():
    """The files of the repository as the document names them: `folder/` for its __init__.py."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix().removesuffix("__init__.py") for path in files}


def test_each_file_has_one_row():
    """Catches a new file without a row, two rows of one file, and a row of several files.

    A new ablation needs no row, so that it remains an addition of one file.
    """
    rows = collections.Counter(name for name, _ in ROWS)
    without = on_disk() - rows.keys()
    assert not [name for name in without if not name.startswith("configs/ablations/")]
    assert not [name for name, count in rows.items() if count > 1]


def test_each_row_has_its_file():
    """Catches the row of a deleted or renamed file."""
    names = {name for name, _ in ROWS}
    assert not [name for name in names if not (ROOT / name).exists()]
    files = {name for name in names if name.endswith(".py")}
    assert files <= on_disk()


def test_each_row_of_a_file_is_one_sentence():
    """Catches a row without a sentence or with several."""
    wrong = [
        f"{name}: {sentence}"
        for name, sentence in ROWS
        if name.endswith(".py") and not re.fullmatch(r"[A-Z](?:[^.]|\.(?! ))+\.", sentence)
    ]
    assert not wrong


def test_the_layers_are_those_of_the_import_rules():
    """Catches a table of layers that lacks a module, or has one in another layer."""
    table = ARCHITECTURE.split("| layer, highest first |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if "`" in line]
    written = [set(" ".join(re.findall("`([^`]+)`", row)).split()) for row in rows]
    assert written == [set(units) for units in reversed(LAYERS)]
