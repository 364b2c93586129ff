"""The prepared directories that a config names: data.path, or those of data.mixture."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One prepared directory of a config.

    name: in numbers and messages: the directory's own name, with -2, -3, ... if others have it too;
        "" for data.path.
    weight: the share of the training examples, relative to the weights of the others.
    """

    name: str
    path: str
    weight: float

    def config(self, data_cfg: Mapping[str, Any]) -> dict[str, Any]:
        """The config section `data` with only this set."""
        return dict(data_cfg) | {"path": self.path, "mixture": ()}


def data_sets(data_cfg: Mapping[str, Any]) -> tuple[DataSet, ...]:
    """The sets of a config section `data`, in order; one of weight 1 for data.path.

    Raises ValueError unless exactly one of data.path and data.mixture is given, and if the mixture
    has a directory twice or a weight that is not positive.
    """
    path, mixture = data_cfg["path"], data_cfg["mixture"]
    if path and not path.strip():
        raise ValueError(f"data.path is empty ({path!r}): give a directory")
    if path and mixture:
        raise ValueError(
            f"data.path = {path} and data.mixture are both given: set data.path = '' to train on"
            " the mixture, or data.mixture = ()"
        )
    if not path and not mixture:
        raise ValueError(
            "data.path and data.mixture are both empty: give the directory that"
            " imagen_jax.prepare_data made, or several with weights"
        )
    if path:
        return (DataSet("", str(path), 1.0),)
    _check_mixture(mixture)
    found: dict[str, DataSet] = {}
    for path, weight in mixture:
        base = os.path.basename(os.path.abspath(path))
        name, number = base, 2
        while name in found:
            name, number = f"{base}-{number}", number + 1
        found[name] = DataSet(name, str(path), float(weight))
    return tuple(found.values())


def _check_mixture(mixture: Any) -> None:
    found = set()
    for directory, weight in mixture:
        if not directory.strip():
            raise ValueError(f"data.mixture has an empty path ({directory!r}): give a directory")
        if weight <= 0:
            raise ValueError(
                f"data.mixture has the weight {weight:g} for {directory}: give a positive one, or"
                " leave the directory out"
            )
        if (real := os.path.realpath(directory)) in found:
            raise ValueError(
                f"data.mixture has {directory} twice: give each directory once, with the sum of"
                " the weights"
            )
        found.add(real)
    if not math.isfinite(sum(weight for _, weight in mixture)):
        raise ValueError("the weights of data.mixture have a sum that is not finite: divide them")
