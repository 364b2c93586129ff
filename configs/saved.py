"""The config of an earlier run, to start another from it, with or without changes.

python -m imagen_jax.train --config configs/saved.py:runs/base/config.json --config.optim.lr=5e-4
--workdir runs/lower_rate
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from configs import defaults


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is a workdir's config.json."""
    if not arg:
        raise ValueError("say which run: --config configs/saved.py:WORKDIR/config.json")
    try:
        content = json.loads(Path(arg).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{arg} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{arg} is not a config: it holds no object")
    # The command line can set fields that exist: those that are younger than the record are added.
    added = {part: fields for part, fields in defaults.ADDED.items() if part in content}
    younger = {part: fields | content[part] for part, fields in added.items()}
    return ConfigDict(_with_tuples(content | younger)).lock()


def _with_tuples(value: object) -> object:
    """Lists as the tuples that they were: only those can be set on the command line."""
    if isinstance(value, dict):
        return {name: _with_tuples(entry) for name, entry in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
