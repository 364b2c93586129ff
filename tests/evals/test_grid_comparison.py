"""The best point of a grid and the points tied with it; the Pareto figure."""

import io
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from imagen_jax.evals import data_suite, grid_comparison, grid_evaluation, pareto
from imagen_jax.evals.distances import frechet, kid
from imagen_jax.evals.grid_comparison import PointResult
from imagen_jax.evals.settings_grid import Axis
from imagen_jax.evals.statistics import summary

PROMPTS = 80


def point(fd_shift=0.0, clip=0.0, hits=0, noise=0.0, seed=1):
    """A point whose features, CLIP scores and ranks are those of other points, moved a little."""
    rng, own = np.random.default_rng(0), np.random.default_rng(seed)
    samples, reference = rng.standard_normal((PROMPTS, 4)), rng.standard_normal((500, 4))
    samples = samples + fd_shift + noise * own.standard_normal(samples.shape)
    scores = 25 + 5 * rng.standard_normal(PROMPTS) + clip + noise * own.standard_normal(PROMPTS)
    ranks = np.where(np.arange(PROMPTS) < hits, 1.0, 9.0)[:, None]
    prompts = np.arange(PROMPTS)
    metrics = {
        "inception": {
            "fd": frechet.score(samples, reference, prompts, repeats=1),
            "kid": kid.score(samples, reference, prompts),
        },
        "clip-b32": {"clip_score": {**summary(scores), "warnings": []}},
    }
    retrieval = data_suite.summary(np.stack([ranks[:, 0], np.full(PROMPTS, 99)], 1).astype(int))
    scores_of = {"metrics": metrics, "left_out": {}, "retrieval": retrieval}
    return PointResult(scores_of, {"clip-b32": scores}, ranks)


@pytest.fixture(scope="module")
def points():
    return [
        point(fd_shift=0.5, clip=0.0, hits=40),
        point(fd_shift=0.0, clip=0.3, hits=41, noise=0.05),
        point(fd_shift=0.0, clip=0.3, hits=70, noise=0.05, seed=2),
    ]


def best_of(points, metric):
    (found,) = (
        grid_comparison.best(q) for q in grid_comparison.quantities(points) if q.metric == metric
    )
    return found


def test_differences_are_paired(points):
    """Catches ties by the errors of the two values: a CLIP score that is 0.3 better for every
    prompt is better, although the standard error of each score is 0.6; and a distance that is
    larger for all prompts.
    """
    found = best_of(points, "clip_score")
    assert points[0].scores["metrics"]["clip-b32"]["clip_score"]["se"] > 0.3
    assert found["best"] in (1, 2) and 0 not in found["tied"] and len(found["tied"]) == 1
    found = best_of(points, "fd")
    assert found["less_is_better"] and found["best"] in (1, 2) and len(found["tied"]) == 1
    (worse,) = (entry for entry in found["differences"] if entry["point"] == 0)
    assert worse["value"] == pytest.approx(1.0, abs=0.3) and worse["value"] > 4 * worse["se"]


def test_retrieval_is_paired_by_hits(points):
    """Catches hits compared as independent rates, and ranks above 1 that count as top-1."""
    found = best_of(points, "top1")
    assert found["best"] == 2 and found["tied"] == []
    found = best_of(points[:2], "top1")
    assert found["best"] == 1 and found["tied"] == [0]
    (entry,) = found["differences"]
    assert entry["value"] == pytest.approx(-1 / PROMPTS)
    assert entry["se"] == pytest.approx(np.sqrt(3 * 82 - 1) / 82 / np.sqrt(82), rel=1e-3)


def test_differences_have_the_unit_of_the_values_of_the_file(points):
    """Catches a difference of KID times 1000 in a file whose KIDs are not, and a printed KID
    without that factor.
    """
    found = best_of(points, "kid")
    values = {i: points[i].scores["metrics"]["inception"]["kid"]["value"] for i in range(3)}
    for entry in found["differences"]:
        expected = values[entry["point"]] - values[found["best"]]
        assert entry["value"] == pytest.approx(expected)
    (kid,) = (q for q in grid_comparison.quantities(points) if q.metric == "kid")
    assert found["label"] == "KID" and kid.estimates[0]["mean"] == pytest.approx(1000 * values[0])
    assert "KID x 1000" in grid_comparison.table(list("abc"), [kid], [found])
    assert pareto.axis_label(kid).startswith("KID x 1000 (inception)")


def test_a_missing_number_is_no_best(points):
    """Catches a point whose metric was left out that is compared or that stops the table."""
    broken = point()
    del broken.scores["metrics"]["inception"]["fd"]
    quantities = grid_comparison.quantities([broken, *points])
    (fd,) = (q for q in quantities if q.metric == "fd")
    found = grid_comparison.best(fd)
    assert found["best"] in (2, 3) and not fd.complete
    text = grid_comparison.table(list("abcd"), [fd], [found]).splitlines()
    assert text[1].split() == ["a", "-"]
    assert pareto.choose(quantities)[0].metric == "kid"


