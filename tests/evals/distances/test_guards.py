"""Input that gives a wrong or meaningless distance is refused or reported."""

import numpy as np
import pytest

from imagen_jax.evals.distances import cmmd, frechet, guards, kid, mind, neighbours
from imagen_jax.evals.distances.moments import Statistics

FAMILIES = [frechet, kid, cmmd, mind, neighbours]
PROMPTS = np.arange(30)


def features(n=30, d=4, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_refuses_wrong_input(family):
    """Catches a family that does not check its features."""
    x, y = features(), features(seed=1)
    y[[3, 7], 1] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"reference: 2 of 30 .* non-finite .* rows \[3, 7\]"):
        family.score(x, y, PROMPTS)
    with pytest.raises(ValueError, match="4 features and the reference has 5; use one"):
        family.score(x, features(d=5), PROMPTS)
    with pytest.raises(ValueError, match="all 30 samples have the features of reference images"):
        family.score(x, np.concatenate([features(seed=2), x]), PROMPTS)
    with pytest.raises(ValueError, match="at least 2 images"):
        family.score(x, features(1), PROMPTS)


def test_reference_images_among_the_samples_are_counted():
    """Catches a comparison of bytes that differ for equal numbers: another type, and -0."""
    x, y = features().astype(np.float32), features(seed=1)
    x[5, 0], x[6, 0] = -0.0, 0.0
    y[[10, 11, 12]] = x[[5, 6, 7]]
    y[10, 0], y[12, 3] = 0.0, np.nextafter(y[12, 3], 9)
    assert np.flatnonzero(guards.shared(x, y)).tolist() == [5, 6]
    assert guards.check_pair(x, y)[0].startswith("2 of 30 samples have exactly")


def test_distance_of_0_is_refused():
    """Catches FID 0 as a result: rows that differ in the last bit escape the search for equal rows.
    A small distance between different images passes.
    """
    x = 5 + features()
    with pytest.raises(ValueError, match="the Fréchet distance is 0"):
        frechet.score(x, np.nextafter(x, 9), PROMPTS)
    with pytest.raises(ValueError, match="the CMMD is 0"):
        cmmd.score(x, np.nextafter(x, 9), PROMPTS)
    assert frechet.score(x, x + 1e-4, PROMPTS)["value"] == pytest.approx(4e-8, rel=1e-3)


def test_too_few_images_for_a_covariance():
    """Catches a Fréchet distance of singular covariances, for either set, and a missing advice."""
    many, few = features(60, 20), features(20, 20, seed=1)
    with pytest.raises(ValueError, match="samples: 20 images .* more than 20, or use KID"):
        frechet.score(few, many, np.arange(20))
    with pytest.raises(ValueError, match="reference: 20 images"):
        frechet.score(many, few, np.arange(60))
    result = frechet.score(features(39, 20, seed=1), many, np.arange(39))
    assert len(result["warnings"]) == 1 and "at least 40" in result["warnings"][0]
    with pytest.raises(ValueError, match="20 features and the reference has 4"):
        frechet.score(many, Statistics.of(features()), np.arange(60))
