"""The figures of an evaluation on a suite."""

import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from imagen_jax import pictures
from imagen_jax.evals import suite_figures
from imagen_jax.evals.distances import frechet
from imagen_jax.evals.statistics import summary


@pytest.fixture
def manifest(tmp_path):
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "pictures" / "set_0000.jsonl"
    for size in ("", "_4"):
        image = np.zeros((4 if size else 8,) * 2 + (3,), np.uint8)
        pictures.write_png(path.with_name(f"0000_a{size}.png"), image)
    row = {"row": 0, "prompt": "a", "seed": 0, "file": "0000_a.png", "sha256": ""}
    path.write_text(json.dumps(row) + "\n")
    return path


def test_a_result_gets_the_figures_that_it_has_numbers_for(tmp_path, manifest):
    """Catches a figure without its numbers, figures between the pictures, a result without
    categories or distances that stops the evaluation, and a figure of an earlier result that stays.
    """
    rng = np.random.default_rng(0)
    samples, reference = rng.standard_normal((60, 4)), rng.standard_normal((60, 4))
    fd = frechet.score(samples, reference, np.arange(60), repeats=2)
    clip = {**summary(rng.random(60)), "warnings": []}
    categories = {"Colours": summary(rng.random(9)), "Counting": summary(rng.random(1))}
    full = {
        "metrics": {"inception": {"fd": fd}, "clip-b32": {"clip_score": clip}},
        "categories": categories,
    }
    names = lambda result: [
        path.relative_to(tmp_path).as_posix()
        for path in suite_figures.write(result, manifest, [(4, 4), (8, 8)], tmp_path)
    ]
    assert names({"metrics": {}}) == ["sheet_0000.png"]
    assert names(full) == ["sheet_0000.png", "extrapolation.png", "categories.png"]
    assert names({**full, "categories": {}}) == ["sheet_0000.png", "extrapolation.png"]
    assert all(Image.open(path).width > 200 for path in tmp_path.glob("*.png"))
    assert not (tmp_path / "categories.png").exists()
    assert names({"metrics": {}}) == ["sheet_0000.png"]
    assert [path.name for path in tmp_path.glob("*.png")] == ["sheet_0000.png"]


def test_the_bar_of_the_extrapolation_is_its_standard_error(monkeypatch):
    """Catches a bar of the spread of random subsets, and a result of an earlier version, which has
    no error, that stops the figure.
    """
    drawn, errorbar = [], Axes.errorbar

    def recorded(axes, x, y, yerr, **style):
        drawn.append((x, yerr))
        return errorbar(axes, x, y, yerr, **style)

    monkeypatch.setattr(Axes, "errorbar", recorded)
    limit = {"counts": [10, 20], "distances": [2.0, 1.5], "value": 1.0, "spread": 0.5}
    for error in ({"se": 0.25}, {}):
        fd = {"value": 1.5, "se": 0.1, "infinity": limit | error}
        suite_figures.extrapolation({"inception": fd})
    assert drawn == [(50.0, 0.1), (0, 0.25), (50.0, 0.1), (0, 0.0)]