def test_the_table_marks_best_and_tied(points):
    """Catches marks at the wrong point, and a column under the heading of another network."""
    quantities = grid_comparison.quantities(points)
    found = [grid_comparison.best(quantity) for quantity in quantities]
    blocks = grid_comparison.table(["w=1", "w=2", "w=4"], quantities, found).split("\n\n")
    assert [block.split()[0] for block in blocks] == ["inception", "clip-b32", "retrieval", "*"]
    assert blocks[0].splitlines()[0].split("  ")[1:][0].strip() == "FID"
    retrieval = [line.split() for line in blocks[2].splitlines()]
    assert retrieval[3][4] == "*" and retrieval[1].count("*") == retrieval[2].count("*") == 0


AXES = [
    Axis("base", "w", (1.0, 2.0)),
    Axis("sr_1", "w", (1.0, 4.0, 8.0)),
    Axis("sr_1", "aug_level", (0.0, 0.1)),
]


def test_curves_run_along_the_first_axis():
    """Catches points that are joined along another axis than the labels say."""
    found = list(pareto.curves(AXES))
    assert found[0] == ("sr_1.aug_level=0", "sr_1.w=1", [0, 6])
    assert found[1] == ("sr_1.aug_level=0", "sr_1.w=4", [2, 8])
    assert found[3] == ("sr_1.aug_level=0.1", "sr_1.w=1", [1, 7])
    assert len(found) == 6
    assert list(pareto.curves(AXES[:1])) == [("", "", [0, 1])]


def test_error_bars_reach_the_ends_of_an_interval(points):
    """Catches symmetric bars for a rate, and bars of one standard error with the width of two."""
    quantities = grid_comparison.quantities(points)
    fd, clip = pareto.choose(quantities)
    assert (fd.metric, clip.metric) == ("fd", "clip_score")
    se = fd.estimates[0]["se"]
    np.testing.assert_allclose(pareto.error_bars(fd, [0]), [[se], [se]], rtol=1e-6)
    (rate,) = (q for q in quantities if q.metric == "top5")
    (below,), (above,) = pareto.error_bars(rate, [2])
    assert below > above > 0  # 87.5 % of 80
    assert rate.estimates[2]["low"] == pytest.approx(rate.estimates[2]["mean"] - below)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_figure_is_drawn(points, count):
    """Catches a grid of one, two or three axes that stops the figure; one panel more is wider."""
    axes = AXES[:count]
    n = int(np.prod([len(axis.values) for axis in axes]))
    quantities = grid_comparison.quantities([points[i % 3] for i in range(n)])
    image = Image.open(io.BytesIO(pareto.figure(axes, *pareto.choose(quantities))))
    assert image.width == (968 if count == 3 else 660)


def test_labels_cover_nothing():
    """Catches numbers on top of each other, where the points of two curves are close."""
    figure = Figure(figsize=(4, 3))
    place = figure.subplots()
    place.set(xlim=(0, 1), ylim=(0, 1))
    at = [(0.5, 0.5), (0.501, 0.5), (0.502, 0.5), (0.5, 0.501), (0.501, 0.501), (0.2, 0.2)]
    labels = [pareto.Label(place, point, str(i), "C0") for i, point in enumerate(at)]
    assert [label.text for label in pareto.write_labels(labels)] == ["0", "1", "2", "3", "5"]
    boxes = [text.get_window_extent() for text in place.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_damaged_scores_of_a_point_are_computed_again(tmp_path):
    """Catches a traceback when the points are compared, and sound scores that are not read."""
    path, found = tmp_path / "scores.json", point(hits=3)
    grid_evaluation.write_scores(path, "digest", found)
    whole = json.loads(path.read_text())
    read = grid_evaluation.read_scores(path, "digest", PROMPTS)
    assert read.scores == json.loads(json.dumps(found.scores)) and read.ranks.tolist()
    np.testing.assert_array_equal(read.per_prompt["clip-b32"], found.per_prompt["clip-b32"])
    assert grid_evaluation.read_scores(path, "other", PROMPTS) is None
    metrics = whole["scores"]["metrics"]
    for damage in (
        {"scores": {}},
        {"scores": {"metrics": {}}},
        {"scores": whole["scores"] | {"metrics": metrics | {"inception": {"fd": {"value": 1}}}}},
        {"scores": whole["scores"] | {"retrieval": {}}},
        {"per_prompt": {}},
        {"per_prompt": {"clip-b32": [1.0]}},
        {"ranks": [[1]]},
        {"ranks": "x"},
    ):
        path.write_text(json.dumps(whole | damage))
        assert grid_evaluation.read_scores(path, "digest", PROMPTS) is None, damage
