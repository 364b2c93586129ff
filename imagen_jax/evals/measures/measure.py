"""The measure interface, and the discovery of measures.

A measure is one module of this folder, and its name is the module's: `--measures loss` runs
`loss.py`. The module has the members of `Measure`. It may also have

    row_values(e)              {place of a mean: the values [n] it is the mean of}, for rows.npz;
                               two evaluations are then compared row by row
    curves(found)              (title, {line: result of `by_bin`}) for each panel of loss.png
    write(e, output, origin)   writes files of its own; `origin` says where the samples come from

Places are dotted and begin inside the measure's own result. A new measure is one new file here;
nothing else learns its name.
"""

import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from imagen_jax.evals import measures
from imagen_jax.evals.evaluation import Evaluation
from imagen_jax.evals.rows import Settings
from imagen_jax.stage import Stage

Result = Mapping[str, Any]
Line = tuple[str, str]
Curves = tuple[str, Mapping[str, Result]]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of `launch.sweep`'s table: one number of each arm.

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
        """Why it does not apply to the stage; "" if it does."""

    def measure(self, e: Evaluation) -> dict[str, Any]:
        """The result, as JSON can hold it: None for a number that is not finite."""

    def lines(self, found: Result) -> Iterator[Line]:
        """(label, text) of each line of the printed table, from a result."""


def modules() -> dict[str, Measure]:
    """{name: measure} in the order of the report."""
    load = lambda name: importlib.import_module(f"{measures.__name__}.{name}")
    found = {name: load(name) for name in measures.NAMES}
    return dict(sorted(found.items(), key=lambda item: item[1].ORDER))


def check_known(names: Iterable[str]) -> None:
    """Raises ValueError for a name that is no measure."""
    known = modules()
    for name in names:
        if name not in known:
            raise ValueError(f"--measures {name} is unknown; there are {', '.join(known)}")


def choose(names: list[str], stage: Stage, settings: Settings) -> dict[str, Measure]:
    """The measures to run: those named, or all that apply if none is.

    Raises ValueError for one that is unknown or does not apply.
    """
    if settings.lowres_from and not stage.lowres_size:
        raise ValueError(
            f"--lowres_from is for super-resolution stages; {stage.name} is a base stage"
        )
    check_known(names)
    reasons = {name: found.excluded(stage, settings) for name, found in modules().items()}
    for name in names:
        if reasons[name]:
            raise ValueError(f"--measures {name} does not apply: {reasons[name]}")
    return {
        name: found
        for name, found in modules().items()
        if not reasons[name] and (not names or name in names)
    }


def base_stage(stage: Stage) -> str:
    """Why a measure of super-resolution does not apply; "" if it does."""
    return "" if stage.lowres_size else f"{stage.name} is a base stage"


def columns() -> list[Column]:
    """The columns of all measures, each with its whole place in evaluation.json."""
    return [
        dataclasses.replace(column, place=f"{name}.{column.place}")
        for name, found in modules().items()
        for column in found.COLUMNS
    ]


def row_values(chosen: Mapping[str, Measure], e: Evaluation) -> dict[str, np.ndarray]:
    """{place of a mean in evaluation.json: the values of the rows it is the mean of}."""
    return {
        f"{name}.{place}": values
        for name, found in chosen.items()
        if hasattr(found, "row_values")
        for place, values in found.row_values(e).items()
    }


def lines(result: Result) -> list[Line]:
    """The lines of the printed table for {name: result of that measure}."""
    known = modules()
    return [line for name, found in result.items() for line in known[name].lines(found)]


def curves(result: Result) -> list[Curves]:
    """The panels of loss.png for {name: result of that measure}."""
    known = modules()
    drawn = [(known[name], found) for name, found in result.items()]
    return [panel for one, found in drawn if hasattr(one, "curves") for panel in one.curves(found)]


def write(
    chosen: Mapping[str, Measure], e: Evaluation, output: Path, origin: Mapping[str, str]
) -> None:
    """Writes the files that measures have of their own to the directory `output`."""
    for found in chosen.values():
        if hasattr(found, "write"):
            found.write(e, output, origin)
