"""Completes the shards: TFDS metadata, skipped.jsonl and, last, the manifest."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagen_jax.data import records
from imagen_jax.data.prepare.selection import Selection
from imagen_jax.storage import write_atomically

Entries = Mapping[str, Mapping[str, Any]]  # the journal's entries by shard


def finish(
    result: Path, request: Mapping, selected: Selection, captions: Entries, images: Entries
) -> dict[str, Any]:
    """Writes the files next to the shards, the manifest last, and returns it."""
    shards = {
        name: {key: entry[key] for key in ("rows", "bytes", "sha256")}
        for name, entry in {**captions, **images}.items()
    }
    records.write_tfds_metadata(result, "images", records.image_features(), shards)
    features = records.caption_features(request["encoder"]["dim"])
    records.write_tfds_metadata(result, "captions", features, shards)
    cut = [caption_id for entry in captions.values() for caption_id in entry["cut"]]
    _write_skipped(result, selected, cut)
    manifest = {
        "format_version": records.FORMAT_VERSION,
        **request,
        "counts": _counts(selected, len(cut)),
        "embedding": _embedding_stats(captions),
        "image_sizes": _image_sizes(selected),
        "shards": shards,
    }
    manifest["hash"] = records.manifest_hash(manifest)
    write_atomically(result / records.MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _write_skipped(result: Path, selected: Selection, cut: list[int]) -> None:
    truncated = [
        {"id": f"caption {i}", "reason": "truncated_caption", "caption": selected.captions[i]}
        for i in cut
    ]
    lines = [json.dumps(line) + "\n" for line in selected.skipped + truncated]
    write_atomically(result / "skipped.jsonl", "".join(lines).encode())


def _counts(selected: Selection, truncated: int) -> dict[str, Any]:
    return {
        "images": {split: len(images) for split, images in selected.images.items()},
        "captions": len(selected.captions),
        "skipped": selected.reasons(),
        "truncated_captions": truncated,
    }


def _image_sizes(selected: Selection) -> dict[str, float]:
    sizes = [
        (image.checked.height, image.checked.width)
        for images in selected.images.values()
        for image in images
    ]
    return {
        "min_side": min(map(min, sizes)),
        "max_side": max(map(max, sizes)),
        "mean_height": sum(height for height, _ in sizes) / len(sizes),
        "mean_width": sum(width for _, width in sizes) / len(sizes),
    }


def _embedding_stats(captions: Entries) -> dict[str, Any]:
    """Statistics over the journal's entries of caption shards.

    Lengths in tokens are over captions, norms over tokens. All values are finite: shards with other
    features were rejected earlier.
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
    return stats | {"tokens": tokens, "finite": True}


def listed(reasons: Mapping[str, int]) -> str:
    """The reasons with their counts, for a message."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "nothing"
