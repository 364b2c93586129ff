"""Encodes the captions of the plan with the text encoder, shard by shard.

The processes of a run divide the shards. Each encodes its own with all of its devices, so no device
waits for another process. A mesh over all processes would not be faster: T5-XXL in bfloat16 (8.9
GiB) fits on one chip, see text/program.py, and without sharded weights there is nothing to
communicate. The bytes of a shard do not depend on the number of processes or devices
(`TextEncoder.encode`).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import BFloat16

from imagen_jax.data import quantization, records
from imagen_jax.data.prepare.ingest import show
from imagen_jax.data.prepare.kept import Plan
from imagen_jax.data.prepare.settings import Settings
from imagen_jax.data.prepare.shards import Shard, finished, journal, shards_of
from imagen_jax.data.sources.source import Source
from imagen_jax.data.workers import Workers
from imagen_jax.distributed import agreement

# Caption shards that are written at once; one core writes about 800 captions per second at XXL's
# width. All of them, and the one that is encoded, are in memory.
_WRITERS = 6
_WRITER_BYTES = 2**34  # of features in shards that are written, if all captions had max_length


def caption_shards(plan: Plan) -> list[Shard]:
    """All caption shards of a plan."""
    return shards_of("captions", "train", plan.captions, plan.shard_size)


def encode_all(workers: Workers, encoder, partial: Path, plan: Plan, settings: Settings) -> None:
    """This process's share of the caption shards: encoded here, written by the workers.

    settings: batch_size, embedding, processes.
    """
    mine = agreement.own_share(caption_shards(plan))
    todo = [shard for shard in mine if not finished(partial, shard)]
    total, left = (sum(shard.rows for shard in part) for part in (mine, todo))
    tasks = _encoded(encoder, partial, plan, todo, settings)
    shard_bytes = plan.shard_size * encoder.max_length * encoder.dim * 2
    writers = max(1, min(settings.processes, _WRITERS, _WRITER_BYTES // shard_bytes))
    show("encode captions", total, left, workers.each(write_captions, tasks, writers))


def _encoded(
    encoder, partial: Path, plan: Plan, shards: list[Shard], settings: Settings
) -> Iterator[tuple]:
    """Encodes shard by shard; yields the tasks of writing them."""
    for shard in shards:
        first_id, texts = shard.number * plan.shard_size, plan.captions_of(shard.number)
        _, cut = encoder.tokenize(texts)
        cut_ids = [first_id + i for i, was_cut in enumerate(cut) if was_cut]
        features = encoder.encode(texts, settings.batch_size)
        yield partial, shard.name, texts, features, cut_ids, settings.embedding


def write_captions(
    _: Source,
    partial: Path,
    name: str,
    texts: list[str],
    features: list[BFloat16[np.ndarray, "_ d"]],
    cut: list[int],
    embedding: str,
) -> int:
    """Writes a caption shard; returns the number of its captions.

    embedding: dtype of the stored features. Raises ValueError if a feature is not finite.
    """
    norms = np.concatenate(
        [np.linalg.norm(feature.astype(np.float64), axis=1) for feature in features]
    )
    if not np.isfinite(norms).all():
        bad = next(
            text
            for text, feature in zip(texts, features, strict=True)
            if not np.isfinite(feature.astype(np.float32)).all()
        )
        raise ValueError(
            f"the text encoder returns features that are not finite for the caption {bad!r}"
        )
    rows = (
        records.serialize_caption(records.CaptionRow(text, feature), embedding)
        for text, feature in zip(texts, features, strict=True)
    )
    entry = records.write_shard(partial / "result", name, rows)
    lengths = [len(feature) for feature in features]
    entry["cut"] = cut
    entry["tokens"] = {"min": min(lengths), "max": max(lengths), "sum": sum(lengths)}
    entry["norm"] = {"min": norms.min(), "max": norms.max(), "sum": norms.sum()}
    if embedding == "int8":
        entry["error"] = quantization.error_sums(features)
    journal(partial, name, entry)
    return len(texts)


def cut_captions(partial: Path, shard: Shard) -> list[int]:
    """The ids of the truncated captions of a shard."""
    return finished(partial, shard)["cut"]
