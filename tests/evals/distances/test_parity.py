"""Distances against torch-fidelity on the same features."""

import numpy as np
import pytest

from imagen_jax.evals.distances import frechet, kernels, kid, neighbours
from imagen_jax.evals.distances.kernels import KernelSums
from imagen_jax.evals.distances.moments import Statistics
from tests.torch_fidelity_stub import import_torch_fidelity

pytestmark = pytest.mark.parity


def features(n, d, seed, shift=0.0):
    """Positive, skewed and correlated features, as those after a ReLU and pooling."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, d)) @ np.random.default_rng(0).standard_normal((d, d))
    return np.maximum(mixed / np.sqrt(d) + shift, 0) * np.linspace(0.2, 2, d)


def pair(d=48, n=400, m=300):
    return features(n, d, 1, 0.5), features(m, d, 2, 0.4)


def tensors(*arrays):
    torch = pytest.importorskip("torch")
    return [torch.from_numpy(a) for a in arrays]


@pytest.mark.parametrize("d, n, m", [(48, 400, 300), (200, 350, 900), (2, 30, 20)])
def test_frechet_distance(d, n, m):
    """Catches another covariance or trace of the root than that of torch-fidelity."""
    fid = import_torch_fidelity("metric_fid")
    x, y = pair(d, n, m)
    statistics = [fid.fid_features_to_statistics(t) for t in tensors(x, y)]
    wanted = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    found = frechet.distance(Statistics.of(x), Statistics.of(y))
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("size, count", [(300, 1), (100, 7)])
def test_kid_of_the_same_subsets(size, count):
    """Catches another kernel, estimator or spread, and other subsets for one seed."""
    metric = import_torch_fidelity("metric_kid")
    x, y = pair()
    wanted = metric.kid_features_to_metric(
        *tensors(x, y), kid_subsets=count, kid_subset_size=size, rng_seed=5, verbose=False
    )
    found = kid.subsets(x, y, count=count, size=size, seed=5)
    assert found["mean"] == pytest.approx(wanted[metric.KEY_METRIC_KID_MEAN], rel=1e-9)
    assert found["spread"] == pytest.approx(wanted[metric.KEY_METRIC_KID_STD], rel=1e-9, abs=1e-12)


def test_gaussian_kernel():
    """Catches another meaning of sigma: the kernel of CMMD is the RBF kernel of torch-fidelity."""
    metric = import_torch_fidelity("metric_kid")
    x, y = pair(n=300)
    kwargs = dict(kid_kernel="rbf", kid_kernel_rbf_sigma=3.0, verbose=False)
    wanted = metric.kid_features_to_metric(
        *tensors(x, y), kid_subsets=1, kid_subset_size=300, **kwargs
    )[metric.KEY_METRIC_KID_MEAN]
    sums = KernelSums.of(x, y, kernels.gaussian(3.0), np.zeros(300, int))
    assert sums.mmd(unbiased=True) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_precision_and_recall(k):
    """Catches the two swapped, another k-th neighbour, and the open ball."""
    metric = import_torch_fidelity("metric_prc")
    x, y = pair(d=8)
    # Its first argument is the samples in 0.4.0, and the reference in versions before.
    wanted = metric.prc_features_to_metric(
        *tensors(x, y), prc_neighborhood=k, save_cpu_ram=False, verbose=False
    )
    found = neighbours.replicates(x, y, np.arange(len(x)) % 2, k=k)
    for name in ("precision", "recall"):
        assert 0.3 < wanted[name] < 1
        assert found[name].value == pytest.approx(wanted[name], rel=1e-6)
