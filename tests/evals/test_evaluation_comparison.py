"""Two evaluations of cascades compared: paired, refused if they differ, older files read."""

import copy
import json

import numpy as np
import pytest

from imagen_jax import storage
from imagen_jax.evals import evaluation_comparison, grid_comparison, suite_evaluation
from tests.evals.test_grid_comparison import PROMPTS, point
from tests.evals.test_suite_evaluation import settings

NETWORK = {"network": "inception", "preprocessing": "p", "dim": 4, "weights_sha256": "w"}
CLIP = {"network": "clip-b32", "preprocessing": "c", "dim": 4, "weights_sha256": "c"}


def result(**changes):
    """A result as `evaluate --cascade` writes it, of a point of the tests of grids."""
    found = point(**changes)
    ranks = found.ranks.astype(int).tolist()
    by_prompt = {"scores": {"clip-b32": found.per_prompt["clip-b32"].tolist()}, "ranks": ranks}
    provenance = {
        "suite": {"prompts_sha256": "s"},
        "pictures": {"per_prompt": 1},
        "references": {
            "inception": {"images": {"path": "a", "sha256": "i", "size": 64}, "network": NETWORK}
        },
        "networks": {"inception": NETWORK, "clip-b32": CLIP | {"captions": CLIP}},
    }
    return dict(found.scores) | {"by_prompt": by_prompt, "provenance": provenance}


def compared(tmp_path, a, b):
    for name, content in (("a", a), ("b", b)):
        storage.write_json(tmp_path / name / suite_evaluation.RESULT, content)
    return evaluation_comparison.compare(tmp_path / "a", tmp_path / "b")


@pytest.fixture(scope="module")
def pair():
    return result(), result(fd_shift=0.5, clip=0.3, hits=8, noise=0.05)


