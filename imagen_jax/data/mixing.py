"""Interleaves several infinite streams by weight; the order is a pure function of the position.

The idea is that of Grain's `MapDataset.mix`, with exact weights: Grain rounds them to hundredths of
the smallest.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np


def whole_weights(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the same proportions."""
    denominator = math.lcm(*(weight.denominator for weight in weights))
    numbers = [weight.numerator * (denominator // weight.denominator) for weight in weights]
    return tuple(number // math.gcd(*numbers) for number in numbers)


def interleave(position: int, weights: Sequence[int]) -> tuple[int, int]:
    """(stream, number of its element) at a position of the interleaved stream.

    Every stream's elements come in order, none is left out, and after any number of positions each
    stream has had its share to within one element for each stream before it, and one.

    weights: positive whole numbers, one for each stream.
    """
    left, before, after = sum(weights), position, position + 1
    for stream, weight in enumerate(weights):
        # Of the first `before` positions, these many belong to later streams.
        later, later_after = (count * (left - weight) // left for count in (before, after))
        if later == later_after:
            return stream, before - later
        left, before, after = left - weight, later, later_after
    raise ValueError(f"the weights {weights} are not positive whole numbers")


def stream_seed(seed: int, *key: int) -> int:
    """A seed in [0, 2^32) for one of several streams of a run."""
    return int(np.random.SeedSequence((seed, *key)).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class Mixed:
    """An infinite stream that interleaves infinite streams.

    streams: give an element for every position from 0 on. weights: see `interleave`.
    """

    streams: Sequence[Any]
    weights: Sequence[int]

    def __getitem__(self, position: int) -> Any:
        stream, number = interleave(position, self.weights)
        return self.streams[stream][number]
