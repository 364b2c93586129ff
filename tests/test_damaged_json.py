"""Every JSON file that the package reads back: damage is one line that names the file."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import saved
from imagen_jax import sample
from imagen_jax.data import manifest_file, records
from imagen_jax.data.prepare import ingest, request, shards
from imagen_jax.distributed import shared_files
from imagen_jax.evals import history, stage_evaluation
from imagen_jax.planning import cost_cache
from imagen_jax.weights import leaves, tensor_files, text_encoders
from launch import ablation, comparison
from tests import tiny

ENTRY = {"rows": 1, "bytes": 1, "sha256": "0" * 64}
SHARD = records.shard_name("captions", "train", 0, 1)
ARM = ablation.Arm("slow", {})


@dataclasses.dataclass(frozen=True)
class Reader:
    """A file below a directory, its content, a field that it needs, and its reader."""

    file: str
    content: Any
    needs: str
    read: Callable[[Path], Any]


def manifest() -> dict[str, Any]:
    made = {
        "format_version": 1,
        "counts": {"images": {}},
        "encoder": {"name": "fake", "dim": 8},
        "embedding": {"length": {"max": 6}},
        "image_sizes": {"min_side": 8},
        "shards": {},
    }
    return made | {"hash": manifest_file.manifest_hash(made)}


def prepared(needs: str) -> Reader:
    return Reader("manifest.json", manifest(), needs, records.Prepared)


def write_shard(directory: Path) -> Path:
    (directory / SHARD).parent.mkdir(parents=True)
    (directory / SHARD).write_bytes(b"x")
    return directory / "partial"


LEAF = {"format_version": 1, "step": 3, "meta": {}, "leaves": {"ema/w": [[2, 3], "bfloat16"]}}
T5 = dict.fromkeys(("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size"), 8)
READERS = {
    "manifest, version": prepared("format_version"),
    "manifest, hash": prepared("hash"),
    "manifest, width": prepared("encoder.dim"),
    "checkpoint, version": Reader(
        "meta.json", LEAF, "format_version", lambda d: leaves.read_document(d / "meta.json")
    ),
    "checkpoint, leaves": Reader(
        "meta.json", LEAF, "leaves", lambda d: leaves.read_document(d / "meta.json")
    ),
    "config": Reader(
        "config.json", tiny.config(), "", lambda d: saved.get_config(str(d / "config.json"))
    ),
    "config, steps": Reader(
        "config.json", {"train": {"steps": 4}}, "train.steps", stage_evaluation.last_step
    ),
    "picture": Reader(
        "0.json",
        {name: kind() for name, kind in sample.RECORD.items()},
        "checkpoints",
        lambda d: sample.read_record(d / "0.json"),
    ),
    "finished step": Reader(
        ablation.FINISHED, ["-m", "x"], "", lambda d: ablation.Task("x", ("python",), d).finished
    ),
    "evaluation of a step": Reader(
        "evaluation.json",
        {"provenance": {"sampling": {}}},
        "provenance.sampling",
        lambda d: ablation.restates(["a"], ["a"], d / "evaluation.json"),
    ),
    "evaluation of an arm": Reader(
        "slow/seed_0/evaluation/evaluation.json",
        {},
        "",
        lambda d: comparison.read_evaluations(d, [ARM], [0]),
    ),
    "request": Reader(
        "request.json",
        {"source": {}, "encoder": {}}
        | dict.fromkeys(("max_length", "shard_size", "min_size", "batch_size"), 1),
        "min_size",
        request.read_request,
    ),
    "checked images": Reader(
        "checked/000000000000-000000000001.json",
        [{}],
        "",
        lambda d: ingest.read_checked(d, ingest.Span(0, 1)),
    ),
    "journal": Reader(
        f"partial/journal/{Path(SHARD).name}.json",
        ENTRY | {"cut": [], "tokens": {}, "norm": {}},
        "bytes",
        lambda d: shards.finished(write_shard(d), shards.Shard(SHARD, "train", 0, 1)),
    ),
    "T5 config": Reader(
        "config.json",
        T5 | {"model_type": "t5", "feed_forward_proj": "gated-gelu"},
        "d_model",
        text_encoders._read_config,
    ),
    "index of shards": Reader(
        "x.index.json",
        {"weight_map": {}},
        "weight_map",
        lambda d: tensor_files.shard_names(d / "x.index.json", bool),
    ),
}


def without(content: dict[str, Any], name: str, value: Any = None) -> dict[str, Any]:
    """`content` without the field at a dotted name, or with `value` in its place."""
    first, _, rest = name.partition(".")
    others = {key: entry for key, entry in content.items() if key != first}
    if rest:
        return others | {first: without(content[first], rest, value)}
    return others if value is None else others | {first: value}


DAMAGE = {
    "not JSON": lambda reader: "epoch 3",
    "cut short": lambda reader: json.dumps(reader.content)[:-1],
    "another kind": lambda reader: "[1]" if isinstance(reader.content, dict) else '{"a": 1}',
    "missing": lambda reader: json.dumps(without(reader.content, reader.needs)),
    "of another type": lambda reader: json.dumps(without(reader.content, reader.needs, [0])),
}
CASES = [
    (name, damage)
    for name, reader in READERS.items()
    for damage in DAMAGE
    if reader.needs or damage not in ("missing", "of another type")
    if (name, damage) != ("picture", "of another type")  # a list is right there
]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damaged_file_is_named_in_one_line(tmp_path, name, damage):
    """Catches KeyError, TypeError and json's own error, none of which names a file."""
    reader = READERS[name]
    file = tmp_path / reader.file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(DAMAGE[damage](reader))
    with pytest.raises(ValueError) as caught:
        reader.read(tmp_path)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not isinstance(caught.value, json.JSONDecodeError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([0], "leaf ema/w is \\[0\\]"),
        ([[2, "3"], "bfloat16"], "leaf ema/w"),
        ([[-2, 3], "bfloat16"], "leaf ema/w"),
        ([[2, 3], "bfloat17"], "leaf ema/w"),
    ],
)
def test_damaged_leaf_is_named(tmp_path, content, message):
    """Catches a shape or dtype that only numpy or orbax rejects."""
    file = tmp_path / "meta.json"
    file.write_text(json.dumps(LEAF | {"leaves": {"ema/w": content}}))
    with pytest.raises(leaves.CheckpointError, match=message):
        leaves.read_document(file)


