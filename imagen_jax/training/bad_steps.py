"""Decides on the device which updates are applied: steps that are not finite, and spikes.

A spike is a finite gradient norm, before clipping, that is much larger than the median of the norms
of recent steps. The host sees a step two steps late, so the decision is part of the step itself.
The window of norms is part of the state: a resumed run decides as an uninterrupted one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

WINDOW = 128  # gradient norms of which the median is taken
LEAST = 16  # norms that the window must have before a step can be a spike


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a run does with bad steps; the default stops at the first step that is not finite.

    skip_bad: drop an update that is not finite and go on.
    spike_factor: a norm above this multiple of the running median is a spike; 0: no norm is.
    skip_spikes: drop the update of a spike.
    """

    skip_bad: bool = False
    spike_factor: float = 0.0
    skip_spikes: bool = False

    @classmethod
    def of(cls, train: Mapping[str, Any]) -> "Rules":
        """The rules of a config's section `train`.

        Raises ValueError for a factor of at most 1, by which about half of all steps are spikes.
        """
        factor = train["spike_factor"]
        if 0.0 < factor <= 1.0:
            raise ValueError(
                f"train.spike_factor is {factor}; it must exceed 1, or be 0 to disable it"
            )
        skip_spikes = factor > 0.0 and train["on_spike"] == "skip"
        return cls(train["on_bad_step"] == "skip", factor, skip_spikes)

    @property
    def may_skip(self) -> bool:
        """Whether a run with these rules can go on after a skipped step."""
        return self.skip_bad or self.skip_spikes

    @property
    def has_window(self) -> bool:
        """Whether the state has a window of gradient norms."""
        return self.spike_factor > 0.0

    def is_spike(
        self, norm: Float[Array, ""], middle: Float[Array, ""], finite: Bool[Array, ""]
    ) -> Bool[Array, ""]:
        """Whether a step is a spike. middle: `median` of the earlier norms."""
        return finite & (norm > self.spike_factor * middle)


def empty_window() -> Float[Array, "norms"]:
    """The window before the first step. An infinite entry stands for a norm that is not there."""
    return jnp.full((WINDOW,), jnp.inf, jnp.float32)


def median(window: Float[Array, "norms"]) -> Float[Array, ""]:
    """The median of the norms in the window; infinite while there are fewer than LEAST."""
    ordered, count = jnp.sort(window), jnp.isfinite(window).sum()
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return jnp.where(count >= LEAST, middle, jnp.inf)


def push(window: Float[Array, "norms"], norm: Float[Array, ""]) -> Float[Array, "norms"]:
    """The window after a step: without its oldest norm, with the new one if that is finite.

    Spikes enter too, skipped or not. Otherwise every step after a lasting rise would be a spike.
    """
    return jnp.where(jnp.isfinite(norm), jnp.concatenate([window[1:], norm[None]]), window)
