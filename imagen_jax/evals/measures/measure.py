"""The measure interface, and the discovery of measures.

A measure is one module of this folder and has the module's name: `--measures loss` runs `loss.py`.
The module has the members of `Measure`. It may also have

    too_few(stage, data)       {part: why these rows do not allow it}; the part "" is all of it
    row_values(e)              {place of a mean: the values [n] it is the mean of}, for rows.npz;
                               two evaluations are then compared row by row
    curves(result)             (title, {line: result of `by_bin`}) for each panel of loss.png
    write(e, output, origin)   writes files of its own; `origin` identifies weights and sampling

Places are dotted and begin inside the measure's own result. A new measure is one new file here;
no other file names it.
"""

import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from imagen_jax.evals import measures
from imagen_jax.evals.evaluation import Evaluation
from imagen_jax.evals.rows import Data, Settings
from imagen_jax.stage import Stage

Result = Mapping[str, Any]
Line = tuple[str, str]
Curves = tuple[str, Mapping[str, Result]]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of `launch.sweep`'s table: one number for each arm.

    name: its title.
    place: the number's place in the result, such as "SPLIT.overall.mean". SPLIT stands for heldout,
        or for train if the data have no held-out images.
    less_is_better: the direction of an improvement.
    needs_same: beginnings of config fields. Arms that differ in such a field cannot be compared by
        this number: ("diffusion.",) for arms that must agree in the whole section.
    """

    name: str
    place: str
    less_is_better: bool
    needs_same: tuple[str, ...] = ()


@runtime_checkable
class Measure(Protocol):
    """The members every measure has.

    ORDER: its place in the report and among the columns; the lowest comes first.
    COLUMNS: its columns in a sweep's table, () if it has none.
    """

    ORDER: int
    COLUMNS: tuple[Column, ...]

    def excluded(self, stage: Stage, settings: Settings) -> str:
        """Why it does not apply to the stage or the settings; "" if it does."""

    def measure(self, e: Evaluation) -> dict[str, Any]:
        """The result as JSON can hold it: None for a number that is not finite."""

    def lines(self, result: Result) -> Iterator[Line]:
        """(label, text) of each line of the printed table, from a result."""


def modules() -> dict[str, Measure]:
    """{name: measure} in the order of the report."""
    load = lambda name: importlib.import_module(f"{measures.__name__}.{name}")
    loaded = {name: load(name) for name in measures.NAMES}
    return dict(sorted(loaded.items(), key=lambda item: item[1].ORDER))


def check_known(names: Iterable[str]) -> None:
    """Raises ValueError for a name that is no measure."""
    for name in names:
        if name not in measures.NAMES:
            raise ValueError(f"--measures {name} is unknown; use {', '.join(measures.NAMES)}")


def choose(names: list[str], stage: Stage, settings: Settings) -> dict[str, Measure]:
    """The measures with these names, or all that apply to the stage if there are none.

    Raises ValueError for one that is unknown or does not apply.
    """
    if settings.lowres_from and not stage.lowres_size:
        raise ValueError(
            f"--lowres_from is for super-resolution stages; {stage.name} is a base stage"
        )
    check_known(names)
    reasons = {name: one.excluded(stage, settings) for name, one in modules().items()}
    for name in names:
        if reasons[name]:
            raise ValueError(f"--measures {name} does not apply: {reasons[name]}")
    return {
        name: one
        for name, one in modules().items()
        if not reasons[name] and (not names or name in names)
    }


def allowed(
    chosen: Mapping[str, Measure], stage: Stage, data: Data
) -> tuple[dict[str, Measure], dict[str, str]]:
    """(the measures that these rows allow, {measure or part of one that is left out: why}).

    Only rows are read, nothing is computed. Raises ValueError if no measure remains.
    """
    left_out = {
        f"{name}{part}": reason
        for name, one in chosen.items()
        if hasattr(one, "too_few")
        for part, reason in one.too_few(stage, data).items()
    }
    remaining = {name: one for name, one in chosen.items() if name not in left_out}
    if not remaining:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"no measure is possible with these rows: {reasons}")
    return remaining, left_out


def base_stage(stage: Stage) -> str:
    """Why a measure of super-resolution does not apply; "" if it does."""
    return "" if stage.lowres_size else f"{stage.name} is a base stage"


def columns() -> list[Column]:
    """The columns of all measures, each with its whole place in evaluation.json."""
    return [
        dataclasses.replace(column, place=f"{name}.{column.place}")
        for name, one in modules().items()
        for column in one.COLUMNS
    ]


def row_values(chosen: Mapping[str, Measure], e: Evaluation) -> dict[str, np.ndarray]:
    """{place of a mean in evaluation.json: the values of the rows it is the mean of}."""
    return {
        f"{name}.{place}": values
        for name, one in chosen.items()
        if hasattr(one, "row_values")
        for place, values in one.row_values(e).items()
    }


def lines(results: Mapping[str, Result]) -> list[Line]:
    """The lines of the printed table for {name: result of that measure}."""
    ones = modules()
    return [line for name, result in results.items() for line in ones[name].lines(result)]


def curves(results: Mapping[str, Result]) -> list[Curves]:
    """The panels of loss.png for {name: result of that measure}."""
    ones = modules()
    drawn = {name: result for name, result in results.items() if hasattr(ones[name], "curves")}
    return [panel for name, result in drawn.items() for panel in ones[name].curves(result)]


def write(
    chosen: Mapping[str, Measure], e: Evaluation, output: Path, origin: Mapping[str, str]
) -> None:
    """Writes the measures' own files to the directory `output`."""
    for one in chosen.values():
        if hasattr(one, "write"):
            one.write(e, output, origin)
