"""Encodes the captions of the plan with the text encoders, one after another, shard by shard.

The processes of a run divide the shards. Each encodes its own with all of its devices, so no device
waits for another process. A mesh over all processes would not be faster: T5-XXL in bfloat16 (8.9
GiB) fits on one chip, see text/program.py, and without sharded weights there is nothing to
communicate. The bytes of a shard do not depend on the number of processes or devices
(`TextEncoder.encode`).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16

from imagen_jax.data import quantization, records
from imagen_jax.data.caption_records import (
    CaptionRow,
    serialize_caption,
    serialize_features,
)
from imagen_jax.data.prepare.ingest import show
from imagen_jax.data.prepare.kept import Plan
from imagen_jax.data.prepare.settings import Settings
from imagen_jax.data.prepare.shards import Shard, finished, journal, shards_of, unfinished, write
from imagen_jax.data.sources.source import Source
from imagen_jax.data.workers import Workers
from imagen_jax.distributed import agreement
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.object_storage import AnyPath
from imagen_jax.text_inputs import UNNAMED, TextFeatures

# Caption shards that are written at once; one core writes about 800 captions per second at XXL's
# width. All of them, and the one that is encoded, are in memory.
_WRITERS = 6
_WRITER_BYTES = 2**34  # of features in shards that are written, if all captions had max_length


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Captions with the features of one text encoder.

    features: of each caption. pooled: vectors of all captions, e = 0 if the encoder has none.
    cut: the ids of truncated captions.
    """

    texts: list[str]
    features: list[BFloat16[np.ndarray, "_ d"]]
    pooled: BFloat16[np.ndarray, "n e"]
    cut: list[int]


def text_shards(plan: Plan) -> list[Shard]:
    """The shards of a plan that hold only texts."""
    return shards_of(records.caption_store(UNNAMED), "train", plan.captions, plan.shard_size)


def feature_shards(plan: Plan, name: str) -> list[Shard]:
    """The shards of a plan with the features of an encoder; with the texts if it has no name."""
    shards = shards_of(records.caption_store(name), "train", plan.captions, plan.shard_size)
    return [dataclasses.replace(shard, has_features=True) for shard in shards]


def encode_all(
    workers: Workers, encoders: Encoders, partial: AnyPath, plan: Plan, settings: Settings
) -> None:
    """This process's share of all caption shards.

    settings: batch_size, embedding, processes.
    """
    if encoders.is_named:
        mine, todo = _share(partial, text_shards(plan))
        tasks = ((partial, shard) for shard in todo)
        _show("write texts", mine, todo, workers.each(write_texts, tasks, 2 * settings.processes))
    for name in encoders.in_turn():
        _encode(workers, encoders, name, partial, plan, settings)


def _share(partial: AnyPath, shards: Sequence[Shard]) -> tuple[list[Shard], list[Shard]]:
    """(this process's share of the shards, those of them that are not finished)."""
    mine = agreement.own_share(shards)
    return mine, unfinished(partial, mine)


def _show(label: str, mine: Sequence[Shard], todo: Sequence[Shard], done: Iterable[int]) -> None:
    total, left = (sum(shard.rows for shard in part) for part in (mine, todo))
    show(label, total, left, done)


def _encode(
    workers: Workers,
    encoders: Encoders,
    name: str,
    partial: AnyPath,
    plan: Plan,
    settings: Settings,
) -> None:
    """This process's share of one encoder's shards: encoded here, written by the workers."""
    mine, todo = _share(partial, feature_shards(plan, name))
    encoder = encoders.load(name) if todo else None
    tasks = _encoded(name, encoder, partial, plan, todo, settings)
    identity = encoders.identities[name]
    shard_bytes = plan.shard_size * identity["max_length"] * identity["dim"] * 2
    writers = max(1, min(settings.processes, _WRITERS, _WRITER_BYTES // shard_bytes))
    label = f"encode captions with {name}" if name else "encode captions"
    _show(label, mine, todo, workers.each(write_captions, tasks, writers))


def _encoded(
    name: str, encoder, partial: AnyPath, plan: Plan, shards: list[Shard], settings: Settings
) -> Iterator[tuple]:
    """Encodes shard by shard; yields the tasks of writing them."""
    for shard in shards:
        first_id, texts = shard.number * plan.shard_size, plan.captions_of(shard.number)
        encoded = encode(encoder, texts, settings.batch_size, name != UNNAMED, first_id)
        yield partial, shard.name, encoded, settings.embedding


def encode(
    encoder, texts: list[str], batch_size: int, with_pooled: bool, first_id: int = 0
) -> Encoded:
    """Encodes captions with consecutive ids.

    with_pooled: whether to keep the pooled vectors, if the encoder has them.
    """
    _, cut = encoder.tokenize(texts)
    if with_pooled and encoder.pooled_dim:
        features, pooled = encoder.encode_pooled(texts, batch_size)
    else:
        features = encoder.encode(texts, batch_size)
        pooled = np.empty((len(texts), 0), ml_dtypes.bfloat16)
    cut_ids = [first_id + i for i, was_cut in enumerate(cut) if was_cut]
    return Encoded(texts, features, pooled, cut_ids)


def write_texts(_: Source, partial: AnyPath, shard: Shard) -> int:
    """Writes a shard of texts; returns the number of its captions."""
    texts = Plan(partial / "plan").captions_of(shard.number)
    rows = (serialize_caption(CaptionRow(text)) for text in texts)
    journal(partial, shard.name, write(partial, shard.name, rows))
    return len(texts)


def write_captions(_: Source, partial: AnyPath, name: str, encoded: Encoded, embedding: str) -> int:
    """Writes a shard with features; returns the number of its captions.

    The shard also has the texts if it is one of an unnamed encoder.

    embedding: dtype of the stored features. Raises ValueError if a feature is not finite.
    """
    features = encoded.features
    norms = np.concatenate(
        [np.linalg.norm(feature.astype(np.float64), axis=1) for feature in features]
    )
    if not (np.isfinite(norms).all() and np.isfinite(encoded.pooled.astype(np.float32)).all()):
        _refuse(encoded)
    entry = write(partial, name, _records(name, encoded, embedding))
    lengths = [len(feature) for feature in features]
    entry["cut"] = encoded.cut
    entry["tokens"] = {"min": min(lengths), "max": max(lengths), "sum": sum(lengths)}
    entry["norm"] = {"min": norms.min(), "max": norms.max(), "sum": norms.sum()}
    if embedding == "int8":
        entry["error"] = quantization.error_sums(features)
    journal(partial, name, entry)
    return len(encoded.texts)


def _refuse(encoded: Encoded) -> None:
    """Raises ValueError with the first caption whose features are not finite."""
    rows = zip(encoded.texts, encoded.features, encoded.pooled, strict=True)
    for text, *arrays in rows:
        if not all(np.isfinite(array.astype(np.float32)).all() for array in arrays):
            raise ValueError(
                f"the text encoder returns features that are not finite for the caption {text!r}"
            )


def _records(name: str, encoded: Encoded, embedding: str) -> Iterator[bytes]:
    """The records of a shard."""
    has_texts = name.startswith(f"{records.caption_store(UNNAMED)}/")
    for text, features, pooled in zip(encoded.texts, encoded.features, encoded.pooled, strict=True):
        if has_texts:
            yield serialize_caption(CaptionRow(text, features), embedding)
        else:
            vector = pooled if len(pooled) else None
            yield serialize_features(TextFeatures(features, vector), embedding)


def cut_captions(partial: AnyPath, shard: Shard) -> list[int]:
    """The ids of the truncated captions of a shard."""
    return finished(partial, shard)["cut"]