def test_section_of_another_kind_is_no_config(tmp_path):
    """Catches a TypeError from merging a list with the fields that older records lack."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny.config() | {"sampling": [1]}))
    with pytest.raises(ValueError, match=r"config.json is not a config; give the config.json"):
        saved.get_config(str(file))


@pytest.mark.parametrize("record", ["step 1", '{"step": 1', "[1]", '{"steps": 1}', '{"step": "1"}'])
def test_damaged_line_of_evaluations_is_named(tmp_path, record):
    """Catches an error without the number of the line, in both readers of evaluations.jsonl."""
    file = tmp_path / history.FILE
    file.write_text('{"step": 1}\n' + record + "\n")
    evaluator = object.__new__(stage_evaluation.Evaluator)
    for read in (history.steps, evaluator.check_continues):
        with pytest.raises(ValueError, match=r"evaluations.jsonl, line 2, .* remove the line"):
            read(file)


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"run": "other", "start": 3, "flops": "x"}'])
def test_messages_and_caches_that_cannot_be_read_are_ignored(tmp_path, text, monkeypatch):
    """Catches a run that ends because another process wrote half a message, or a stale cache."""
    (tmp_path / "hosts.json").write_text(text)
    assert shared_files._start(tmp_path / "hosts.json") == ""
    monkeypatch.setattr(cost_cache.importlib.metadata, "version", lambda name: "1.0")
    compute = lambda: {"flops": 2.0}
    made = cost_cache.cached(str(tmp_path / "costs"), "key", {"flops": float}, compute)
    (file,) = (tmp_path / "costs").iterdir()
    file.write_text(text)
    assert cost_cache.cached(str(tmp_path / "costs"), "key", {"flops": float}, compute) == made
