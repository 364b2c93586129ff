"""Rows keyed by (prompt id, image id), joined from shards in the order of an expected list."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

SHOWN = 3  # rows named in a message


def join(
    expected: Int[np.ndarray, "n 2"],
    shards: Iterable[tuple[Int[np.ndarray, "_ 2"], Float[np.ndarray, "_ _"]]],
) -> Float[np.ndarray, "n _"]:
    """The features of the expected rows, in their order.

    shards: (keys, features) in any order, for example one pair per process. Raises ValueError for a
    missing, doubled or unexpected row: no row is counted twice, and no padding is counted.
    """
    wanted = [tuple(key) for key in expected.tolist()]
    position = {key: i for i, key in enumerate(wanted)}
    if len(position) < len(wanted):
        _refuse(_doubled(wanted), "expected twice; list each row once")
    shards = list(shards)
    for keys, features in shards:
        if len(keys) != len(features):
            raise ValueError(
                f"a shard has {len(keys)} keys and {len(features)} rows of features; write it again"
            )
    found = [tuple(key) for keys, _ in shards for key in keys.tolist()]
    _refuse(
        [key for key in found if key not in position],
        "not expected; pass only shards of this list of prompts",
    )
    _refuse(_doubled(found), "doubled; pass each shard once")
    present = set(found)
    _refuse([key for key in wanted if key not in present], "missing; compute their shards again")
    widths = {features.shape[1] for _, features in shards}
    if len(widths) > 1:
        raise ValueError(
            f"the shards have {sorted(widths)} features; use one feature network for all"
        )
    joined = np.concatenate([features for _, features in shards])
    order = np.empty(len(wanted), np.int64)
    order[[position[key] for key in found]] = np.arange(len(found))
    return joined[order]


def _doubled(keys: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The keys that occur again, once each."""
    seen, again = set(), {}
    for key in keys:
        if key in seen:
            again[key] = None
        seen.add(key)
    return list(again)


def _refuse(keys: list[tuple[int, int]], reason: str) -> None:
    if keys:
        first = ", ".join(str(key) for key in keys[:SHOWN])
        raise ValueError(
            f"{len(keys)} row{'s are' if len(keys) > 1 else ' is'} {reason}"
            f" (prompt, image): {first}{', ...' if len(keys) > SHOWN else ''}"
        )
