"""The list of metrics: which apply, what is left out with a reason, what is printed."""

import numpy as np
import pytest

from imagen_jax.evals import image_metrics
from imagen_jax.evals.image_metrics import METRICS, applicable, score_all
from imagen_jax.evals.networks.network import NETWORKS

RNG = np.random.default_rng(0)


def test_every_network_has_a_metric_and_every_metric_a_known_network():
    """Catches a network that nothing uses, and a name that no network has."""
    assert set(NETWORKS) == {name for metric in METRICS.values() for name in metric.networks}


def test_the_metrics_of_a_network():
    """Catches a CLIP score without CLIP, and a distance without real images."""
    assert list(applicable("inception", [], True)) == ["fd", "kid", "mind", "neighbours"]
    assert list(applicable("clip-l14", [], True)) == ["cmmd", "clip_score"]
    assert list(applicable("clip-l14", [], False)) == ["clip_score"]
    assert list(applicable("inception", ["kid", "cmmd"], True)) == ["kid"]
    assert not applicable("inception", [], False)
    with pytest.raises(ValueError, match="--metrics fid is unknown; use fd, kid"):
        image_metrics.check_known(["fid"])


def features(n, shift=0.0, d=8):
    return (RNG.standard_normal((n, d)) + shift).astype(np.float32)


def test_few_prompts_have_few_blocks_and_few_images_no_frechet_distance():
    """Catches small sets without any result, and a singular covariance that is reported."""
    prompts = np.repeat(np.arange(3), 2)
    others = {"reference": features(40)}
    results, left_out = score_all(
        applicable("inception", [], True), features(6, shift=3.0), others, prompts
    )
    assert set(results) == {"kid", "mind"} and set(left_out) == {"fd", "neighbours"}
    assert len(results["kid"]["deleted"]) == 3 and results["kid"]["se"] > 0
    assert "6 images are too few" in left_out["fd"]


def test_printed_values_are_those_of_the_result():
    """Catches a KID without its factor, and a line without its error."""
    prompts = np.arange(60)
    others = {"reference": features(80)}
    samples = features(60, shift=1.0)
    results, left_out = score_all(applicable("inception", [], True), samples, others, prompts)
    assert not left_out
    lines = dict(image_metrics.lines("inception", results))
    kid = results["kid"]
    shown = f"{1000 * kid['value']:.4g} +- {1000 * kid['se']:.4g}"
    assert lines["inception: KID x 1000"] == shown
    text = lines["inception: FID"]
    assert text.startswith(f"{results['fd']['value']:.4g} +- ") and "infinitely many" in text
    assert lines["inception: precision"].startswith(
        f"{results['neighbours']['precision']['value']:.4g}"
    )


def test_clip_score_is_a_mean_over_prompts():
    """Catches captions that are not those of the pictures."""
    texts = features(10)
    others = {"captions": texts}
    metrics = applicable("clip-b32", ["clip_score"], False)
    results, _ = score_all(metrics, texts + 0.01 * features(10), others, np.arange(10))
    assert results["clip_score"]["mean"] > 99
    (line,) = image_metrics.lines("clip-b32", results)
    assert line[0] == "clip-b32: CLIP score" and line[1].startswith("99.9")
