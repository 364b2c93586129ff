"""Grids of sampling settings: `--grid STAGE.FIELD=V1,V2,...`, and the sets of pictures they need.

The points of a grid are the product of its axes. Points that share the settings of the first stages
share the pictures of these stages: the sets of pictures form a tree. Pure functions, no sampling.
"""

import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from imagen_jax import field, schema
from imagen_jax.cascade import STAGES
from imagen_jax.stage import check_sampling
from imagen_jax.text_inputs import UNNAMED, TextInput

SYNTAX = "give --grid STAGE.FIELD=V1,V2,..., such as base.w=1,2,4"


@dataclasses.dataclass(frozen=True)
class Axis:
    """One field of `sampling` of one stage, with the values that it takes, in their JSON form."""

    stage: str
    field: str
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        return f"{self.stage}.{self.field}"


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A set of pictures: the images of one stage for given settings of it and of earlier stages.

    stages: the stages from base to this one.
    settings: {name of an axis: value} of these stages.
    config: the cascade config with these settings.
    parent: the set whose pictures are the low-res images; None for base.
    directory: of the set, relative to that of the grid.
    """

    stages: tuple[str, ...]
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    parent: "Node | None"
    directory: PurePath

    @property
    def stage(self) -> str:
        return self.stages[-1]

    @property
    def sampling(self) -> Mapping[str, Any]:
        """The settings of the stage."""
        return self.config[self.stage]["sampling"]

    @property
    def label(self) -> str:
        """The settings in words: "base.w=1.5 sr_1.w=4"."""
        return " ".join(shown(name, value) for name, value in self.settings.items())


def shown(name: str, value: Any) -> str:
    """NAME=VALUE, with 4 for 4.0."""
    return f"{name}={shown_value(value)}"


def shown_value(value: Any) -> str:
    """A value in short: 4 for 4.0, -8..12 for a pair."""
    if isinstance(value, (list, tuple)):
        return "..".join(map(shown_value, value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def parse(options: Sequence[str], config: Mapping[str, Any], stages: Sequence[str]) -> list[Axis]:
    """The axes of --grid options.

    stages: the stages that run. Raises ValueError in one line for an option that is malformed, that
    names an unknown field or a stage that is not run, or that has an invalid value, a value without
    effect or the same value twice.
    """
    axes = [_axis(option, stages) for option in options]
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--grid {name} is given twice: give all its values in one --grid")
    check_settings(points(axes, config, stages), axes)
    return axes


def _axis(option: str, stages: Sequence[str]) -> Axis:
    name, equals, text = option.partition("=")
    stage, dot, field_name = name.strip().partition(".")
    if not (equals and dot):
        raise ValueError(f"--grid {option}: {SYNTAX}")
    if stage not in stages:
        kind = "not run" if stage in STAGES else "unknown"
        raise ValueError(
            f"--grid {option}: stage {stage} is {kind}; the stages that run are {', '.join(stages)}"
        )
    if field_name not in schema.SAMPLING:
        similar = difflib.get_close_matches(field_name, schema.SAMPLING, 1, cutoff=0.5)
        hint = f"did you mean {similar[0]}?" if similar else f"use {', '.join(schema.SAMPLING)}"
        raise ValueError(f"--grid {option}: sampling.{field_name} is unknown, {hint}")
    values: list[Any] = []
    for part in split_values(text):
        try:
            value = field.parse(part.strip(), schema.SAMPLING[field_name])
        except ValueError as error:
            raise ValueError(f"--grid {option}: sampling.{field_name} {error}") from None
        if value in values:
            raise ValueError(f"--grid {option}: {shown_value(value)} comes twice; leave one out")
        values.append(value)
    return Axis(stage, field_name, tuple(values))


def split_values(text: str) -> list[str]:
    """Splits at the commas that are not inside brackets, so that a value may be a tuple."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def points(axes: Sequence[Axis], config: Mapping[str, Any], stages: Sequence[str]) -> list[Node]:
    """The points of the grid as sets of the last stage, the values of the last axis changing first.

    Sets that several points share, such as base pictures, are the same object.
    """
    found: dict[tuple[int, str], Node] = {}
    leaves = []
    for values in itertools.product(*(axis.values for axis in axes)):
        parent = None
        for i in range(len(stages)):
            part = [(a, v) for a, v in zip(axes, values) if a.stage in stages[: i + 1]]
            settings = {axis.name: value for axis, value in part}
            key = i, json.dumps(settings)
            if key not in found:
                own = [(axis.field, value) for axis, value in part if axis.stage == stages[i]]
                name = "_".join([stages[i], *(shown(*pair) for pair in own)])
                directory = (parent.directory if parent else PurePath()) / name
                changed = _with_settings(config, part)
                found[key] = Node(tuple(stages[: i + 1]), settings, changed, parent, directory)
            parent = found[key]
        leaves.append(parent)
    return leaves


def _with_settings(
    config: Mapping[str, Any], settings: Iterable[tuple[Axis, Any]]
) -> dict[str, Any]:
    """A cascade config with other values of some fields of `sampling`."""
    config = dict(config)
    for axis, value in settings:
        section = config[axis.stage]
        config[axis.stage] = section | {"sampling": section["sampling"] | {axis.field: value}}
    return config


def levels(points: Sequence[Node]) -> list[list[Node]]:
    """For each stage, from base on, its sets."""
    out, level = [], list(points)
    while level:
        level = list({id(node): node for node in level}.values())
        out.append(level)
        level = [node.parent for node in level if node.parent]
    return out[::-1]


def check_settings(
    points: Sequence[Node],
    axes: Sequence[Axis],
    inputs: Mapping[str, Sequence[TextInput]] | None = None,
) -> None:
    """Raises ValueError if a stage cannot draw with settings of the grid, or an axis has no effect.

    inputs: {stage: its text inputs}, if the stages are loaded.
    """
    fields = field.flat({"sampling": schema.SAMPLING})
    for node in itertools.chain(*levels(points)):
        where = f"--grid {node.label}".rstrip()
        try:
            check_sampling(node.sampling)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        try:
            schema.complete_cascade(node.config, new=True)
        except ValueError as error:  # begins with a label of the config
            raise ValueError(f"{where}: {str(error).partition(': ')[2]}") from None
        facts = {"data": {"lowres_size": int(node.stage != "base")}, "sampling": node.sampling}
        if inputs:
            read = inputs[node.stage]
            facts["text"] = {
                "dim": sum(each.dim for each in read if each.name == UNNAMED),
                "encoders": tuple(each.name for each in read if each.name != UNNAMED),
            }
        values = field.flat(facts)
        idle = field.without_effect(values, fields)
        for axis in axes:
            path = f"sampling.{axis.field}"
            if axis.stage == node.stage and path in idle:
                problem = field.effect_problem(path, values, idle[path], ())
                raise ValueError(f"{where}: {problem}")
