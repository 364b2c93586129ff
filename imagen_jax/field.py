"""One field of a config: its meaning, its type and the values it accepts.

imagen_jax/schema.py lists the fields.
"""

import ast
import dataclasses
import math
import typing
from typing import Any

# `Field.older` of a field that every saved config contains; `_of_kind` returns it for a wrong type.
NEEDED = object()
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
    source: section, figure or paper that defines it; "" if there is none.
    choices: the valid values (for a tuple: the valid entries); () allows any.
    older: the value to assume for configs that were saved before the field existed.
    resume: whether a resumed run may change it. (field, value): only if that other field has this
        value.
    interval: the valid range in a new run, such as "[0, 1)"; "" allows any number. Saved configs
        are not checked.
    """

    meaning: str
    kind: Any
    source: str = ""
    choices: tuple[str, ...] = ()
    older: Any = NEEDED
    resume: bool | tuple[str, Any] = False
    interval: str = ""


def read(value: Any, field: Field, new: bool = False) -> Any:
    """A field's value in its JSON form: tuples become lists, integers in float fields floats.

    new: the value belongs to a new run, so it must lie in the interval too.

    Raises ValueError with the value and the valid ones: "is ...; it must be ...".
    """
    converted = _of_kind(value, field.kind)
    entries = converted if isinstance(converted, list) else [converted]
    if converted is NEEDED or (field.choices and not set(entries) <= set(field.choices)):
        raise ValueError(_error_text(value, field))
    if new and not all(within(entry, field.interval) for entry in entries):
        raise ValueError(_error_text(value, field))
    return converted


def parse(text: str, field: Field) -> Any:
    """Parses the command-line text of a field. Raises ValueError as `read` does."""
    if field.kind is str:
        return read(text, field)
    try:
        value = float(text) if field.kind is float else ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        raise ValueError(_error_text(text, field)) from None
    return read(value, field)


def within(number: Any, interval: str) -> bool:
    """Whether a number lies in an interval such as "[0, 2^32)" or "(0, inf)"; True for ""."""
    if not interval:
        return True
    low, high = (_bound(text) for text in interval[1:-1].split(","))
    low_ok = low <= number if interval[0] == "[" else low < number
    return low_ok and (number <= high if interval[-1] == "]" else number < high)


def _bound(text: str) -> float:
    base, _, power = text.partition("^")
    return float(base) ** int(power or 1)


def valid(field: Field) -> str:
    """The valid values of a field in words."""
    kinds = typing.get_args(field.kind)
    range_text = f" in {field.interval}" * bool(field.interval)
    if field.choices:
        return f"{'a tuple of' if kinds else 'one of'} {', '.join(field.choices)}"
    if not kinds:
        return f"{WORDS[field.kind]}{range_text}"
    length = "" if Ellipsis in kinds else f"{len(kinds)} "
    return f"a tuple of {length}{WORDS[kinds[0]].rpartition(' ')[2]}s{range_text}"


def kind_name(kind: Any) -> str:
    """The name of a type, such as "int" or "tuple[int, ...]"."""
    return str(kind) if typing.get_args(kind) else kind.__name__


def _error_text(value: Any, field: Field) -> str:
    return f"is {value!r}; it must be {valid(field)}"


def _of_kind(value: Any, kind: Any) -> Any:
    """`value` in its JSON form, or NEEDED if its type is wrong."""
    if kind is tuple or typing.get_origin(kind) is tuple:
        return _list(value, typing.get_args(kind))
    if isinstance(value, bool) and kind is not bool:
        return NEEDED
    if kind is float and isinstance(value, (int, float)):
        return float(value) if math.isfinite(value) else NEEDED  # JSON has no inf and no NaN
    return value if isinstance(value, kind) else NEEDED


def _list(value: Any, kinds: tuple[Any, ...]) -> Any:
    """`_of_kind` for tuples.

    kinds: the types of the entries; () allows any.
    """
    if not isinstance(value, (list, tuple)):
        return NEEDED
    if not kinds:
        return [_list(entry, ()) if isinstance(entry, (list, tuple)) else entry for entry in value]
    kinds = kinds[:1] * len(value) if Ellipsis in kinds else kinds
    if len(kinds) != len(value):
        return NEEDED
    entries = [_of_kind(entry, kind) for entry, kind in zip(value, kinds)]
    return NEEDED if any(entry is NEEDED for entry in entries) else entries
