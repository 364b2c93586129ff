"""The figure of a grid: image quality against agreement with the text, one mark per point."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from imagen_jax.evals.grid_comparison import RETRIEVAL, Quantity
from imagen_jax.evals.settings_grid import Axis, shown, shown_value
from imagen_jax.pictures import figure_png

COLUMNS = 3  # panels side by side
MARKERS = "osD^vP*X"
MARKER = 3.0  # half the width of a marker in pixels of the layout


@dataclasses.dataclass(frozen=True)
class Label:
    """A text beside a point of a panel."""

    place: Any
    point: tuple[float, float]
    text: str
    color: str


def choose(quantities: Sequence[Quantity]) -> tuple[Quantity, Quantity] | None:
    """(quality, agreement), the two axes of the figure; None if one of them is not there.

    Quality is the first Fréchet distance that every point has, or else the first KID. Agreement is
    the first CLIP score, or else the rate of retrieval among the 5 nearest.
    """

    def first(*names: str) -> Quantity | None:
        for name in names:
            for quantity in quantities:
                if quantity.metric == name and quantity.complete:
                    return quantity
        return None

    quality, agreement = first("fd", "kid"), first("clip_score", "top5")
    return None if quality is None or agreement is None else (quality, agreement)


def axis_label(quantity: Quantity) -> str:
    """The label of an axis, with the network and the meaning of the error bars."""
    if quantity.group == RETRIEVAL:
        return "captioned image among the 5 nearest (%), 95 % interval"
    return f"{quantity.heading} ({quantity.group}), ± 1 standard error"


def error_bars(quantity: Quantity, indices: Sequence[int]) -> Float[np.ndarray, "2 n"]:
    """Lengths below and above each value."""
    bars = []
    for estimate in (quantity.estimates[i] for i in indices):
        se = estimate["se"] or 0.0
        low, high = estimate.get("low", estimate["mean"] - se), estimate.get("high")
        high = estimate["mean"] + se if high is None else high
        bars.append((max(0.0, estimate["mean"] - low), max(0.0, high - estimate["mean"])))
    return np.array(bars).T


def curves(axes: Sequence[Axis]) -> Iterator[tuple[str, str, list[int]]]:
    """(title of the panel, label of the curve, its points in order) of each curve.

    A curve runs along the first axis. The second axis distinguishes curves, the others panels.
    Points are numbered as `settings_grid.points` orders them.
    """
    shape = [len(axis.values) for axis in axes]
    order = np.arange(np.prod(shape)).reshape(shape)
    for rest in itertools.product(*(range(n) for n in shape[2:])):
        title = ", ".join(shown(axis.name, axis.values[i]) for axis, i in zip(axes[2:], rest))
        for j in range(shape[1]) if len(axes) > 1 else (None,):
            label = "" if j is None else shown(axes[1].name, axes[1].values[j])
            middle = () if j is None else (j,)
            yield title, label, order[(slice(None), *middle, *rest)].tolist()


def figure(axes: Sequence[Axis], quality: Quantity, agreement: Quantity) -> bytes:
    """The content of a PNG file."""
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[str, list[int]]]] = {}
    for title, label, indices in curves(axes):
        panels.setdefault(title, []).append((label, indices))
    across = min(COLUMNS, len(panels))
    down = -(-len(panels) // across)
    drawn = Figure(figsize=(max(6.0, 4.4 * across), 0.8 + 3.6 * down), layout="constrained")
    shared: dict[str, Any] = dict(sharex=True, sharey=True, squeeze=False)
    places, points = drawn.subplots(down, across, **shared).flat, []
    for place, (title, lines) in zip(places, panels.items()):
        for number, (label, indices) in enumerate(lines):
            points.append(_curve(place, axes[0], quality, agreement, indices, label, number))
        place.set_title(title, fontsize="medium")
        place.grid(alpha=0.3)
        place.margins(0.08)
    for place in list(drawn.axes)[len(panels) :]:
        place.set_axis_off()
    drawn.supxlabel(axis_label(agreement), fontsize="medium")
    drawn.supylabel(axis_label(quality), fontsize="medium")
    _legend(drawn, f"numbers at the points: {axes[0].name}", 2 * across + 1)
    drawn.draw_without_rendering()  # positions are known from here on
    ends = [label for curve in points for label in (curve[0], curve[-1])]
    middle = [label for curve in points for label in curve[1:-1]]
    write_labels(list(dict.fromkeys([*ends, *middle])))
    return figure_png(drawn)


def _legend(drawn: Any, title: str, columns: int) -> None:
    """The curves above the panels, or the title alone for a single curve."""
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    if labels:
        columns = min(len(labels), columns)
        drawn.legend(handles, labels, loc="outside upper center", ncols=columns, title=title)
    else:
        drawn.suptitle(title, fontsize="medium")


def _curve(
    place: Any,
    along: Axis,
    quality: Quantity,
    agreement: Quantity,
    indices: Sequence[int],
    label: str,
    number: int,
) -> list[Label]:
    """Draws one curve with its error bars; returns the value of the first axis at each point."""
    values: Mapping[str, list[float]] = {
        name: [quantity.estimates[i]["mean"] for i in indices]
        for name, quantity in (("x", agreement), ("y", quality))
    }
    color = f"C{number % 10}"
    place.errorbar(
        values["x"],
        values["y"],
        xerr=error_bars(agreement, indices),
        yerr=error_bars(quality, indices),
        color=color,
        ecolor=(color, 0.35),
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        capsize=2,
        elinewidth=1,
        **({"label": label} if label else {}),
    )
    return [
        Label(place, (x, y), shown_value(value), color)
        for x, y, value in zip(values["x"], values["y"], along.values)
    ]


def write_labels(labels: Sequence[Label]) -> list[Label]:
    """Writes each label beside its point where it covers no marker and no other label.

    A label without such a place is left out. Labels that come first are placed first. Returns those
    that are written.
    """
    from matplotlib.transforms import Bbox

    taken: dict[Any, list[Any]] = {}
    for label in labels:
        x, y = label.place.transData.transform(label.point)
        box = Bbox.from_extents(x - MARKER, y - MARKER, x + MARKER, y + MARKER)
        taken.setdefault(label.place, []).append(box)
    written = []
    for label in labels:
        for right, up in itertools.product((True, False), (True, False)):
            text = label.place.annotate(
                label.text,
                label.point,
                xytext=(4 if right else -4, 3 if up else -3),
                textcoords="offset points",
                ha="left" if right else "right",
                va="bottom" if up else "top",
                color=label.color,
                fontsize="small",
                in_layout=False,
                zorder=10,
            )
            box, others = text.get_window_extent(), taken[label.place]
            inside = all(label.place.bbox.contains(*corner) for corner in (box.min, box.max))
            if inside and not box.count_overlaps(others):
                others.append(box)
                written.append(label)
                break
            text.remove()
    return written
