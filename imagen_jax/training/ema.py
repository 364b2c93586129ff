"""Averages of the parameters over training: any number of tracks in the state, each with a rule of
its own.

The first track is the EMA that samples are drawn from; more tracks cost their memory and one pass
over the parameters each, and let an evaluation compare averaging horizons afterwards.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Tree = Any


@runtime_checkable
class Track(Protocol):
    """A rule by which an average of the parameters follows them."""

    def decay(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The share of the old average that stays after this update, which is number
        `step` from 0.
        """


@dataclasses.dataclass(frozen=True)
class FixedDecay:
    """min(most, (1 + step) / (10 + step)): a short memory at first, so that early samples are not
    those of the initial weights.
    """

    most: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.most < 1.0:
            raise ValueError(
                f"an EMA's decay is {self.most}; it must be at least 0 and less than 1"
            )

    def decay(self, step: Int[Array, ""]) -> Float[Array, ""]:
        step = step.astype(jnp.float32)
        return jnp.minimum(self.most, (1.0 + step) / (10.0 + step))


def tracks(optim: Mapping[str, Any]) -> tuple[Track, ...]:
    """The tracks of a config's `optim`: `ema`, then those of `ema_tracks`. Raises ValueError for a
    decay out of range.
    """
    return tuple(FixedDecay(decay) for decay in (optim["ema"], *optim["ema_tracks"]))


def follow(track: Track, average: Tree, params: Tree, step: Int[Array, ""]) -> Tree:
    """The average after one more update of the parameters."""
    decay = track.decay(step)
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), average, params)
