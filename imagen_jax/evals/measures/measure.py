"""The measure interface, and the discovery of measures.

Each module of this folder is one measure, named like its module: `--measures loss` runs `loss.py`.
All processes of a run call a measure, with the same results; only process 0 calls `write`.
`distributed/host_work.py` shares arithmetic on rows. A module defines the members of `Measure` and,
optionally,

    too_few(stage, data)       {part: reason why it is left out, such as too few rows}; part is a
                               suffix of the measure's name, such as ", shuffled"; "" is the whole
                               measure
    row_values(e)              {result key of a mean: its per-row values [n]}, saved in rows.npz so
                               that two evaluations can be compared row by row
    curves(result)             (title, {legend entry: result of `by_bin`}) per panel of loss.png
    write(e, output, origin)   writes additional files; `origin` identifies weights and sampling

Result keys are dotted paths within the measure's own result. To add a measure, add one file here;
no other file lists it.
"""

import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from imagen_jax.evals import measures
from imagen_jax.evals.evaluation import Evaluation
from imagen_jax.evals.rows import Data, Settings
from imagen_jax.object_storage import AnyPath
from imagen_jax.stage import Stage

Result = Mapping[str, Any]
Line = tuple[str, str]
# {key of a mean: its values for the n rows of a split}
RowValues = dict[str, Float[np.ndarray, " n"] | Bool[np.ndarray, " n"]]
Curves = tuple[str, Mapping[str, Result]]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table of `launch.sweep`: one number per arm.

    name: the column title.
    path: dotted path of the number in the result, such as "SPLIT.overall.mean". SPLIT stands for
        heldout, or for train if the data have no held-out images.
    less_is_better: whether smaller numbers are better.
    needs_same: prefixes of config fields. Arms that differ in such a field are not compared in this
        column: ("diffusion.",) requires that arms agree in the whole section.
    default: whether the table shows it if the ablation chooses no columns.
    """

    name: str
    path: str
    less_is_better: bool
    needs_same: tuple[str, ...] = ()
    default: bool = True


@runtime_checkable
class Measure(Protocol):
    """The required members of a measure.

    ORDER: sort key in the report and in the sweep table; the lowest comes first.
    COLUMNS: the columns in a sweep table; () for none.
    """

    ORDER: int
    COLUMNS: tuple[Column, ...]

    def excluded(self, stage: Stage, settings: Settings) -> str:
        """The reason why it does not apply to the stage or the settings; "" if it applies."""

    def measure(self, e: Evaluation) -> dict[str, Any]:
        """The result as JSON-compatible values; None replaces numbers that are not finite."""

    def lines(self, result: Result) -> Iterator[Line]:
        """Yields (label, text) for each line of the printed table."""


def modules() -> dict[str, Measure]:
    """{name: measure}, sorted by ORDER."""
    load = lambda name: importlib.import_module(f"{measures.__name__}.{name}")
    loaded = {name: load(name) for name in measures.NAMES}
    return dict(sorted(loaded.items(), key=lambda item: item[1].ORDER))


def check_known(names: Iterable[str]) -> None:
    """Raises ValueError for an unknown measure."""
    for name in names:
        if name not in measures.NAMES:
            raise ValueError(f"--measures {name} is unknown; use {', '.join(measures.NAMES)}")


def choose(names: list[str], stage: Stage, settings: Settings) -> dict[str, Measure]:
    """The named measures, or all that apply to the stage if `names` is empty.

    Raises ValueError for a measure that is unknown or does not apply, and for `lowres_from` with a
    base stage.
    """
    if settings.lowres_from and not stage.lowres_size:
        raise ValueError(
            f"--lowres_from is for super-resolution stages; {stage.name} is a base stage"
        )
    check_known(names)
    reasons = {name: module.excluded(stage, settings) for name, module in modules().items()}
    for name in names:
        if reasons[name]:
            raise ValueError(f"--measures {name} does not apply: {reasons[name]}")
    return {
        name: module
        for name, module in modules().items()
        if not reasons[name] and (not names or name in names)
    }


def allowed(
    chosen: Mapping[str, Measure], stage: Stage, data: Data
) -> tuple[dict[str, Measure], dict[str, str]]:
    """(measures that are possible, {skipped measure or part of a measure: reason}).

    Reads rows only and computes nothing. Raises ValueError if no measure remains.
    """
    left_out = {
        f"{name}{part}": reason
        for name, module in chosen.items()
        if hasattr(module, "too_few")
        for part, reason in module.too_few(stage, data).items()
    }
    remaining = {name: module for name, module in chosen.items() if name not in left_out}
    if not remaining:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"no measure is possible: {reasons}")
    return remaining, left_out


def base_stage(stage: Stage) -> str:
    """The reason why a super-resolution measure does not apply; "" if it applies."""
    return "" if stage.lowres_size else f"{stage.name} is a base stage"


def columns(names: Sequence[str] = ()) -> list[Column]:
    """The columns of a sweep table, each with its full key in evaluation.json.

    names: titles of columns, or names of measures for all columns of a measure, in the order of
    the table. Without names: all columns that are shown by default.

    Raises ValueError for an unknown name.
    """
    known = [
        dataclasses.replace(column, path=f"{name}.{column.path}")
        for name, module in modules().items()
        for column in module.COLUMNS
    ]
    if not names:
        return [column for column in known if column.default]
    chosen: dict[str, Column] = {}
    for name in names:
        found = [column for column in known if name in (column.name, measure_of(column))]
        if not found:
            of = ", ".join(dict.fromkeys(map(measure_of, known)))
            titles = ", ".join(repr(column.name) for column in known)
            raise ValueError(f"{name!r} is unknown; use a measure ({of}) or a column ({titles})")
        chosen |= {column.path: column for column in found}
    return list(chosen.values())


def measure_of(column: Column) -> str:
    """The name of the measure of a column from `columns`."""
    return column.path.partition(".")[0]


def row_values(chosen: Mapping[str, Measure], e: Evaluation) -> RowValues:
    """{key of a mean in evaluation.json: its per-row values}."""
    return {
        f"{name}.{path}": values
        for name, module in chosen.items()
        if hasattr(module, "row_values")
        for path, values in module.row_values(e).items()
    }


def lines(results: Mapping[str, Result]) -> list[Line]:
    """The lines of the printed table for {name: result of that measure}."""
    loaded = modules()
    return [line for name, result in results.items() for line in loaded[name].lines(result)]


def curves(results: Mapping[str, Result]) -> list[Curves]:
    """The panels of loss.png for {name: result of that measure}."""
    loaded = modules()
    with_curves = {
        name: result for name, result in results.items() if hasattr(loaded[name], "curves")
    }
    return [panel for name, result in with_curves.items() for panel in loaded[name].curves(result)]


def write(
    chosen: Mapping[str, Measure], e: Evaluation, output: AnyPath, origin: Mapping[str, str]
) -> None:
    """Writes the measures' own files to the directory `output`."""
    for module in chosen.values():
        if hasattr(module, "write"):
            module.write(e, output, origin)
