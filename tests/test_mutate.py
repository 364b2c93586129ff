"""The mutation script finds what it says it finds, and changes only that."""

import ast
import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
mutate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutate)

SOURCE = b'''"""Docstring with 1 + 2."""
Text = Float[Array, "b 3"] | None

def f(x: Float[Array, "b 4"], kind: str = "a", n: int = 5) -> Float[Array, "b 6"]:
    """One < two."""
    y: int = -7
    y += 8.0
    if kind == "b" and not x:
        raise ValueError(f"{kind} is not {9 + 9}")
    return g("c", True)[x <
        0.5]
'''


@pytest.fixture
def sites(tmp_path, monkeypatch):
    (tmp_path / "f.py").write_bytes(SOURCE)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    return mutate.find_sites(["f.py"])


def test_every_operator_and_constant_is_a_site_and_nothing_else(sites):
    """Catches operators or constants that are never drawn, and annotations, docstrings, messages
    and plain strings that are.
    """
    choices = {choice for site in sites for choice in site.choices}
    signs_and_numbers = {
        "(6)",
        "(4)",
        "(+7)",
        "(8)",
        "y = (y - 8.0)",
        "(9.0)",
        "(16.0)",
        "(1.5)",
        "(1.0)",
        "(False)",
    }
    logic = {"(kind == 'b' or not x)", "(kind != 'b')", "('b_')", "(x)", "(x <= 0.5)", "(x >= 0.5)"}
    assert choices == signs_and_numbers | logic


def test_each_fault_changes_the_program_at_its_own_line(sites):
    """Catches a replacement that lands elsewhere, breaks the syntax, or leaves the program as it
    was.
    """
    original = ast.dump(ast.parse(SOURCE))
    for site in sites:
        for text in site.choices:
            changed = mutate.mutate(SOURCE, site, text)
            assert ast.dump(ast.parse(changed)) != original
            assert changed.splitlines()[: site.line - 1] == SOURCE.splitlines()[: site.line - 1]
            after = SOURCE.splitlines()[site.end_line :]
            assert changed.splitlines()[len(changed.splitlines()) - len(after) :] == after


def test_every_source_has_targets_that_exist():
    """Catches a renamed test file: its faults would all look killed, or the script would stop."""
    files = [
        str(path.relative_to(ROOT)) for pattern in mutate.SOURCES for path in ROOT.glob(pattern)
    ]
    assert len(files) > 10
    assert all((ROOT / target).exists() for file in files for target in mutate.targets_of(file))
