"""Numbers of an encoder's config.json in the Hugging Face layout, checked."""

from collections.abc import Mapping, Sequence
from typing import Any


def read_numbers(
    raw: Mapping[str, Any], required: Sequence[str], defaults: Mapping[str, float], kind: str
) -> dict[str, Any]:
    """{name: value} of the required fields, which are whole numbers, and those with a default.

    kind: the family, for the message.

    Raises ValueError for a required field that is missing and a value that is not a positive number
    of its default's type.
    """
    missing = [name for name in required if name not in raw]
    if missing:
        raise ValueError(f"not a {kind} config: it lacks {', '.join(missing)}")
    values = {name: raw.get(name, defaults.get(name)) for name in [*required, *defaults]}
    for name, value in values.items():
        whole = isinstance(defaults.get(name, 1), int)
        if type(value) not in ((int,) if whole else (int, float)) or value <= 0:
            raise ValueError(f"{name} is {value!r}, not a positive number; download the file again")
    return values


def check_heads(width: int, heads: int) -> None:
    """Raises ValueError unless the heads divide the width."""
    if width % heads:
        raise ValueError(
            f"{heads} attention heads do not divide the width {width}; download the file again"
        )
