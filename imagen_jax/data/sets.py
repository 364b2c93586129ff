"""The prepared directories that a config names: data.path, or those of data.mixture."""

import os
from collections.abc import Mapping
from typing import Any


def sources(data_cfg: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """(directory, weight) of each set, in order; one of weight 1 for data.path.

    Raises ValueError unless exactly one of data.path and data.mixture is given, and if the mixture
    has a directory twice or a weight that is not positive.
    """
    path, mixture = data_cfg["path"], data_cfg["mixture"]
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
    found = set()
    for directory, weight in mixture:
        if not directory:
            raise ValueError("data.mixture has an empty path: give a directory")
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
    return tuple((str(directory), float(weight)) for directory, weight in mixture or [(path, 1.0)])


def alone(data_cfg: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name of a set: the config section `data` with only this set}, in order.

    The name is the directory's own, with -2, -3, ... if others have it too; "" for data.path.
    """
    single = lambda path: dict(data_cfg) | {"path": path, "mixture": ()}
    if not data_cfg["mixture"]:
        return {"": single(data_cfg["path"])}
    configs: dict[str, dict[str, Any]] = {}
    for path, _ in sources(data_cfg):
        base = os.path.basename(os.path.abspath(path))
        name, number = base, 2
        while name in configs:
            name, number = f"{base}-{number}", number + 1
        configs[name] = single(path)
    return configs
