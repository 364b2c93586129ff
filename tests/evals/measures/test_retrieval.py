"""Retrieval of marked images."""

import numpy as np

from imagen_jax.evals import nearest
from imagen_jax.evals.measures import retrieval
from tests.evals.toys import N


def test_the_captioned_image_of_its_own_split_counts(toy):
    """Catches the held-out images' place in the gallery counted from 0, and controls drawn from the
    right text."""
    result = retrieval.measure(toy)
    for split in ("train", "heldout"):
        assert result[split]["right"]["top1"]["rate"] == 1.0
        assert result[split]["right"]["gallery"] == 2 * N
        assert result[split]["shuffled"]["top1"]["hits"] == 0
    # Null text draws black: nearest are the marks 10, 18, 20, 28, 30, of which train has three.
    assert [result[split]["null"]["top5"]["hits"] for split in ("train", "heldout")] == [3, 2]


def test_line_has_both_ranks_in_percent():
    """Catches an interval of the other rank, and percent taken for a share."""
    result = {"heldout": {"right": nearest.score(np.eye(3), np.array([0, 1, 1]))}}
    rates = "top-1 0.0 % [0.0, 56.1], top-5 100.0 % [43.9, 100.0]"
    wanted = [("retrieval, heldout, right text", f"of 3 images: {rates}")]
    assert list(retrieval.lines(result)) == wanted
