"""Statistics of features, accumulated, merged and subtracted, against numpy."""

import numpy as np
import pytest

from imagen_jax.evals.distances import moments
from imagen_jax.evals.distances.moments import Statistics


def rows(n=50, d=4, offset=1e6, seed=0):
    """Features with a mean that is large against their spread."""
    rng = np.random.default_rng(seed)
    return offset + rng.standard_normal((n, d)) @ rng.standard_normal((d, d))


@pytest.mark.parametrize("chunk", [1, 7, 50, 100])
def test_chunks_give_the_covariance_of_numpy(monkeypatch, chunk):
    """Catches a division by n, a lost last chunk, and raw sums: at a mean of 1e6, E[x^2] - E[x]^2
    in float64 has errors of 1e-3.
    """
    monkeypatch.setattr(moments, "CHUNK", chunk)
    x = rows()
    found = Statistics.of(x)
    assert found.n == 50
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False), rtol=1e-8)


def test_removing_undoes_merging():
    """Catches a wrong sign or weight of the difference of the means in `without`."""
    x = rows(offset=3.0)
    kept, removed = x[:38], 5 + x[38:]
    merged = Statistics.of(kept).merge(Statistics.of(removed))
    rest = merged.without(Statistics.of(removed))
    both = np.concatenate([kept, removed])
    np.testing.assert_allclose(merged.cov, np.cov(both, rowvar=False), rtol=1e-12)
    assert rest.n == 38
    np.testing.assert_allclose(rest.mean, kept.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(rest.cov, np.cov(kept, rowvar=False), rtol=1e-11)


def test_half_precision_is_summed_in_float64():
    """Catches sums in the features' own type: 4,096 ones in float16 stop at 2,048."""
    x = np.ones((4096, 1), np.float16)
    assert Statistics.of(x).mean.tolist() == [1.0]


def test_statistics_of_a_file_are_those_of_its_images():
    """Catches a covariance taken for a scatter matrix."""
    x = rows(offset=0.0)
    from_file = Statistics.from_covariance(50, x.mean(axis=0), np.cov(x, rowvar=False))
    merged = from_file.merge(Statistics.of(1 + x))
    np.testing.assert_allclose(
        merged.cov, np.cov(np.concatenate([x, 1 + x]), rowvar=False), rtol=1e-12
    )


def test_too_few_images_are_refused():
    """Catches a division by 0, and statistics of no images."""
    one = Statistics.of(np.ones((1, 2)))
    with pytest.raises(ValueError, match="1 images have no covariance"):
        _ = one.cov
    with pytest.raises(ValueError, match="some must remain"):
        one.without(one)
