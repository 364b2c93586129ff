"""The evaluation of a suite: what is refused before anything is drawn, and what is written."""

import json
import types

import numpy as np
import pytest

from imagen_jax.evals import (
    data_suite,
    reference,
    suite_evaluation,
    suite_features,
    suite_references,
    suite_settings,
)
from imagen_jax.evals.networks import network
from imagen_jax.evals.reference import Reference
from imagen_jax.evals.row_shards import RowShards
from imagen_jax.evals.suite_settings import Settings
from imagen_jax.evals.suites import Prompt, Suite

RNG = np.random.default_rng(0)


def suite(categories=("a", "b"), per_category=4):
    prompts = [
        Prompt(i, f"{name} {i}", name, "")
        for i, name in enumerate(name for name in categories for _ in range(per_category))
    ]
    return Suite("toy", prompts, "", {"name": "toy"})


def settings(networks=("clip-b32",), per_prompt=2, **changes):
    fields = {
        "config": {},
        "stages": ["base"],
        "suite": suite(),
        "per_prompt": per_prompt,
        "seed": 0,
        "networks": dict.fromkeys(networks, ""),
        "metrics": [],
        "images": None,
    }
    return Settings(**fields | changes)


def test_scores_of_each_network_and_category():
    """Catches captions of other pictures, prompts that are counted per picture, and a metric
    without enough pictures that ends the evaluation.
    """
    n, texts = 16, RNG.standard_normal((8, 6)).astype(np.float32)
    texts = np.repeat(texts, 2, axis=0)
    found = {
        "clip-b32": texts + 0.01 * RNG.standard_normal((n, 6)).astype(np.float32),
        "clip-b32 text": texts,
        "inception": RNG.standard_normal((n, 6)).astype(np.float32),
        "retrieval": np.array([[1 + (i % 4) * 3, 50] for i in range(n)]),
    }
    other = RNG.standard_normal((30, 6)).astype(np.float32)
    references = {"inception": Reference(other, {})}
    result = suite_evaluation.score(
        settings(("clip-b32", "inception"), gallery=lambda size: None), found, references
    )
    assert set(result["metrics"]["clip-b32"]) == {"clip_score"}
    assert result["metrics"]["clip-b32"]["clip_score"]["mean"] > 99
    assert result["metrics"]["clip-b32"]["clip_score"]["prompts"] == 8
    assert {name: mean["n"] for name, mean in result["categories"].items()} == {"a": 4, "b": 4}
    assert set(result["metrics"]["inception"]) == {"fd", "kid", "mind", "neighbours"}
    assert result["retrieval"]["top1"]["rate"] == 0.25
    assert result["retrieval"] == data_suite.summary(found["retrieval"], per_prompt=2)
    assert result["retrieval"] != data_suite.summary(found["retrieval"])
    assert result["retrieval"]["top5"]["rate"] == 0.5 and result["retrieval"]["gallery"] == 50
    lines = dict(suite_evaluation.lines(result))
    assert "top-5 50.0 %" in lines["retrieval"] and "inception: FID" in lines
    json.dumps(result)


def test_seeds_of_all_pictures_are_checked_before_any_work():
    """Catches a seed beyond 2^32 that is found when its picture is drawn."""
    assert settings(seed=2**32 - 16).requests.seed(15) == 2**32 - 1
    with pytest.raises(ValueError, match="give a smaller --seed"):
        settings(seed=2**32 - 15)


def test_a_metric_without_its_network_is_refused():
    """Catches a metric that is left out in silence."""
    with pytest.raises(ValueError, match="--metrics clip_score needs one of the networks clip-b32"):
        suite_settings.check_networks(settings((), metrics=["clip_score"]))


def real_images(count, size=64):
    identity = {"kind": "folder", "path": "p", "count": count, "sha256": "s", "size": size}
    return lambda size: types.SimpleNamespace(identity=identity)


WIDE = {"inception": {"dim": 2048}, "efficientnet-lite0": {"dim": 8}}


def test_a_frechet_distance_that_cannot_be_computed_is_found_before_sampling(caplog):
    """Catches --metrics fd that is left out after a night of sampling, with too few pictures or too
    few real images, and no warning without --metrics.
    """
    few = settings(tuple(WIDE), images=real_images(3000))  # 16 pictures
    (warning,) = suite_references.check(few, WIDE, 64)
    assert (
        warning.startswith("inception: pictures: 16 images are too few") and warning in caplog.text
    )
    with pytest.raises(ValueError, match="--metrics: inception: pictures: 16 .* leave the metric"):
        suite_references.check(
            settings(tuple(WIDE), images=real_images(3000), metrics=["fd"]), WIDE, 64
        )
    with pytest.raises(ValueError, match="efficientnet-lite0: real images: 8 images are too few"):
        changed = dict(images=real_images(8), metrics=["fd"])
        suite_references.check(
            settings(("efficientnet-lite0",), **changed), {"efficientnet-lite0": {"dim": 8}}, 64
        )
    others = settings(tuple(WIDE), images=real_images(3000), metrics=["kid"])
    assert suite_references.check(others, WIDE, 64) == []


