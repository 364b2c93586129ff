"""The demo's report: a contact sheet, loss curves, and one HTML file that holds both."""

import base64
import html
import io
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from PIL import Image

from imagen_jax import pictures, run_log
from imagen_jax.storage import write_atomically

STYLE = "body{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{max-width:100%}td,th{padding:.2em .8em;text-align:left}"


def cascade_sheet(prompts: Sequence[str], cascades: Mapping[str, Path], path: Path) -> Path:
    """A row a prompt: the images of every stage of every cascade, as `sample` wrote them into its directories."""
    rows, headings = [], []
    for i in range(len(prompts)):
        row, headings = [], []
        for name, directory in cascades.items():
            files = sorted(directory.glob(f"{i:04d}_*.png"), key=lambda file: Image.open(file).size[0])
            images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
            row += images
            headings += [f"{name} {image.shape[0]}" for image in images]
        rows.append(row)
    return pictures.write_png(path, pictures.contact_sheet(prompts, rows, headings, 160))


def loss_curves(workdirs: Mapping[str, Path], path: Path) -> Path:
    """Training loss of each stage against its steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(workdirs), 3), layout="constrained")
    axes = figure.subplots(1, len(workdirs), squeeze=False)[0]
    for axis, (name, workdir) in zip(axes, workdirs.items()):
        rows = run_log.read_metrics(workdir)
        axis.set(title=name, xlabel="step", ylabel="loss", yscale="log" if rows else "linear")
        if rows:
            axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1, marker="." if len(rows) == 1 else "")
        else:
            axis.text(0.5, 0.5, "it ended before\nthe first logged step", ha="center", va="center", transform=axis.transAxes)
            axis.set(xticks=[], yticks=[])
        axis.grid(alpha=0.3)
    write_atomically(path, png(figure))
    return path


def png(figure: Any) -> bytes:
    """A matplotlib figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def write_html(
    path: Path,
    prompts: Sequence[str],
    sheet: Path,
    curves: Path,
    measured: Mapping[str, Mapping[str, Any]],
    workdirs: Mapping[str, Path],
    seconds: float,
) -> Path:
    """One file without links to others."""
    parts = [
        f"<h1>imagen_jax demo</h1><p>{len(prompts)} prompts, {seconds / 60:.1f} minutes in all.</p>",
        "<h2>Pictures</h2><p>Left the weights that ship with the package, right those trained in this run; small sizes enlarged.</p>",
        picture(sheet, "contact sheet"),
        "<h2>Does the picture belong to its caption?</h2>",
        "<p>Share of drawn base images whose captioned image is among the nearest of all images, 95 % interval in brackets.</p>",
        retrieval_table(measured),
        "<h2>Training</h2>",
        training_table(workdirs),
        picture(curves, "loss curves"),
    ]
    page = f"<!doctype html><meta charset=utf-8><title>imagen_jax demo</title><style>{STYLE}</style>" + "\n".join(parts)
    write_atomically(path, page.encode())
    return path


def picture(path: Path, title: str) -> str:
    """An <img> with the file's content inside."""
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of escaped cells."""
    line = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def training_table(workdirs: Mapping[str, Path]) -> str:
    """Steps, loss and speed of each stage, from its metrics."""
    rows = []
    for name, workdir in workdirs.items():
        found = run_log.read_metrics(workdir)
        if not found:
            rows.append([name, "none logged", "-", "-", "-"])
        else:
            speed = np.median([row["time/images_per_s"] for row in found if "time/images_per_s" in row] or [np.nan])
            rows.append([name, f"{found[-1]['step']:,}", f"{found[0]['loss']:.4f}", f"{found[-1]['loss']:.4f}", f"{speed:.0f}"])
    return table(["stage", "steps", "first loss", "last loss", "images/s"], rows)


def retrieval_table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Top-1 and top-5 of each weights, split and kind of caption."""
    rows = []
    for name, evaluation in measured.items():
        for split, kinds in evaluation["retrieval"].items():
            for kind, result in kinds.items():
                cell = lambda top: f"{100 * result[top]['rate']:.0f} % [{100 * result[top]['low']:.0f}, {100 * result[top]['high']:.0f}]"
                rows.append([name, split, kind, str(result["n"]), cell("top1"), cell("top5")])
    return table(["weights", "captions of", "caption given", "n", "nearest", "among 5 nearest"], rows)
