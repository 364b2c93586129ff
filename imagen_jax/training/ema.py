"""Moving averages of the parameters. A state has one or more tracks, each with its own rule.

Sampling uses the first track. Each further track costs the memory of the parameters and one pass
over them; with several tracks, an evaluation can compare averaging horizons afterwards.
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
    """The update rule of one average."""

    def decay(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The decay in update `step` (from 0): the weight of the old average."""


@dataclasses.dataclass(frozen=True)
class FixedDecay:
    """min(most, (1 + step) / (10 + step)).

    The short memory at the start removes the initial weights from the average early: while the
    decay is below `most`, their share after n updates is 9! n! / (n + 9)!, which is 0.1 after one,
    0.018 after two and 1e-5 after ten. The paper does not mention EMA. The rule is that of
    `tf.train.ExponentialMovingAverage` with `num_updates`.
    """

    most: float

    def decay(self, step: Int[Array, ""]) -> Float[Array, ""]:
        step = step.astype(jnp.float32)
        return jnp.minimum(self.most, (1.0 + step) / (10.0 + step))


def tracks(optim: Mapping[str, Any]) -> tuple[Track, ...]:
    """The tracks of section `optim` of a config: `ema`, then `ema_tracks`."""
    return tuple(FixedDecay(decay) for decay in (optim["ema"], *optim["ema_tracks"]))


def follow(track: Track, average: Tree, params: Tree, step: Int[Array, ""]) -> Tree:
    """The average after an update of the parameters: decay * average + (1 - decay) * params."""
    decay = track.decay(step)
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), average, params)
