"""KID of one stage's samples, with features that are known."""

import importlib.metadata

import numpy as np
import pytest

from imagen_jax.evals.distances import kid as distances
from imagen_jax.evals.measures import kid, measure
from imagen_jax.evals.networks import network
from tests.evals import toys
from tests.evals.toys import N


class Quick:
    """Stands for the feature network, and counts the images."""

    def __init__(self):
        self.seen, self.identity = 0, {"network": "quick"}

    def features(self, images):
        self.seen += len(images)
        return images.reshape(len(images), -1)[:, :7].astype(np.float32) / 64


@pytest.fixture
def quick(monkeypatch):
    found = Quick()
    monkeypatch.setattr(kid, "_network", lambda: found)
    return found


def test_samples_of_the_right_captions_are_compared_with_their_own_split(toy, quick):
    """Catches the other split's images, samples of another caption, and values of rows whose mean
    is not the result."""
    result, rows = kid.measure(toy), kid.row_values(toy)
    features = lambda images: Quick().features(images)
    for split in ("train", "heldout"):
        samples = features(toy.samples(split))
        real = features(toy.data.wholes(split).batch["image"])
        assert result[split]["mean"] == pytest.approx(distances.distance(samples, real), rel=1e-9)
        assert (result[split]["n"], result[split]["n_reference"]) == (N, N)
        assert rows[f"{split}.mean"].mean() == pytest.approx(result[split]["mean"], rel=1e-12)
    assert result["train"]["mean"] != result["heldout"]["mean"]


def test_real_images_are_read_once_for_all_checkpoints(quick):
    """Catches features of the same real images computed for each checkpoint, or samples not."""
    first = toys.evaluation()
    kid.measure(first)
    assert quick.seen == 4 * N
    kid.row_values(first)
    second = type(first)(first.probe, first.data, {"bias": np.zeros(())})
    assert kid.measure(second) == kid.measure(first)
    assert quick.seen == 6 * N


def test_without_the_package_it_is_skipped_with_its_reason(monkeypatch):
    """Catches an evaluation that ends with an error because an optional package is missing."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(network.importlib.metadata, "distribution", missing)
    toy, data = toys.Toy(), toys.Marked()
    chosen, left_out = measure.allowed(measure.choose([], toy, toys.settings()), toy, data)
    assert "kid" not in chosen and "retrieval" in chosen
    assert "pip install 'imagen_jax[eval]'" in left_out["kid"]


def test_lines_name_both_numbers_of_images():
    """Catches a line for the network's identity, and an error taken for the value."""
    score = {"mean": 0.5, "se": 0.125, "n": 9, "n_reference": 20}
    assert list(kid.lines({"network": {}, "heldout": score})) == [
        ("KID, heldout", "0.5 +- 0.125, 9 samples and 20 real images")
    ]
