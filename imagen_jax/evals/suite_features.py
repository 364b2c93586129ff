"""Features of the pictures, captions and real images of an evaluation, computed by all processes.

They are files of consecutive rows. Complete files are kept, so an interrupted evaluation continues.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from imagen_jax import picture_set
from imagen_jax.distributed import shared_files
from imagen_jax.evals import data_suite, image_metrics
from imagen_jax.evals.networks import clip_text, network
from imagen_jax.evals.networks.network import FeatureNetwork
from imagen_jax.evals.row_shards import Compute, Row, RowShards, rows_per_shard
from imagen_jax.evals.suite_settings import Settings
from imagen_jax.object_storage import AnyPath


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A feature network, with the text tower of its CLIP if a metric needs captions."""

    images: FeatureNetwork
    captions: clip_text.CaptionNetwork | None


def load_networks(settings: Settings) -> dict[str, Loaded]:
    """{name: network} of the networks that a metric needs."""
    found = {}
    for name, path in settings.networks.items():
        wanted = image_metrics.applicable(name, settings.metrics, True).values()
        captions = any(metric.against == "captions" for metric in wanted)
        if wanted:
            tower = clip_text.load(name, path) if captions else None
            found[name] = Loaded(network.load(name, path), tower)
    return found


def caption_features(
    settings: Settings, networks: Mapping[str, Loaded], rows: Sequence[Row], directory: AnyPath
) -> dict[str, Float[np.ndarray, "n _"]]:
    """{"NETWORK text": CLIP's features of the prompt of each row}; see `picture_features`."""
    texts = [{**row, "sha256": ""} for row in rows]  # whatever the pictures
    shards: dict[str, RowShards] = {}
    for name, loaded in networks.items():
        if tower := loaded.captions:
            of_part = lambda part, tower=tower: tower.features([row["prompt"] for row in part])
            place = directory / f"{name}_text"
            shards[f"{name} text"] = computed(
                place, tower.identity, texts, settings.per_prompt, network_shard(texts), of_part
            )
    return joined(shards)


def picture_features(
    settings: Settings,
    networks: Mapping[str, Loaded],
    manifest: AnyPath,
    rows: Sequence[Row],
    size: int,
    directory: AnyPath,
) -> dict[str, Float[np.ndarray, "n _"]]:
    """{kind: values of all rows}, computed by all processes; empty except in process 0.

    Kinds are the networks, and "retrieval". size: of the pictures in pixels.
    """
    shards: dict[str, RowShards] = {}
    batches = settings.per_prompt, network_shard(rows)
    open_pictures = lambda part: picture_set.Pictures(manifest.parent, part)
    for name, loaded in networks.items():
        of_part = lambda part, loaded=loaded: loaded.images.features(open_pictures(part))
        shards[name] = computed(directory / name, loaded.images.identity, rows, *batches, of_part)
    if settings.gallery is not None:
        gallery = settings.gallery(size)
        own = [gallery.position(prompt.category, prompt.id) for prompt in settings.suite.prompts]
        own_of = lambda part: np.array([own[row["row"] // settings.per_prompt] for row in part])
        ranks = lambda part: data_suite.ranks(open_pictures(part), own_of(part), gallery)
        shards["retrieval"] = computed(
            directory / "retrieval",
            gallery.identity,
            rows,
            settings.per_prompt,
            rows_per_shard(len(rows), jax.process_count(), 1, data_suite.pictures_at_once(size)),
            ranks,
        )
    return joined(shards)


def network_shard(rows: Sequence[Row]) -> int:
    """Rows per file of the features of a network."""
    # From numbers that are the same in all processes.
    batch = network.BATCH_SIZE * (jax.device_count() // jax.process_count())
    return rows_per_shard(len(rows), jax.process_count(), batch)


def computed(
    directory: AnyPath,
    what: Mapping[str, Any],
    rows: Sequence[Row],
    per_prompt: int,
    size: int,
    function: Compute,
    label: str = "",
) -> RowShards:
    """The values of rows, of which this process computes its share.

    size: rows per file. label: of the progress bar, by default the name of the directory.
    """
    shards = RowShards(directory, what, rows, per_prompt, size)
    shards.compute(function, jax.process_index(), jax.process_count(), label or directory.name)
    return shards


def joined(shards: Mapping[str, RowShards]) -> dict[str, Float[np.ndarray, "n _"]]:
    """The values of all processes, in process 0."""
    place = jax.process_index(), jax.process_count()
    shared_files.share_files(path for shard in shards.values() for path in shard.files(*place))
    if jax.process_index():
        return {}
    return {kind: shard.joined() for kind, shard in shards.items()}
