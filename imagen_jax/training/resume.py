"""Whether a run may go on with a changed config: what its numbers depend on must not change, the rest may."""

from typing import Any, Mapping

# Parts and fields that change where, how long or how visibly a run computes, not what it computes.
FREE = ("name", "mesh", "train", "sampling", "model.remat", "data.path", "data.workers", "data.cache_mib")


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 1e-4, ...}; sequences as tuples, so that a config read from JSON compares equal."""
    out = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = _frozen(value)
    return out


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{field: (saved, now)} of all that differs."""
    a, b = flat(saved), flat(now)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def check(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines describing the changes that are allowed. Raises ValueError with the others: model, diffusion, data, optimizer, seed, batch.

    `saved` and `now` are {"config": ..., "manifest_hash": ..., "encoder": ...}. The number of steps is free unless the learning rate
    decays towards it.
    """
    differ = changes(saved, now)
    cosine = now["config"]["optim"]["decay"] == "cosine"
    allowed, refused = [], []
    for field, (before, after) in differ.items():
        name = field.removeprefix("config.")
        free = any(name == f or name.startswith(f + ".") for f in FREE) and not (cosine and name == "train.steps")
        (allowed if free else refused).append(f"{name}: {before!r} -> {after!r}")
    if refused:
        raise ValueError(
            "this run was started with other settings; restore them, or use a new --workdir: " + "; ".join(refused)
        )
    return allowed
