r"""The config of an earlier run, to start another one from it, with or without changes.

    python -m imagen_jax.train --config configs/saved.py:WORKDIR/config.json \
        --config.optim.lr=5e-5 --workdir OTHER_WORKDIR
    python -m imagen_jax.train --config configs/saved.py:runs/base/config.json \
        --config.optim.lr=5e-4 --workdir runs/lower_rate --minutes 5

CPU: the second command repeats runs/base, the run of configs/base_64.py:demo, at half its learning
rate, for 5 minutes. Expect the same speed as there.

Hardware, loss and time are those of the earlier run's config; results are recorded with it.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from configs import defaults


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is a workdir's config.json."""
    if not arg:
        raise ValueError("no run is given: use --config configs/saved.py:WORKDIR/config.json")
    try:
        content = json.loads(Path(arg).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{arg} is not JSON ({error}); give the config.json of a run") from None
    sections = [] if not isinstance(content, dict) else [content.get(p, {}) for p in defaults.ADDED]
    if not sections or not all(isinstance(section, dict) for section in sections):
        raise ValueError(f"{arg} is not a config; give the config.json of a run")
    # The command line can set existing fields only, so those that the record lacks are added.
    added = {part: fields for part, fields in defaults.ADDED.items() if part in content}
    completed = {part: fields | content[part] for part, fields in added.items()}
    return ConfigDict(_with_tuples(content | completed)).lock()


def _with_tuples(value: object) -> object:
    """`value` with tuples for lists: the command line can set tuples only."""
    if isinstance(value, dict):
        return {name: _with_tuples(entry) for name, entry in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
