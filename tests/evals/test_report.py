"""Numbers as text, and the picture of curves, from results made by hand."""

import io

import numpy as np
from PIL import Image

from imagen_jax.evals import noise_bins, report

CURVE = noise_bins.by_bin(np.array([[1.0, 2.0], [2.0, 3.0]]), [20.0, 0.0, -20.0])


def test_texts_of_a_table_stand_below_each_other():
    """Catches a column as wide as the last label."""
    assert report.table([("a", "1"), ("long", "2")]) == "a     1\nlong  2"


def test_each_panel_has_its_place():
    """Catches panels drawn over each other."""
    panels = [("loss", {"train": CURVE, "heldout": CURVE}), ("rise", {"null": CURVE})]
    assert Image.open(io.BytesIO(report.plot(panels))).size == (1100, 396)
    assert Image.open(io.BytesIO(report.plot(panels[:1]))).size == (550, 396)