@pytest.fixture(autouse=True)
def directories(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()


def test_differences_are_those_of_a_grid(pair, tmp_path):
    """Catches A minus B, errors of the two values, and KID in two units."""
    pair[1]["provenance"]["references"]["inception"]["images"]["path"] = "elsewhere"
    found = compared(tmp_path, *pair)
    assert not found["not_paired"] and json.dumps(found)
    by_name = {entry["metric"]: entry for entry in found["differences"]}
    assert by_name["clip_score"]["difference"] == pytest.approx(0.3, abs=0.05)
    assert by_name["clip_score"]["se"] < 0.02 and by_name["clip_score"]["ratio"] > 10
    assert by_name["top1"]["difference"] == pytest.approx(8 / PROMPTS)
    for metric in ("fd", "kid"):
        entry, key = by_name[metric], pair[1]["metrics"]["inception"][metric]["value"]
        assert entry["b"] == pytest.approx(key) and entry["difference"] > 4 * entry["se"] > 0
        assert entry["difference"] == pytest.approx(entry["b"] - entry["a"])
    text = evaluation_comparison.table(found)
    kid = by_name["kid"]
    assert f"B - A {1000 * kid['difference']:.4g} +- {1000 * kid['se']:.4g} (" in text
    assert "inception: KID x 1000" in text and "standard errors)" in text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("suite", "prompts_sha256"), "different prompts"),
        (("pictures", "per_prompt"), "different numbers of pictures per prompt"),
        (("references", "inception", "images", "sha256"), "different real images .inception"),
        (("references", "inception", "images", "size"), "different real images .inception"),
        (("networks", "clip-b32", "weights_sha256"), "different networks .clip-b32, weights"),
        (("networks", "clip-b32", "captions", "weights_sha256"), "networks .clip-b32 text"),
    ],
)
def test_results_of_different_evaluations_are_refused(pair, tmp_path, path, message):
    """Catches two prompt lists of one length, whose blocks agree."""
    other = copy.deepcopy(pair[1])
    place = other["provenance"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = "other"
    with pytest.raises(ValueError, match=message):
        compared(tmp_path, pair[0], other)


def test_results_of_an_earlier_version_are_read(pair, tmp_path):
    """Catches a file without the new fields that stops the comparison, or numbers that are left out
    in silence.
    """
    old = copy.deepcopy(pair[0])
    del old["by_prompt"]
    old["provenance"]["networks"] = {"inception": {"preprocessing": "p"}}
    for a, b in ((old, pair[1]), (old, old)):
        found = compared(tmp_path, a, b)
        assert [entry["metric"] for entry in found["differences"]] == ["fd", "kid"]
        assert "clip-b32: CLIP score" in found["not_paired"]
        assert any(name.startswith("retrieval") for name in found["not_paired"])
        assert "run evaluate again" in evaluation_comparison.table(found)
    del old["metrics"]["inception"]["kid"]
    found = compared(tmp_path, old, pair[1])
    assert found["not_paired"]["inception: KID"] == "only one of the results has it"


DAMAGED = {  # place: value
    ("metrics", "inception"): [],
    ("metrics", "inception", "fd"): {},
    ("metrics", "inception", "fd", "value"): "1",
    ("metrics", "inception", "fd", "deleted"): [1.0, 2.0, 3.0],
    ("metrics", "clip-b32", "clip_score"): 3,
    ("retrieval",): None,
    ("provenance", "suite"): [],
    ("provenance", "pictures"): {},
    ("provenance", "references", "inception"): {},
    ("provenance", "networks"): None,
    ("by_prompt",): None,
    ("by_prompt", "scores"): {"clip-b32": ["a"]},
    ("by_prompt", "scores", "clip-b32"): [1.0, 2.0],
    ("by_prompt", "ranks"): [1, 2],
}


@pytest.mark.parametrize("place", DAMAGED)
def test_a_damaged_result_is_one_line_with_its_file(pair, tmp_path, place):
    """Catches a KeyError of a lost field, and shapes that numpy cannot broadcast."""
    broken = copy.deepcopy(pair[1])
    broken["provenance"]["suite"]["count"] = PROMPTS
    *parents, last = place
    inner = broken
    for name in parents:
        inner = inner[name]
    inner[last] = DAMAGED[place]
    with pytest.raises(
        ValueError, match=r"(?s)/b/evaluation\.json is damaged, or not of .*; remove it"
    ):
        compared(tmp_path, pair[0], broken)


def test_results_of_different_blocks_are_one_line(pair, tmp_path):
    """Catches a message of the arithmetic that names neither result."""
    other = copy.deepcopy(pair[1])
    for name in ("deleted", "sizes"):
        other["metrics"]["inception"]["fd"][name] = [1] * 3
    with pytest.raises(ValueError, match=r"of .*/a and .*/b cannot be compared .*different blocks"):
        compared(tmp_path, pair[0], other)


def test_a_file_stands_for_its_directory(pair, tmp_path):
    """Catches "Not a directory" for the path that evaluate printed."""
    expected = compared(tmp_path, *pair)
    files = [tmp_path / name / suite_evaluation.RESULT for name in "ab"]
    assert evaluation_comparison.compare(*files)["differences"] == expected["differences"]


def test_every_evaluation_keeps_its_numbers_by_prompt():
    """Catches CLIP scores and ranks that pair nothing: of pictures, or of another order."""
    texts = np.repeat(np.eye(8, dtype=np.float32), 2, axis=0)
    images = texts + np.repeat(np.linspace(0, 1, 8), 2)[:, None].astype(np.float32)
    ranks = np.stack([np.arange(16), np.full(16, 50)], axis=1)
    features = {"clip-b32": images, "clip-b32 text": texts, "retrieval": ranks}
    scores = {"metrics": {"clip-b32": {"clip_score": {}}}}
    found = suite_evaluation.by_prompt(settings(), scores, features)
    values = found["scores"]["clip-b32"]
    assert len(values) == 8 and values == sorted(values, reverse=True) and values[0] == 100.0
    assert found["ranks"] == ranks[:, 0].reshape(8, 2).tolist()
    assert grid_comparison.RETRIEVAL in features
