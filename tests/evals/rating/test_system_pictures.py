"""Which files of a folder are the pictures of a prompt."""

import json
import re

import pytest

from imagen_jax.evals.rating import system_pictures
from tests.evals.rating import studies

ITEMS = studies.items(3)


def files_of(directory):
    """{prompt: files relative to the folder}, as `read` finds them."""
    found = system_pictures.read("okapi", str(directory), ITEMS)
    return {
        prompt: [str(path.relative_to(directory)) for path in files]
        for prompt, files in found.files.items()
    }


def touch(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_manifest(directory, *rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / system_pictures.MANIFEST).write_text(lines)


def test_a_grid_of_all_pictures_is_none_of_them(tmp_path):
    """Catches the grid.png of GenEval's own script, which sorts before its samples."""
    touch(tmp_path, "00001/grid.png", "00001/samples/0000.png", "00001/samples/0001.png", "2/a.png")
    assert files_of(tmp_path) == {
        1: ["00001/samples/0000.png", "00001/samples/0001.png"],
        2: ["2/a.png"],
    }


def test_links_to_folders_of_prompts_are_followed(tmp_path):
    """Catches pictures that are missing because their folder is a link."""
    touch(tmp_path, "real/0.png")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "1").symlink_to(tmp_path / "real")
    assert files_of(tmp_path / "all") == {1: ["1/0.png"]}


def test_odd_digits_do_not_end_the_command(tmp_path):
    """Catches digits that are no decimal numbers, such as a superscript."""
    touch(tmp_path, "1_2\u00b23.png", "1_10.png", "1_9.png")
    assert files_of(tmp_path) == {1: ["1_2\u00b23.png", "1_9.png", "1_10.png"]}


def test_a_manifest_is_of_its_suite(tmp_path):
    """Catches pictures of other texts under the same ids, and one picture that counts as two."""
    row = {"prompt_id": 1, "file": "a.png"}
    write_manifest(
        tmp_path, row | {"prompt": " a picture of  the number 1"}, row | {"file": "b.png"}
    )
    assert files_of(tmp_path) == {1: ["a.png", "b.png"]}
    for other, message in (
        ({"prompt": "a cat"}, "line 2 has the text 'a cat' for the prompt 1, which is 'a picture"),
        ({"file": "a.png"}, "line 2 lists a.png again"),
    ):
        write_manifest(tmp_path, row, row | {"file": "b.png"} | other)
        with pytest.raises(ValueError, match=re.escape(message)):
            files_of(tmp_path)


def test_empty_lines_of_a_manifest(tmp_path):
    """Catches a manifest that an editor ended with an empty line."""
    (tmp_path / system_pictures.MANIFEST).write_text('{"prompt_id": 1, "file": "a.png"}\n\n')
    assert files_of(tmp_path) == {1: ["a.png"]}
