"""One field of a config: its meaning, its type and the values it accepts.

imagen_jax/schema.py lists the fields.
"""

import ast
import dataclasses
import math
import typing
from typing import Any

NEEDED = object()  # `older` of a field that every record has
WORDS = {
    int: "an integer",
    float: "a finite number",
    bool: "a boolean",
    str: "a string",
    tuple: "a tuple",
}


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config.

    meaning: one sentence.
    kind: int, float, bool, str, tuple[int, ...], tuple[float, float] and the like, or tuple.
    source: where the paper, or another paper, has it; "" where the paper has nothing.
    choices: the valid values, of a tuple the valid entries; () for any.
    older: the value assumed for records written before the field existed.
    resume: whether a resume may change it; (field, value): only while that field has that value.
    interval: the valid numbers of a new run, such as "[0, 1)"; "" for any. Records are not checked.
    """

    meaning: str
    kind: Any
    source: str = ""
    choices: tuple[str, ...] = ()
    older: Any = NEEDED
    resume: bool | tuple[str, Any] = False
    interval: str = ""


def read(value: Any, field: Field, new: bool = False) -> Any:
    """A field's value as JSON returns it: tuples as lists, and ints of float fields as floats.

    new: of a run that is about to start. Raises ValueError "is ...; it must be ...".
    """
    converted = _of_kind(value, field.kind)
    entries = converted if isinstance(converted, list) else [converted]
    if converted is NEEDED or (field.choices and not set(entries) <= set(field.choices)):
        raise ValueError(_refusal(value, field))
    if new and not all(within(entry, field.interval) for entry in entries):
        raise ValueError(_refusal(value, field))
    return converted


def parse(text: str, field: Field) -> Any:
    """The value of a field on a command line. Raises ValueError as `read` does."""
    if field.kind is str:
        return read(text, field)
    try:
        value = float(text) if field.kind is float else ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        raise ValueError(_refusal(text, field)) from None
    return read(value, field)


def within(number: Any, interval: str) -> bool:
    """Whether a number lies in an interval such as "[0, 2^32)" or "(0, inf)"; True for ""."""
    if not interval:
        return True
    low, high = (_bound(text) for text in interval[1:-1].split(","))
    above = low <= number if interval[0] == "[" else low < number
    return above and (number <= high if interval[-1] == "]" else number < high)


def _bound(text: str) -> float:
    base, _, power = text.partition("^")
    return float(base) ** int(power or 1)


def valid(field: Field) -> str:
    """The valid values of a field in words."""
    kinds = typing.get_args(field.kind)
    within = f" in {field.interval}" * bool(field.interval)
    if field.choices:
        return f"{'a tuple of' if kinds else 'one of'} {', '.join(field.choices)}"
    if not kinds:
        return f"{WORDS[field.kind]}{within}"
    number = "" if Ellipsis in kinds else f"{len(kinds)} "
    return f"a tuple of {number}{WORDS[kinds[0]].rpartition(' ')[2]}s{within}"


def kind_name(kind: Any) -> str:
    """int, or tuple[int, ...]."""
    return str(kind) if typing.get_args(kind) else kind.__name__


def _refusal(value: Any, field: Field) -> str:
    return f"is {value!r}; it must be {valid(field)}"


def _of_kind(value: Any, kind: Any) -> Any:
    """`value` with tuples as lists and ints for floats as floats; NEEDED for another kind."""
    if kind is tuple or typing.get_origin(kind) is tuple:
        return _list(value, typing.get_args(kind))
    if isinstance(value, bool) and kind is not bool:
        return NEEDED
    if kind is float and isinstance(value, (int, float)):
        return float(value) if math.isfinite(value) else NEEDED  # JSON cannot hold it
    return value if isinstance(value, kind) else NEEDED


def _list(value: Any, kinds: tuple[Any, ...]) -> Any:
    """`_of_kind` for a tuple with entries of these kinds; () for any entries."""
    if not isinstance(value, (list, tuple)):
        return NEEDED
    if not kinds:
        return [_list(entry, ()) if isinstance(entry, (list, tuple)) else entry for entry in value]
    kinds = kinds[:1] * len(value) if Ellipsis in kinds else kinds
    if len(kinds) != len(value):
        return NEEDED
    entries = [_of_kind(entry, kind) for entry, kind in zip(value, kinds)]
    return NEEDED if any(entry is NEEDED for entry in entries) else entries
