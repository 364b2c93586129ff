"""One field of a config: its meaning, its type, the values it accepts and when it has an effect.

imagen_jax/schema.py lists the fields.
"""

import ast
import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

NEEDED = object()  # `Field.older` of a field that every saved config contains
WRONG_TYPE = object()  # what `_of_kind` returns for a value of a wrong type
WORDS = {
    int: "an integer",
    float: "a finite number",
    bool: "a boolean",
    str: "a string",
    tuple: "a tuple",
}


@dataclasses.dataclass(frozen=True)
class Need:
    """A condition on another field: it has one of `values`, or none of `unless`.

    field: dotted path in the config of a stage, such as "sampling.grid".
    """

    field: str
    values: tuple[Any, ...] = ()
    unless: tuple[Any, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether the other field's value fulfils the condition."""
        return value in self.values if self.values else value not in self.unless


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config.

    meaning: one sentence.
    kind: int, float, bool, str, tuple[int, ...], tuple[float, float] and the like, or tuple.
    source: section, figure or paper that defines it; "" if there is none.
    choices: the valid values (for a tuple: the valid entries); () allows any.
    older: the value to assume for configs that were saved before the field existed.
    resume: whether a resumed run may change it. (field, value): only if that other field has this
        value. A function of the values before and after, which docs/config.md names: if it is true.
    interval: the valid range in a new run, such as "[0, 1)"; "" allows any number. Saved configs
        are not checked.
    needs: without all of these conditions the field has no effect (see `without_effect`). A tuple
        of conditions stands for one of them.
    idle: while the field has no effect, a new run may give it one of these values or `older`.
        Without `idle` and `older` it may give any value: the configs have no common default.
    """

    meaning: str
    kind: Any
    source: str = ""
    choices: tuple[str, ...] = ()
    older: Any = NEEDED
    resume: bool | tuple[str, Any] | Callable[[Any, Any], bool] = False
    interval: str = ""
    needs: tuple[Need | tuple[Need, ...], ...] = ()
    idle: tuple[Any, ...] = ()

    @property
    def defaults(self) -> tuple[Any, ...]:
        """The values that are accepted without effect; () accepts any."""
        return self.idle if self.older is NEEDED else (self.older, *self.idle)


def read(value: Any, field: Field, new: bool = False) -> Any:
    """A field's value in its JSON form: tuples become lists, integers in float fields floats.

    new: the value belongs to a new run, so it must lie in the interval too.

    Raises ValueError with the value and the valid ones: "is ...; it must be ...".
    """
    converted = _of_kind(value, field.kind)
    entries = converted if isinstance(converted, list) else [converted]
    if converted is WRONG_TYPE or (field.choices and not set(entries) <= set(field.choices)):
        raise ValueError(_error_text(value, field))
    if new and not all(within(number, field.interval) for number in _numbers(entries)):
        raise ValueError(_error_text(value, field))
    return converted


def _numbers(entries: Sequence[Any]) -> Iterator[Any]:
    """The entries of a list and of the lists in it."""
    for entry in entries:
        yield from _numbers(entry) if isinstance(entry, list) else [entry]


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
    return f"a tuple of {_entries(kinds)}{range_text}"


def _entries(kinds: tuple[Any, ...]) -> str:
    """The entries of a tuple in words, such as "2 numbers" or "tuples of a string, a number"."""
    if inner := typing.get_args(kinds[0]):
        each = ", ".join(WORDS[kind] for kind in inner if kind is not Ellipsis)
        return f"tuples of {each}"
    length = "" if Ellipsis in kinds else f"{len(kinds)} "
    return f"{length}{WORDS[kinds[0]].rpartition(' ')[2]}s"


def kind_name(kind: Any) -> str:
    """The name of a type, such as "int" or "tuple[int, ...]"."""
    return str(kind) if typing.get_args(kind) else kind.__name__


def _error_text(value: Any, field: Field) -> str:
    return f"is {value!r}; it must be {valid(field)}"


def _of_kind(value: Any, kind: Any) -> Any:
    """`value` in its JSON form, or WRONG_TYPE."""
    if kind is tuple or typing.get_origin(kind) is tuple:
        return _list(value, typing.get_args(kind))
    if isinstance(value, bool) and kind is not bool:
        return WRONG_TYPE
    if kind is float and isinstance(value, (int, float)):
        return float(value) if math.isfinite(value) else WRONG_TYPE  # JSON has no inf and no NaN
    return value if isinstance(value, kind) else WRONG_TYPE


def _list(value: Any, kinds: tuple[Any, ...]) -> Any:
    """`_of_kind` for tuples.

    kinds: the types of the entries; () allows any.
    """
    if not isinstance(value, (list, tuple)):
        return WRONG_TYPE
    if not kinds:
        return [_list(entry, ()) if isinstance(entry, (list, tuple)) else entry for entry in value]
    kinds = kinds[:1] * len(value) if Ellipsis in kinds else kinds
    if len(kinds) != len(value):
        return WRONG_TYPE
    entries = [_of_kind(entry, kind) for entry, kind in zip(value, kinds)]
    return WRONG_TYPE if any(entry is WRONG_TYPE for entry in entries) else entries


def read_section(
    section: Any, fields: Mapping[str, Any], prefix: str, new: bool, problems: list[str]
) -> dict[str, Any]:
    """The completed section of a config, see `schema.complete`; appends its problems to `problems`.

    fields: {name: Field, or the fields of a section}. prefix: the path of the section, such as
    "optim.".
    """
    if not isinstance(section, Mapping):
        name = prefix.removesuffix(".") or "the config"
        problems.append(f"{name} is {section!r}; it must have the fields {', '.join(fields)}")
        return {}
    problems += [_unknown(name, fields, prefix) for name in section if name not in fields]
    completed = {}
    for name, field in fields.items():
        path = prefix + name
        if name in section and isinstance(field, Mapping):
            completed[name] = read_section(section[name], field, f"{path}.", new, problems)
        elif name in section:
            try:
                completed[name] = read(section[name], field, new)
            except ValueError as error:
                problems.append(f"{path} {error}")
        elif not can_be_absent(field):
            problems.append(f"{path} is missing")
        elif isinstance(field, Mapping):
            completed[name] = read_section({}, field, f"{path}.", new, problems)
        else:
            completed[name] = read(field.older, field)
    return completed


def can_be_absent(field: Any) -> bool:
    """Whether a config may lack a field, or a section: all of its fields have an `older` value."""
    if isinstance(field, Mapping):
        return all(map(can_be_absent, field.values()))
    return field.older is not NEEDED


def _unknown(name: str, fields: Mapping[str, Any], prefix: str) -> str:
    similar = difflib.get_close_matches(str(name), fields, 1, cutoff=0.5)
    valid_fields = f"valid fields are {', '.join(fields)}"
    hint = f"did you mean {prefix}{similar[0]}?" if similar else valid_fields
    return f"{prefix}{name} is unknown, {hint}"


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted path: value}, such as {"optim.lr": 1e-4}.

    Lists become tuples, so that a config read from JSON compares equal.
    """
    return dict(_leaves(config, ""))


def _leaves(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _frozen(value)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def any_of(need: Need | tuple[Need, ...]) -> tuple[Need, ...]:
    """The conditions of which one must hold."""
    return need if isinstance(need, tuple) else (need,)


def without_effect(
    values: Mapping[str, Any], fields: Mapping[str, Field]
) -> dict[str, tuple[Need, ...]]:
    """{field: conditions of which none holds} of the fields that have no effect.

    values: {dotted path: value}; a condition on a field that is not there counts as fulfilled.
    fields: {dotted path: its declaration}.
    """
    failed = {}
    for path in values.keys() & fields.keys():
        for need in map(any_of, fields[path].needs):
            if all(
                other.field in values and not other.holds(values[other.field]) for other in need
            ):
                failed[path] = need
    return dict(sorted(failed.items()))


def effect_problem(
    path: str, values: Mapping[str, Any], need: tuple[Need, ...], defaults: tuple[Any, ...]
) -> str:
    """The message for a field without effect: its value, the reason, and the changes that help."""
    reasons = " and ".join(f"{other.field} = {_shown(values[other.field])}" for other in need)
    changes = " or ".join(
        f"set {other.field} = {' or '.join(map(_shown, other.values))}"
        if other.values
        else f"change {other.field}"
        for other in need
    )
    default = f" (default {_shown(defaults[0])})" if defaults else ""
    value = _shown(values[path])
    return f"{path} = {value} has no effect with {reasons}; {changes}, or omit it{default}"


def _shown(value: Any) -> str:
    return json.dumps(value)
