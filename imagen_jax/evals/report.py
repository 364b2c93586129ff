"""An evaluation as text and curves: numbers with their errors, a table of lines, a plot."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


def table(lines: Iterable[tuple[str, str]]) -> str:
    """Formats (label, text) lines with aligned texts."""
    lines = list(lines)
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def mean(result: Result) -> str:
    """A mean +- one standard error."""
    return f"{_value(result['mean'])} +- {_value(result['se'])}"


def difference(result: Result) -> str:
    """A paired difference +- one standard error, and its size in standard errors."""
    ratio = result["ratio"]
    return mean(result) + ("" if ratio is None else f" ({ratio:.1f} standard errors)")


def proportions(result: Result) -> str:
    """A result's "top1" and "top5" in percent with 95 % intervals."""
    percent = lambda p: f"{100 * p['rate']:.1f} % [{100 * p['low']:.1f}, {100 * p['high']:.1f}]"
    return ", ".join(f"top-{k} {percent(result[f'top{k}'])}" for k in (1, 5))


def _value(x: float | None) -> str:
    return "undefined" if x is None else f"{x:.4g}"


def plot(panels: Sequence[tuple[str, Mapping[str, Result]]]) -> bytes:
    """The content of a PNG file: a panel per (title, {legend entry: result of `by_bin`}).

    Lines show means by log-SNR with one standard error; bins without a finite mean are skipped.
    """
    from matplotlib.figure import Figure

    from imagen_jax.pictures import figure_png

    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name, curve in lines.items():
            known = [b for b in curve["bins"] if b["mean"] is not None]
            x, y = ([b[key] for b in known] for key in ("logsnr_centre", "mean"))
            error = [b["se"] or 0.0 for b in known]
            axes.errorbar(x, y, yerr=error, label=name, marker="o", markersize=3, capsize=2)
        axes.set(title=title, xlabel="log-SNR")
        axes.legend()
    return figure_png(figure)
