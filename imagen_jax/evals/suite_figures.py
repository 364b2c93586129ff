"""The figures of an evaluation on a suite: contact sheets, extrapolation, scores by category."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax import picture_set
from imagen_jax.evals import image_metrics
from imagen_jax.object_storage import AnyPath
from imagen_jax.pictures import figure_png
from imagen_jax.stage_sizes import Size
from imagen_jax.storage import remove, write_atomically

Result = Mapping[str, Any]
EXTRAPOLATION, CATEGORIES = "extrapolation.png", "categories.png"


def write(
    result: Result, manifest: AnyPath, sizes: Sequence[Size], output: AnyPath
) -> list[AnyPath]:
    """Writes the figures that a result has into the directory `output`; returns their paths.

    Removes figures of an earlier result that this one has no numbers for.

    result: of `suite_evaluation`. manifest: of its pictures. sizes: image sizes of the stages.
    """
    written = picture_set.write_sheets(manifest, sizes, directory=output)
    metrics = result["metrics"]
    distances = {name: found["fd"] for name, found in metrics.items() if "fd" in found}
    clip = next((name for name, found in metrics.items() if "clip_score" in found), "")
    figures = {}
    if distances:
        figures[EXTRAPOLATION] = extrapolation(distances)
    if result.get("categories"):
        figures[CATEGORIES] = categories(result["categories"], metrics[clip]["clip_score"], clip)
    for name in {EXTRAPOLATION, CATEGORIES} - figures.keys():
        remove(output / name)
    for name, content in figures.items():
        write_atomically(output / name, content)
        written.append(output / name)
    return written


def extrapolation(distances: Mapping[str, Result]) -> bytes:
    """A panel per network: Fréchet distances against 1 / N, and the line to infinitely many.

    distances: {network: result of `frechet.score`}.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(distances), 3.6), layout="constrained")
    panels = figure.subplots(1, len(distances), squeeze=False)[0]
    for axes, (network, result) in zip(panels, distances.items()):
        limit = result["infinity"]
        counts, values = np.array(limit["counts"]), np.array(limit["distances"])
        x = 1000 / counts
        slope = np.polynomial.polynomial.polyfit(x, values, 1)[1]
        ends = np.array([0, x.max()])
        axes.plot(ends, limit["value"] + slope * ends, color="C1", label="least-squares line")
        axes.plot(x, values, "o", color="C0", markersize=4, label="subsets of the pictures")
        axes.errorbar(
            *(1000 / counts[-1], result["value"], result["se"]),
            fmt="s", color="C2", capsize=3, markersize=5,
            label=f"all {counts[-1]:,}: {result['value']:.4g} ± {result['se']:.2g}",
        )  # fmt: skip
        error = limit.get("se")  # none in older results
        axes.errorbar(
            *(0, limit["value"], error or 0.0),
            fmt="D", color="C1", capsize=3, markersize=5, clip_on=False,
            label=f"extrapolated: {limit['value']:.4g}" + (f" ± {error:.2g}" if error else ""),
        )  # fmt: skip
        name = image_metrics.FRECHET_NAMES.get(network, "Fréchet distance")
        axes.set(xlabel="1000 / number of pictures", ylabel=f"{name} ({network})")
        axes.set_xlim(left=0)
        axes.legend(fontsize="small")
    return figure_png(figure)


def categories(scores: Mapping[str, Result], total: Result, network: str) -> bytes:
    """The CLIP score of each category with one standard error, and the mean of all prompts."""
    from matplotlib.figure import Figure

    names = sorted(scores, key=lambda name: scores[name]["mean"])
    figure = Figure(figsize=(6, 1.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    means = [scores[name]["mean"] for name in names]
    errors = [scores[name]["se"] or 0.0 for name in names]
    axes.axvline(total["mean"], color="0.6", linestyle="--", label=f"all: {total['mean']:.4g}")
    axes.errorbar(means, range(len(names)), xerr=errors, fmt="o", capsize=3)
    labels = [f"{name} ({scores[name]['n']})" for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.set(xlabel=f"CLIP score ({network}), ± 1 standard error", ylabel="category (prompts)")
    axes.legend(fontsize="small")
    axes.grid(axis="x", alpha=0.3)
    return figure_png(figure)
