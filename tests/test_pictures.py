"""Numbers of pictures: counted by every kind of file."""

import numpy as np
import pytest

from imagen_jax import pictures

IMAGE = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    "name", ["0007_a_cat.png", "0007_a_cat.json", "0007_.png", "sheet_0007.png"]
)
def test_every_file_with_a_number_counts(tmp_path, name):
    """Catches numbering by records alone: a picture whose record is missing would be replaced."""
    (tmp_path / name).touch()
    assert pictures.numbers(tmp_path) == {7}


def test_other_files_do_not_count(tmp_path):
    """Catches a crash on, or a number read from, files that are no pictures of `sample`."""
    for name in ("1st_try.png", "notes.json", "x_0009.png", ".0009_cat.png.12.tmp", "9_cat.txt"):
        (tmp_path / name).touch()
    assert pictures.numbers(tmp_path) == set() == pictures.numbers(tmp_path / "new")


def test_old_pictures_and_claims_are_removed(tmp_path):
    """Catches a file of the user that is deleted with the pictures."""
    for name in ("0001_a.png", "0001_a.json", "sheet_0001.png", ".0000.claim", "notes.txt"):
        (tmp_path / name).touch()
    pictures.remove_numbered(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