@pytest.mark.parametrize(("count", "expected"), [(40_504, 0), (40_500, 1)])
def test_another_reference_than_that_of_coco_is_a_warning(count, expected):
    """Catches an FID against part of COCO's validation set that reads like FID-30K."""
    coco = Suite("coco", suite().prompts, "", {})
    changed = settings(("efficientnet-lite0",), suite=coco, images=real_images(count))
    warnings = suite_references.check(changed, {"efficientnet-lite0": {"dim": 8}}, 64)
    assert len(warnings) == expected and all("40,504 of COCO's" in text for text in warnings)
    result = {"metrics": {}, "left_out": {}, "warnings": warnings}
    assert len(list(suite_evaluation.lines(result))) == expected
    toy = settings(("efficientnet-lite0",), images=real_images(count))
    assert suite_references.check(toy, {"efficientnet-lite0": {"dim": 8}}, 64) == []


def test_a_reference_of_another_size_is_refused(tmp_path):
    """Catches pictures of 64 pixels that are compared with real images of 256."""
    meta = {"network": {"network": "efficientnet-lite0"}, "images": {"count": 99, "size": 256}}
    np.savez(tmp_path / "r.npz", meta=np.array(json.dumps(meta)))
    kept = settings(("efficientnet-lite0",), references=[str(tmp_path / "r.npz")])
    identities = {"efficientnet-lite0": {"dim": 8}}
    assert suite_references.check(kept, identities, 256) == []
    with pytest.raises(ValueError, match=r"r\.npz is of images of 256 pixels, .* have 64: give"):
        suite_references.check(kept, identities, 64)
    assert reference.images_of(tmp_path / "r.npz") == meta["images"]


def test_the_result_names_the_weights_of_every_network(monkeypatch):
    """Catches a CLIP score without a record of its CLIP, and seeds by the number of the file."""
    tower = lambda kind: (
        lambda name, path: types.SimpleNamespace(
            identity={"network": name, "weights_sha256": f"{kind} of {path}"}
        )
    )
    monkeypatch.setattr(suite_settings.network, "load", tower("images"))
    monkeypatch.setattr(suite_settings.clip_text, "load", tower("captions"))
    given = settings(networks=("clip-b32", "inception"))
    identities = suite_settings.check_networks(given)
    record = dict.fromkeys(("stages", "config", "checkpoints", "encoder"))
    found = suite_evaluation.describe(given, record, {}, identities)
    assert found["networks"]["clip-b32"]["weights_sha256"] == "images of "
    assert found["networks"]["clip-b32"]["captions"]["weights_sha256"] == "captions of "
    assert "captions" not in found["networks"]["inception"]
    assert found["pictures"]["seeds"] == "0 + row of the manifest"


def test_shards_are_visible_before_they_are_joined(tmp_path, monkeypatch):
    """Catches shards of other processes that process 0 misses because they become visible late."""
    rows = [{"row": i, "prompt": "a", "sha256": ""} for i in range(5)]
    shards = RowShards(tmp_path, {}, rows, 1, 2)
    shards.compute(lambda part: np.array([[float(row["row"])] for row in part]), 0, 1, "x")
    awaited = []
    monkeypatch.setattr(suite_features.shared_files, "share_files", awaited.extend)
    assert suite_features.joined({"x": shards})["x"][:, 0].tolist() == list(range(5))
    assert awaited == shards.files(0, 1) == sorted(tmp_path.iterdir())
    assert shards.files(1, 2) == awaited[1:2]


@pytest.mark.parametrize("names", [["efficientnet-lite0"], ["clip-b32", "inception"]])
def test_a_network_without_any_metric_is_refused(names):
    """Catches pictures of a night for which nothing can be computed, as real images are missing."""
    given = settings(tuple(names))
    identities = {name: {"dim": 8} for name in names}
    with pytest.raises(ValueError, match=f"{names[-1]}: fd, kid.* need real images: give --data"):
        suite_references.check(given, identities, 64)


def test_a_clip_without_real_images_has_its_score_and_a_warning():
    """Catches CMMD that is left out in silence, and one that was asked for."""
    (warning,) = suite_references.check(settings(), {"clip-b32": {"dim": 8}}, 64)
    assert warning == "clip-b32: no real images are given, so it has only clip_score"
    with pytest.raises(ValueError, match="clip-b32: cmmd need real images"):
        suite_references.check(
            settings(metrics=["cmmd", "clip_score"]), {"clip-b32": {"dim": 8}}, 64
        )


def test_real_images_are_read_only_for_metrics_that_need_them(tmp_path):
    """Catches features of all real images for a CLIP score."""
    never = settings(metrics=["clip_score"], images=lambda size: pytest.fail("read"))
    assert suite_references.make(never, 64, tmp_path) == {}


def test_shards_of_features_are_batches_of_the_network(monkeypatch):
    """Catches shards that are padded in every batch, and a set that one process computes alone."""
    monkeypatch.setattr(suite_features.jax, "device_count", lambda: 8)
    monkeypatch.setattr(suite_features.jax, "process_count", lambda: 4)
    assert suite_features.network_shard([{}] * 1000) == 4 * (2 * network.BATCH_SIZE)
    assert suite_features.network_shard([{}] * 200) == 50


@pytest.mark.parametrize("name", ["evaluation.json", "pictures", "reference", "features"])
def test_a_blocked_output_is_found_before_anything_is_loaded(tmp_path, monkeypatch, name):
    """Catches a night of sampling that ends at a file in place of a directory."""
    if name == suite_evaluation.RESULT:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("")
    monkeypatch.setattr(suite_evaluation, "check_networks", lambda _: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=f"{name} is a .* of that name is to be written: remove"):
        suite_evaluation.evaluate(settings(), tmp_path)
