"""The folders that GenEval's scorer reads."""

import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.evals.geneval_layout import write_layout

METADATA = [
    {"tag": "colors", "include": [{"class": "cup", "count": 1}], "prompt": f"a café cup {n}"}
    for n in range(3)
]


def picture(value):
    return np.full((8, 8, 3), value, np.uint8)


def test_layout(tmp_path):
    """Catches a picture in the folder of another prompt, and metadata that differ from the list."""
    rows = [(2, picture(20)), (0, picture(0)), (1, picture(10)), (0, picture(1)), (2, picture(21))]
    write_layout(tmp_path, METADATA, iter([*rows, (1, picture(11))]))
    for prompt in range(3):
        folder = tmp_path / f"{prompt:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == METADATA[prompt]
        samples = sorted((folder / "samples").iterdir())
        assert [sample.name for sample in samples] == ["0000.png", "0001.png"]
        assert [np.asarray(Image.open(sample))[0, 0, 0] for sample in samples] == [
            10 * prompt,
            10 * prompt + 1,
        ]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([0, 1], "1 of 3 prompts have fewer than 1 pictures, the first is 2: sample them too"),
        ([0, 1, 2, 2], "2 of 3 prompts have fewer than 2 pictures, the first is 0"),
        ([], "3 of 3 prompts have fewer than 1 pictures"),
        ([3], "there is no prompt 3: ids are 0 to 2"),
    ],
)
def test_an_incomplete_set(tmp_path, prompts, message):
    """Catches 552 of 553 prompts, which the scorer averages without a word."""
    with pytest.raises(ValueError, match=message):
        write_layout(tmp_path, METADATA, ((prompt, picture(0)) for prompt in prompts))


def test_pictures_of_another_checkpoint(tmp_path):
    """Catches pictures of two runs in one folder."""
    (tmp_path / "00000").mkdir()
    with pytest.raises(ValueError, match="is not empty: give another directory"):
        write_layout(tmp_path, METADATA, [])
