"""The request of a preparation: everything that the written bytes depend on.

It is kept with unfinished work and becomes part of the manifest, so that work continues only for
the same request.
"""

import json
from collections.abc import Mapping
from typing import Any

from imagen_jax.data import records
from imagen_jax.data.prepare.settings import Settings
from imagen_jax.data.prepare.shards import AGAIN
from imagen_jax.data.sources.source import Source
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import check_object, read_object
from imagen_jax.text_inputs import UNNAMED

REQUEST = "request.json"
_IMAGE_KEYS = {"source": dict, "shard_size": int, "min_size": int}
# Of the captions, absent with --images_only: with a single unnamed encoder, or with named ones.
_TEXT_KEYS = {"encoder": dict, "max_length": int, "batch_size": int}
_NAMED_KEYS = {"encoders": dict, "embedding_dtype": str}
# Keys that are only there if images are stored resized, with what their absence means.
_ABSENT = {"store_size": 0, "store_format": "none"}
# The same for the dtype of the features.
_ABSENT_TEXT = {"embedding_dtype": records.EMBEDDINGS[0]}


def request_of(source: Source, encoders: Encoders | None, settings: Settings) -> dict[str, Any]:
    """The request, which is part of the manifest. encoders: None as long as captions are not."""
    resize = settings.resize
    sizes = {"shard_size": settings.shard_size, "min_size": settings.min_size}
    batch = {"batch_size": settings.batch_size} if encoders and encoders.identities else {}
    stored = {"store_size": resize.side, "store_format": resize.format} if resize.side else {}
    text, dtype = _texts(encoders, settings) if encoders else ({}, {})
    return json.loads(
        json.dumps({"source": source.describe()} | text | sizes | batch | stored | dtype)
    )


def _texts(encoders: Encoders, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the encoders, the dtype of the features if it is stated)."""
    dtype = {"embedding_dtype": settings.embedding}
    if encoders.is_named:
        return {"encoders": encoders.identities}, dtype
    identity = encoders.identities[UNNAMED]
    text = {"encoder": identity, "max_length": identity["max_length"]}
    return text, dtype if dtype != _ABSENT_TEXT else {}


def has_text(request: Mapping) -> bool:
    """Whether captions are part of a request, or only images."""
    return "encoder" in request or "encoders" in request


def read_request(partial: AnyPath) -> dict[str, Any]:
    """The request of unfinished work. Raises ValueError if its file is damaged."""
    file, remedy = partial / REQUEST, f"remove {partial.parent}; {AGAIN}"
    request = read_object(file, _IMAGE_KEYS, remedy)
    check_object(file, _ABSENT | request, {"store_size": int, "store_format": str}, remedy)
    if "encoder" in request:
        check_object(file, _ABSENT_TEXT | request, _TEXT_KEYS | {"embedding_dtype": str}, remedy)
    elif "encoders" in request:
        check_object(file, request, _NAMED_KEYS, remedy)
    return request


def refuse_changes(directory: AnyPath, before: Mapping, request: Mapping) -> None:
    """Raises ValueError, with what differs, if `directory` was made for another request."""
    before, request = (
        _ABSENT | (_ABSENT_TEXT if "encoder" in keys else {}) | keys for keys in (before, request)
    )
    keys = (*_IMAGE_KEYS, *_TEXT_KEYS, *_ABSENT, *_NAMED_KEYS)
    if has_text(before) and has_text(request) and _names(before) != _names(request):
        changed = [f"the text encoders were {_names(before)}, are {_names(request)}"]
        keys = (*_IMAGE_KEYS, *_ABSENT)
    else:
        changed = []
    changed += [
        line
        for key in keys
        if key in before and key in request
        for line in _differences(key, before[key], request[key])
    ]
    if any(line.startswith("source.heldout ") for line in changed):
        # The listing of some sources has the split of each item, so it differs too.
        changed = [line for line in changed if not line.startswith("source.listing_sha256 ")]
    if changed:
        raise ValueError(
            f"{directory} was made with other settings ({'; '.join(changed)}): choose another"
            f" --output or remove {directory}"
        )


def _names(request: Mapping) -> str:
    """The text encoders of a request, for a message."""
    if "encoder" in request:
        return "a single unnamed one"
    return ", ".join(request["encoders"]) or "none (--text_only)"


def _differences(name: str, before: Any, now: Any) -> list[str]:
    """What differs between two values, for a message; of objects only the differing parts."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = dict.fromkeys([*before, *now])
        parts = (_differences(f"{name}.{part}", before.get(part), now.get(part)) for part in names)
        return [line for lines in parts for line in lines]
    return [] if before == now else [f"{name} was {before}, is {now}"]
