"""Precision, recall, density and coverage against the definitions and planted answers."""

import json

import numpy as np
import pytest

from imagen_jax.evals.distances import neighbours, tiles
from imagen_jax.evals.distances.jackknife import prompt_blocks, replicates


def features(n, seed=0, shift=0.0, d=3):
    return shift + np.random.default_rng(seed).standard_normal((n, d))


def line(*values):
    """Features of one dimension."""
    return np.array(values, float)[:, None]


def direct(x, y, k, k_density):
    """The four numbers by their definitions, from full distance matrices."""
    between = lambda a, b: np.linalg.norm(a[:, None] - b[None], axis=2)
    radius = lambda a, k: np.sort(between(a, a), axis=1)[:, k]
    cross, ball = between(y, x), radius(y, k_density)[:, None]
    return {
        "precision": (cross <= radius(y, k)[:, None]).any(axis=0).mean(),
        "recall": (cross <= radius(x, k)).any(axis=1).mean(),
        "density": (cross < ball).sum(axis=0).mean() / k_density,
        "coverage": (cross.min(axis=1) < ball[:, 0]).mean(),
    }


@pytest.mark.parametrize("elements", [1, 70, 10**6])
@pytest.mark.parametrize("k, k_density", [(1, 2), (3, 5)])
def test_tiles_and_deleted_blocks_give_the_definitions(monkeypatch, elements, k, k_density):
    """Catches samples and reference swapped, a row counted as its own neighbour, tiles left out,
    and radii that keep neighbours of a deleted block.
    """
    monkeypatch.setattr(tiles, "ELEMENTS", elements)
    x, y = features(32, shift=0.5), 1.3 * features(23, seed=1)
    blocks = prompt_blocks(np.arange(32) // 2, 4)
    found = neighbours.replicates(x, y, blocks, k, k_density)
    for name, values in found.items():
        wanted = replicates(lambda kept: direct(x[kept], y, k, k_density)[name], blocks)
        assert values.value == pytest.approx(wanted.value, abs=1e-12), name
        np.testing.assert_allclose(values.deleted, wanted.deleted, atol=1e-12, err_msg=name)
        assert len(set(wanted.deleted)) > 1


def test_radii_of_many_rows():
    """Catches another rank in a partition of long rows, with and without each block."""
    x, blocks = features(300), prompt_blocks(np.arange(300), 4)
    distances = np.sort(((x[:, None] - x[None]) ** 2).sum(axis=2), axis=1)
    np.testing.assert_allclose(neighbours.radii(x, (3, 20)), distances[:, [3, 20]].T, rtol=1e-9)
    full, deleted = neighbours.deleted_radii(x, 20, blocks)
    np.testing.assert_allclose(full, distances[:, 20], rtol=1e-9)
    for block in range(4):
        kept = blocks != block
        wanted = neighbours.radii(x[kept], (20,))[0]
        np.testing.assert_allclose(deleted[kept, block], wanted, rtol=1e-9)


def test_planted_answers():
    """Catches precision and recall swapped: all samples in one of two clusters are precise, and
    recall only that cluster.
    """
    y = line(0, 1, 2, 3, 100, 101, 102, 103)
    x = line(0.4, 0.9, 1.4, 1.9, 2.4, 2.9)
    found = neighbours.replicates(x, y, np.arange(6) % 2, k=2, k_density=2)
    assert [found[name].value for name in ("precision", "coverage")] == [1.0, 0.5]
    # A sample's ball reaches 1.0, at the ends of the row, or 0.5, so 0 is within the first's.
    assert found["recall"].value == 0.5
    # Radii 2, 1, 1, 2 of the balls around 0, 1, 2, 3: 4 + 4 + 3 + 4 samples lie inside; 2 k n = 24.
    inside = sum(abs(x - c) < r for c, r in ((0, 2), (1, 1), (2, 1), (3, 2))).sum()
    assert found["density"].value == pytest.approx(inside / 12)


def test_surface_of_a_ball_counts_for_precision_only():
    """Catches one comparison for all: a sample at exactly the radius."""
    y, x = line(0, 1, 10, 11), line(-1, -1, 50, 51)
    found = neighbours.replicates(x, y, np.arange(4) % 2, k=1, k_density=1)
    assert found["precision"].value == 0.5
    assert found["density"].value == 0 and found["coverage"].value == 0


def test_score_is_valid_json_and_warns():
    """Catches numpy numbers in a result, and recall compared between different numbers of images
    without a warning.
    """
    x, y = features(60), features(60, seed=1)
    result = neighbours.score(x, y, np.arange(60))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["warnings"] == [] and (result["k"], result["k_density"]) == (3, 5)
    assert "bias_corrected" not in result["recall"] and result["recall"]["se"] > 0
    assert result["precision"]["value"] == direct(x, y, 3, 5)["precision"]
    warning = neighbours.score(x, y[:50], np.arange(60))["warnings"]
    assert len(warning) == 1 and warning[0].startswith("60 samples and 50 reference images")


@pytest.mark.parametrize("k", [0, 9])
def test_impossible_k_is_refused(k):
    """Catches a k-th neighbour that does not exist once a block is deleted."""
    x, y = features(10), features(10, seed=1)
    with pytest.raises(ValueError, match="use from 1 to 7"):
        neighbours.score(x, y, np.arange(10), k=k, k_density=2, blocks=5)
