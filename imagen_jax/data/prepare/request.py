"""The request of a preparation: everything that the written bytes depend on.

It is kept with unfinished work and becomes part of the manifest, so that work continues only for
the same request.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagen_jax.data import records
from imagen_jax.data.prepare.settings import Settings
from imagen_jax.data.prepare.shards import AGAIN
from imagen_jax.data.sources.source import Source
from imagen_jax.storage import check_object, read_object

REQUEST = "request.json"
_IMAGE_KEYS = {"source": dict, "shard_size": int, "min_size": int}
# Of the captions, absent with --images_only.
_TEXT_KEYS = {"encoder": dict, "max_length": int, "batch_size": int}
# Keys that are only there if images are stored resized, with what their absence means.
_ABSENT = {"store_size": 0, "store_format": "none"}
# The same for the dtype of the features.
_ABSENT_TEXT = {"embedding_dtype": records.EMBEDDINGS[0]}


def request_of(source: Source, encoder, settings: Settings) -> dict[str, Any]:
    """The request, which is part of the manifest. encoder: None as long as captions are not."""
    resize = settings.resize
    text = {"encoder": dict(encoder.identity), "max_length": encoder.max_length} if encoder else {}
    sizes = {"shard_size": settings.shard_size, "min_size": settings.min_size}
    batch = {"batch_size": settings.batch_size} if encoder else {}
    stored = {"store_size": resize.side, "store_format": resize.format} if resize.side else {}
    request = {"source": source.describe()} | text | sizes | batch | stored
    if encoder and settings.embedding != _ABSENT_TEXT["embedding_dtype"]:
        request["embedding_dtype"] = settings.embedding
    return json.loads(json.dumps(request))


def read_request(partial: Path) -> dict[str, Any]:
    """The request of unfinished work. Raises ValueError if its file is damaged."""
    file, remedy = partial / REQUEST, f"remove {partial}; {AGAIN}"
    request = read_object(file, _IMAGE_KEYS, remedy)
    check_object(file, _ABSENT | request, {"store_size": int, "store_format": str}, remedy)
    if "encoder" in request:
        check_object(file, _ABSENT_TEXT | request, _TEXT_KEYS | {"embedding_dtype": str}, remedy)
    return request


def refuse_changes(directory: Path, before: Mapping, request: Mapping) -> None:
    """Raises ValueError, with what differs, if `directory` was made for another request."""
    before, request = (
        _ABSENT | (_ABSENT_TEXT if "encoder" in keys else {}) | keys for keys in (before, request)
    )
    keys = (*_IMAGE_KEYS, *_TEXT_KEYS, *_ABSENT, *_ABSENT_TEXT)
    changed = [
        line
        for key in keys
        if key in before and key in request
        for line in _differences(key, before[key], request[key])
    ]
    if changed:
        raise ValueError(
            f"{directory} was made with other settings ({'; '.join(changed)}): choose another"
            f" --output or remove {directory}"
        )


def _differences(name: str, before: Any, now: Any) -> list[str]:
    """What differs between two values, for a message; of objects only the differing parts."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = dict.fromkeys([*before, *now])
        parts = (_differences(f"{name}.{part}", before.get(part), now.get(part)) for part in names)
        return [line for lines in parts for line in lines]
    return [] if before == now else [f"{name} was {before}, is {now}"]
