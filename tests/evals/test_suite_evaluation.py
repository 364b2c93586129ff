"""The evaluation of a suite: what is refused before anything is drawn, and what is written."""

import collections
import json
import types

import numpy as np
import pytest

from imagen_jax.evals import data_suite, suite_evaluation
from imagen_jax.evals.networks import network
from imagen_jax.evals.reference import Reference
from imagen_jax.evals.row_shards import RowShards
from imagen_jax.evals.suite_evaluation import Settings
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


def test_a_set_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    """Catches a disk that is full after a night of sampling, and sets that are not added up."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(
        suite_evaluation.shutil, "disk_usage", lambda _: usage(0, 0, 3 * 64**2 * 10)
    )
    suite_evaluation.check_disk(tmp_path, [(6, 64), (16, 32)])
    with pytest.raises(ValueError, match=r"23 pictures need up to .* GiB, .* give another"):
        suite_evaluation.check_disk(tmp_path, [(7, 64), (16, 32)])


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
        suite_evaluation.check_networks(settings((), metrics=["clip_score"]))


def test_shards_are_visible_before_they_are_joined(tmp_path, monkeypatch):
    """Catches shards of other processes that process 0 misses because they become visible late."""
    rows = [{"row": i, "prompt": "a", "sha256": ""} for i in range(5)]
    shards = RowShards(tmp_path, {}, rows, 1, 2)
    shards.compute(lambda part: np.array([[float(row["row"])] for row in part]), 0, 1, "x")
    awaited = []
    monkeypatch.setattr(suite_evaluation.agreement, "share_files", awaited.extend)
    assert suite_evaluation._joined({"x": shards})["x"][:, 0].tolist() == list(range(5))
    assert awaited == shards.files(0, 1) == sorted(tmp_path.iterdir())
    assert shards.files(1, 2) == awaited[1:2]


def test_a_reference_is_visible_before_it_is_read(tmp_path, monkeypatch):
    """Catches processes that read the reference of process 0 before they can see it."""
    awaited, made, path = [], object(), tmp_path / "r.npz"
    monkeypatch.setattr(suite_evaluation.agreement, "share_files", awaited.append)
    monkeypatch.setattr(suite_evaluation.reference, "load", lambda *_: made)
    images = types.SimpleNamespace(identity={})
    # the checker of types knows no such images
    checked = suite_evaluation._kept_reference
    kept = getattr(checked, "__wrapped__", checked)
    assert kept(images, None, path) is made
    monkeypatch.setattr(suite_evaluation.jax, "process_index", lambda: 1)
    assert kept(images, None, path) is made
    assert awaited == [[path], []]


def test_shards_of_features_are_batches_of_the_network(monkeypatch):
    """Catches shards that are padded in every batch, and a set that one process computes alone."""
    monkeypatch.setattr(suite_evaluation.jax, "device_count", lambda: 8)
    monkeypatch.setattr(suite_evaluation.jax, "process_count", lambda: 4)
    assert suite_evaluation._network_shard([{}] * 1000) == 4 * (2 * network.BATCH_SIZE)
    assert suite_evaluation._network_shard([{}] * 200) == 50
