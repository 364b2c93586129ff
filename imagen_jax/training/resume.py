"""Changes of the config that a resumed run may have; imagen_jax/schema.py declares them."""

from collections.abc import Mapping
from typing import Any

from imagen_jax import schema


def check(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per allowed change. Raises ValueError with the changes that are not allowed.

    `saved` and `now` are {"config": ..., "manifest_hash": ..., "encoder": ...}; the config of `now`
    is complete.
    """
    saved = {**saved, "config": schema.complete(saved["config"], "the checkpoint's config")}
    allowed, refused = [], []
    for field, (before, after) in schema.changes(saved, now).items():
        name = field.removeprefix("config.")
        free = name != field and schema.may_change(name, now["config"], before, after)
        (allowed if free else refused).append(f"{name}: {before!r} -> {after!r}")
    if refused:
        raise ValueError(
            "this run was started with other settings; restore them, or use a new --workdir: "
            + "; ".join(refused)
        )
    return allowed
