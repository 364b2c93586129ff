"""Numbers of pictures: claimed exclusively, counted by every kind of file."""

import concurrent.futures

import numpy as np
import pytest
from PIL import Image

from imagen_jax import pictures

IMAGE = np.zeros((4, 4, 3), np.uint8)


def claimed(directory, count=1):
    with pictures.claim_numbers(directory, count) as numbers:
        return list(numbers)


@pytest.mark.parametrize(
    "name", ["0007_a_cat.png", "0007_a_cat.json", "0007_.png", "sheet_0007.png"]
)
def test_every_file_with_a_number_counts(tmp_path, name):
    """Catches numbering by records alone: a picture whose record is missing would be replaced."""
    (tmp_path / name).touch()
    assert claimed(tmp_path, 2) == [8, 9]


def test_other_files_do_not_count(tmp_path):
    """Catches a crash on, or a number read from, files that are no pictures of `sample`."""
    for name in ("1st_try.png", "notes.json", "x_0009.png", ".0009_cat.png.12.tmp", "9_cat.txt"):
        (tmp_path / name).touch()
    assert claimed(tmp_path, 2) == [0, 1]
    assert claimed(tmp_path / "new" / "directory") == [0]


def test_claims_exclude_each_other_and_end(tmp_path):
    """Catches two writers with the same number, and claims that stay after the pictures exist."""
    with pictures.claim_numbers(tmp_path, 2) as first:
        with pictures.claim_numbers(tmp_path, 3) as second:
            assert first == [0, 1] and second == [2, 3, 4]
        pictures.write_png(tmp_path / "0001_a.png", IMAGE)
    assert claimed(tmp_path) == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["0001_a.png"]


def test_a_number_taken_after_the_listing_is_not_reused(tmp_path, monkeypatch):
    """Catches a claim without a second look: the other process may have finished in between."""
    numbers, calls = pictures.numbers, []

    def slow(directory):
        result = numbers(directory)
        if not calls:  # the other process writes two pictures and ends its claims
            (tmp_path / "0000_other.png").touch()
            (tmp_path / "0001_other.png").touch()
        calls.append(directory)
        return result

    monkeypatch.setattr(pictures, "numbers", slow)
    assert claimed(tmp_path, 3) == [2, 3, 4]
    assert not list(tmp_path.glob(".*"))


def write_many(directory, value):
    for _ in range(20):
        with pictures.claim_numbers(directory, 2) as numbers:
            for number in numbers:
                pictures.write_png(directory / f"{number:04d}_apple.png", IMAGE + value)


def test_all_pictures_of_two_writers_exist(tmp_path):
    """Catches numbers chosen by listing alone: the second writer replaces the first's pictures."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(write_many, [tmp_path] * 2, np.uint8([1, 2])))
    values = [np.asarray(Image.open(path)).flat[0] for path in tmp_path.iterdir()]
    assert sorted(values) == [1] * 40 + [2] * 40


def test_a_killed_process_does_not_block_the_next(tmp_path):
    """Catches an abandoned claim that the next process waits for, reuses or fails on."""
    (tmp_path / ".0000.claim").touch()
    pictures.write_png(tmp_path / "0001_picture_without_record.png", IMAGE)
    assert claimed(tmp_path, 2) == [2, 3]
    (tmp_path / "notes.txt").touch()
    pictures.remove_numbered(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert claimed(tmp_path, 2) == [0, 1]
