"""Whether a run may go on with a changed config; imagen_jax/schema.py says what may change."""

from collections.abc import Mapping
from typing import Any

from imagen_jax import schema


def check(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines describing the changes that are allowed. Raises ValueError with the others.

    `saved` and `now` are {"config": ..., "manifest_hash": ..., "encoder": ...}.
    """
    saved = {**saved, "config": schema.complete(saved["config"], "the checkpoint's config")}
    now = {**now, "config": schema.complete(now["config"])}
    allowed, refused = [], []
    for field, (before, after) in schema.changes(saved, now).items():
        name = field.removeprefix("config.")
        free = name != field and schema.may_change(name, now["config"])
        (allowed if free else refused).append(f"{name}: {before!r} -> {after!r}")
    if refused:
        raise ValueError(
            "this run was started with other settings; restore them, or use a new --workdir: "
            + "; ".join(refused)
        )
    return allowed
