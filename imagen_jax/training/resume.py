"""Changes that a resumed run may have; imagen_jax/schema.py declares those of the config."""

from collections.abc import Mapping
from typing import Any

from imagen_jax import schema
from imagen_jax.encoder_identity import SAME_TEXT, SEVERAL, fields_read
from imagen_jax.text_inputs import UNNAMED, text_inputs
from imagen_jax.weights.checkpoint import Checkpoints


def check(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per allowed change. Raises ValueError with the changes that are not allowed.

    `saved` and `now` are {"config": ..., "manifest_hash": ..., "encoder": ...}; the config of `now`
    is complete.
    """
    saved = {**saved, "config": schema.complete(saved["config"], "the checkpoint's config")}
    allowed, refused = [], []
    for field, (before, after) in schema.changes(saved, now).items():
        name = field.removeprefix("config.")
        if name != field:
            free = schema.may_change(name, now["config"], before, after)
        else:
            free = field.startswith("encoder.") and not _is_read(field, now["config"])
        (allowed if free else refused).append(f"{name}: {before!r} -> {after!r}")
    if refused:
        raise ValueError(
            "this run was started with other settings; restore them, or use a new --workdir: "
            + "; ".join(refused)
        )
    return allowed


def check_newest(checkpoints: Checkpoints, config: Mapping[str, Any]) -> None:
    """Raises ValueError if the newest checkpoint has a config that this one may not continue.

    It reads one file, so that a run is refused before its setup, which may take minutes. Damaged
    checkpoints are left to `Checkpoints.latest_good`.
    """
    steps = checkpoints.steps()
    try:
        saved = checkpoints.meta(steps[-1])["config"] if steps else config
    except (OSError, ValueError, KeyError):
        return
    check({"config": saved}, {"config": config})


def _is_read(field: str, config: Mapping[str, Any]) -> bool:
    """Whether a field of an encoder's identity determines what the stage reads; not its name.

    field: such as encoder.dim or encoder.encoders.t5.dim.
    """
    name = field.split(".")[2] if field.startswith(f"encoder.{SEVERAL}.") else UNNAMED
    inputs = {text_input.name: text_input for text_input in text_inputs(config)}
    return field.rpartition(".")[2] in (fields_read(inputs[name]) if name in inputs else SAME_TEXT)
