"""The list of bad input, bad_input.md, names tests that exist and every documented reason."""

import ast
import importlib
import re
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1]
ROOT = DATA.parents[1]
CELLS = re.compile(r"^\| ([^|]+) \| ([^|]+) \| `(\w+)` \| `([^|`]+)` \|$", re.MULTILINE)
TEXT = Path(__file__).with_name("bad_input.md").read_text(encoding="utf-8")
ROWS = CELLS.findall(TEXT)


def documented():
    """The reasons of docs/data.md."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = text.partition("## Skipped items")[2].partition("\n## ")[0]
    firsts = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return set(re.findall(r"`(\w+)`", " ".join(firsts)))


def test_every_line_is_a_row():
    """Catches a row with a missing cell, which no other test here would see; and lost rows."""
    assert TEXT.count("\n| ") == len(ROWS) + 1 and len(ROWS) >= 100
    assert len({(source, kind) for source, kind, _, _ in ROWS}) == len(ROWS)


def test_every_reason_has_bad_input_and_is_documented():
    """Catches a reason without a test, and one that docs/data.md does not explain."""
    assert {result for _, _, result, _ in ROWS} - {"error"} == documented()


def test_every_source_that_reads_files_of_users_is_listed():
    """Catches a new source whose bad input nobody has listed."""
    from imagen_jax.data.sources.source import kinds

    named = {name for source, _, _, _ in ROWS for name in source.split(", ")}
    assert kinds().keys() - {"emoji"} == named - {"all", "COCO"}


@pytest.mark.parametrize("where", sorted({test for *_, test in ROWS}))
def test_the_test_exists_and_expects_this(where):
    """Catches a test that was renamed or removed, and another result than the table says."""
    results = {result for _, _, result, test in ROWS if test == where}
    if "::" not in where:
        file, table, key = where.split(":")
        module = importlib.import_module(f"tests.data.{file.replace('/', '.')}")
        assert results <= {cell for cell in getattr(module, table)[key] if isinstance(cell, str)}
        return
    file, name = where.split("::")
    source = (DATA / f"{file}.py").read_text(encoding="utf-8")
    functions = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    assert name in [function.name for function in functions]
    assert all(result in source for result in results - {"error"})
    (function,) = (function for function in functions if function.name == name)
    assert "error" not in results or "pytest.raises" in ast.unparse(function)
