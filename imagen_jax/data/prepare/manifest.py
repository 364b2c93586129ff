"""Completes the shards: TFDS metadata, skipped.jsonl and, last, the manifest."""

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.data import first_records, image_sizes, manifest_file, records
from imagen_jax.data.caption_records import caption_features
from imagen_jax.data.prepare.kept import Plan
from imagen_jax.data.prepare.shards import FIRST
from imagen_jax.data.quantization import relative_errors
from imagen_jax.many_files import each
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import copy_directory, write_atomically, write_lines, written_whole
from imagen_jax.text_inputs import UNNAMED

Entries = Mapping[str, Mapping[str, Any]]  # the journal's entries by shard


def finish(
    result: AnyPath,
    request: Mapping,
    plan: Plan,
    texts: Entries,
    features: Mapping[str, Entries],
    images: Entries,
    cut: Mapping[str, Iterable[Sequence[int]]],
) -> dict[str, Any]:
    """Writes the files next to the shards, the manifest last, and returns it.

    texts: of shards with texts alone; none with a single unnamed encoder.
    features: of the shards of each encoder.
    cut: for each encoder, the ids of the truncated captions of each shard.
    """
    entries = {**texts, **{name: row for rows in features.values() for name, row in rows.items()}}
    entries |= images
    shards = {
        name: {key: entry[key] for key in ("rows", "bytes", "sha256")}
        for name, entry in entries.items()
    }
    embedding = request.get("embedding_dtype", records.EMBEDDINGS[0])
    _write_tfds_metadata(result, "images", records.image_features(), shards)
    for store, tfds_features in _caption_stores(request, embedding):
        _write_tfds_metadata(result, store, tfds_features, shards)
    for split in (split for split, count in plan.images.items() if count):
        with written_whole(image_sizes.file_of(result, split)) as file:
            image_sizes.write_file(file, plan.images[split], plan.image_sizes(split))
    _write_skipped(result, plan, cut)
    truncated = {name: sum(row["cut"] for row in rows.values()) for name, rows in features.items()}
    stats = {name: _embedding_stats(rows) for name, rows in features.items()}
    is_named = "encoders" in request
    manifest = {
        "format_version": _format_version(is_named, embedding),
        **request,
        "counts": _counts(plan, truncated if is_named else truncated[UNNAMED]),
        "embedding": stats if is_named else stats[UNNAMED],
        "image_sizes": plan.sizes,
        "shards": shards,
    }
    manifest["hash"] = manifest_file.manifest_hash(manifest)
    firsts = {name: entry[FIRST] for name, entry in entries.items() if FIRST in entry}
    first_records.write(result, manifest["hash"], firsts)
    write_atomically(result / manifest_file.MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _write_tfds_metadata(result: AnyPath, store: str, features: Any, shards: Mapping) -> None:
    """`records.write_tfds_metadata`; in a bucket, on a local disk first.

    TFDS looks for the names of the shards, so empty files have them there.
    """
    if not in_bucket(result):
        return records.write_tfds_metadata(result, store, features, shards)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / store).mkdir()
        names = [name for name in shards if name.startswith(f"{store}/")]
        for name in names:
            (root / name).touch()
        records.write_tfds_metadata(root, store, features, shards)
        for name in names:
            (root / name).unlink()
        copy_directory(root / store, result / store)


def _format_version(is_named: bool, embedding: str) -> int:
    if is_named:
        return manifest_file.NAMED_FORMAT_VERSION
    if embedding == "int8":
        return manifest_file.INT8_FORMAT_VERSION
    return manifest_file.FORMAT_VERSION


def _caption_stores(request: Mapping, embedding: str) -> Iterator[tuple[str, Any]]:
    """(store, its TFDS features) of all stores of captions."""
    texts = records.caption_store(UNNAMED)
    if "encoder" in request:
        yield texts, caption_features(request["encoder"]["dim"], embedding)
        return
    yield texts, caption_features(0)
    for name, identity in request["encoders"].items():
        pooled_dim = identity.get("pooled_dim", 0)
        features = caption_features(identity["dim"], embedding, False, pooled_dim)
        yield records.caption_store(name), features


def _write_skipped(result: AnyPath, plan: Plan, cut: Mapping[str, Iterable[Sequence[int]]]) -> None:
    lines = (_truncated(plan, name, ids) for name, ids in cut.items())
    write_lines(result / "skipped.jsonl", itertools.chain(plan.skipped(), *lines))


def _truncated(plan: Plan, name: str, cut: Iterable[Sequence[int]]) -> Iterator[str]:
    """A line for each caption that an encoder truncates."""

    def lines(numbered: tuple[int, Sequence[int]]) -> list[str]:
        shard, numbers = numbered
        texts = plan.captions_of(shard) if numbers else []
        captions = ((number, texts[number - shard * plan.shard_size]) for number in numbers)
        return [_truncated_line(number, caption, name) for number, caption in captions]

    return itertools.chain.from_iterable(each(lines, enumerate(cut), plan.directory))


def _truncated_line(number: int, caption: str, encoder: str) -> str:
    line = {"id": f"caption {number}", "reason": "truncated_caption", "caption": caption}
    return json.dumps(line | ({"encoder": encoder} if encoder else {})) + "\n"


def _counts(plan: Plan, truncated: int | Mapping[str, int]) -> dict[str, Any]:
    return {
        "images": plan.images,
        "captions": plan.captions,
        "skipped": plan.reasons,
        "truncated_captions": truncated,
    }


def _embedding_stats(captions: Entries) -> dict[str, Any]:
    """Statistics over the journal's entries of caption shards.

    Lengths in tokens are over captions, norms over tokens as they were encoded. All values are
    finite: shards with other features were rejected earlier.
    """
    rows = sum(entry["rows"] for entry in captions.values())
    tokens = sum(entry["tokens"]["sum"] for entry in captions.values())
    stats = {}
    for name, key, count in (("length", "tokens", rows), ("norm", "norm", tokens)):
        parts = [entry[key] for entry in captions.values()]
        mean = sum(part["sum"] for part in parts) / count
        stats[name] = {
            "min": min(part["min"] for part in parts),
            "mean": mean,
            "max": max(part["max"] for part in parts),
        }
    errors = [entry["error"] for entry in captions.values() if "error" in entry]
    if errors:
        stats["quantization_error"] = relative_errors(errors)
    return stats | {"tokens": tokens, "finite": True}


def listed(reasons: Mapping[str, int]) -> str:
    """The reasons with their counts, for a message."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "nothing"
