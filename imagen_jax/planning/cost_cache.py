"""A cache of compiler estimates in a directory, one JSON file per compiled program."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from imagen_jax.storage import write_json

COMPILERS = {"tpu": "libtpu", "cuda": "jax-cuda12-pjrt"}  # package by platform
VERSION = 2  # raise it when the meaning of the cached numbers changes
log = logging.getLogger("imagen_jax.planning.cost_cache")


def cached(
    directory: str,
    key: str,
    fields: Mapping[str, type],
    compute: Callable[[], Any],
    compiler: str = COMPILERS["tpu"],
) -> dict[str, Any]:
    """The costs stored under a key, or the result of `compute`, which is then stored.

    Args:
        directory: the cache.
        key: text that determines the costs: the chip and the program. Versions of the compiler
            are added to it.
        fields: the expected fields: {name: float, or dict for {name: number}}. A file with other
            content is computed again.
        compute: returns the costs.
        compiler: the package of the compiler.
    """
    version = importlib.metadata.version
    versions = f"{VERSION} {version(compiler)} {version('jaxlib')}"
    digest = hashlib.sha256(f"{versions} {key}".encode()).hexdigest()[:32]
    file = Path(directory) / f"{digest}.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if _are_costs(stored := json.loads(file.read_text()), fields):
            return stored
    costs = compute()
    try:
        write_json(file, costs)
    except OSError as error:
        log.warning("cannot store a cost in the cache: %s", error)
    return costs


def _are_costs(content: Any, fields: Mapping[str, type]) -> bool:
    """Whether the content has these fields, with numbers that are finite and not negative."""
    is_number = lambda value: type(value) in (int, float) and 0 <= value < math.inf
    is_valid = {
        float: is_number,
        dict: lambda value: isinstance(value, dict) and all(map(is_number, value.values())),
    }
    return (
        isinstance(content, dict)
        and content.keys() == fields.keys()
        and all(is_valid[kind](content[name]) for name, kind in fields.items())
    )
