"""Demonstrates the whole system: prepares data, samples, trains, evaluates, writes a report.

    python -m imagen_jax.demo --output demo --prompt "a red apple"

The demo runs each step as a process of its own, with the command that it prints:

1. prepare the embedded images,
2. generate images of the prompts with the embedded cascade,
3. train the same cascade from scratch for --minutes,
4. generate and evaluate images with the new weights, and write demo/report.html.

An interrupted demo continues when the same command is run again.
"""

import base64
import html
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from imagen_jax import cli, output_paths, picture_set, pictures, run_log
from imagen_jax.locks import only_process
from imagen_jax.storage import read_object, write_atomically

STAGES = {"base": "base_64", "sr_1": "sr_256", "sr_2": "sr_1024"}  # cascade stage -> config file
SHARE = {"base": 0.64, "sr_1": 0.2, "sr_2": 0.16}  # of the training time
TEXT_LENGTH = 32
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0"
    " 1em}img{max-width:100%}td,th{padding:.2em .8em;text-align:left}"
)
MEASURES = "retrieval,kid"
SHOWN = {"heldout": 8, "train": 8}  # captions per split in the contact sheet


def define_flags() -> None:
    """Defines the command line, see `cli.run`."""
    flags.DEFINE_string("output", "demo", "directory of all results")
    flags.DEFINE_multi_string("prompt", [], "a prompt to generate an image for; may be repeated")
    flags.DEFINE_float(
        "minutes", 4.0, "training time of all three stages together", lower_bound=0.1
    )
    flags.DEFINE_integer("rows", 96, "captions sampled to evaluate each base model", lower_bound=2)


def main() -> int:
    args = flags.FLAGS
    root, output = Path(__file__).parent.parent, Path(args.output)
    if not (root / "configs").is_dir():
        raise ValueError(f"{root} has no configs/: run the demo from a checkout of the project")
    output_paths.check_directory("output", str(output))
    prompts = cli.check_prompts(args.prompt)
    output_paths.make_directory("output", str(output))
    with only_process(output, "running the demo in"):
        return demonstrate(root, output, prompts, args.minutes, args.rows)


def demonstrate(root: Path, output: Path, prompts: Sequence[str], minutes: float, rows: int) -> int:
    """Runs all steps. root: the checkout. The other arguments are the flags."""
    started = time.monotonic()
    data = output / "data"
    if not (data / "manifest.json").exists():
        run_command(
            "prepare_data",
            "--source",
            "emoji",
            "--output",
            data,
            "--encoder",
            "t5_tiny",
            "--max_length",
            TEXT_LENGTH,
        )
    prompts = write_prompts(data, output, prompts)
    cascade = f"--config={root / 'configs' / 'cascade.py'}:demo"
    sample(cascade, output / "prompts.txt", output / "embedded")
    announce(
        f"first pictures after {time.monotonic() - started:.0f} s:"
        f" {output / 'embedded' / 'sheet_0000.png'}"
    )
    train_stages(root, data, output, minutes)
    fresh = [f"--config.{stage}.checkpoint={output / stage}" for stage in STAGES]
    sample(cascade, output / "prompts.txt", output / "fresh", *fresh)
    for name, checkpoint in (("embedded", "embedded:base_16"), ("fresh", output / "base")):
        options = ("--rows", rows, "--measures", MEASURES)
        to = output / f"evaluate_{name}"
        run_command(
            "evaluate", "--checkpoint", checkpoint, "--data", data, "--output", to, *options
        )
    report = write_report(output, prompts, time.monotonic() - started)
    announce(f"done after {(time.monotonic() - started) / 60:.1f} minutes: open {report}")
    return 0


def train_stages(root: Path, data: Path, output: Path, minutes: float) -> None:
    """Trains each stage that is not trained yet, for its share of `minutes`."""
    for stage, name in STAGES.items():
        trained = output / f"{stage}.trained"
        if trained.exists():
            announce(
                f"{stage} is already trained; delete {output / stage} and {trained} to train it"
                " again"
            )
            continue
        config = f"--config={root / 'configs' / name}.py:demo"
        budget = f"{minutes * SHARE[stage]:.4f}"
        options = ("--workdir", output / stage, "--minutes", budget)
        run_command("train", config, f"--config.data.path={data}", *options)
        trained.touch()


def announce(text: str) -> None:
    print(f"== {text}", flush=True)


def run_command(name: str, *arguments: object) -> None:
    """Runs another command and shows its output. If it fails, the demo exits with its code."""
    command = [sys.executable, "-m", f"imagen_jax.{name}", *map(str, arguments)]
    announce(" ".join(["python", *command[1:]]))
    code = cli.call(command)
    if code:
        message = f"{name} failed with exit code {code}; run the demo again to continue here"
        raise SystemExit(cli.fail(message, max(code, 1)))  # negative: ended by a signal


def sample(cascade: str, prompts: Path, output: Path, *options: str) -> None:
    """Samples the prompts, after deleting the pictures of an earlier call from the directory.

    The report finds a prompt's pictures by their number.
    """
    picture_set.remove_all(output)
    run_command("sample", cascade, *options, "--prompts", prompts, "--output", output)


def write_prompts(data: Path, output: Path, own: Sequence[str]) -> list[str]:
    """The user's prompts, then evenly spaced held-out and training captions.

    Also writes them to prompts.txt.
    """
    from imagen_jax.data.records import open_once

    prepared = open_once(data)
    captions, prompts = prepared.captions(), list(own)
    for split, count in SHOWN.items():
        images, total = prepared.images(split), prepared.num_images(split)
        prompts += [
            captions[images[(2 * i + 1) * total // (2 * count)].caption_ids[0]].text
            for i in range(count)
        ]
    (output / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return prompts


def write_report(output: Path, prompts: Sequence[str], seconds: float) -> Path:
    """Writes report.html with the contact sheet of both cascades and the loss curves."""
    sheet = cascade_sheet(
        prompts,
        {"embedded": output / "embedded", "fresh": output / "fresh"},
        output / "contact_sheet.png",
    )
    curves = loss_curves({stage: output / stage for stage in STAGES}, output / "loss_curves.png")
    measured = {
        name: read_object(output / f"evaluate_{name}" / "evaluation.json", {"retrieval": dict})
        for name in ("embedded", "fresh")
    }
    return write_html(
        output / "report.html",
        prompts,
        sheet,
        curves,
        measured,
        {s: output / s for s in STAGES},
        seconds,
    )


def cascade_sheet(prompts: Sequence[str], cascades: Mapping[str, Path], path: Path) -> Path:
    """Writes a contact sheet with one row per prompt and all stages of all cascades.

    cascades: name -> the --output directory of `sample`.
    """
    rows, headings = [], []
    for i in range(len(prompts)):
        row, headings = [], []
        for name, directory in cascades.items():
            files = sorted(
                directory.glob(f"{i:04d}_*.png"), key=lambda file: Image.open(file).size[0]
            )
            images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
            row += images
            headings += [f"{name} {image.shape[0]}" for image in images]
        rows.append(row)
    return pictures.write_png(path, pictures.contact_sheet(prompts, rows, headings, 160))


def loss_curves(workdirs: Mapping[str, Path], path: Path) -> Path:
    """Plots the training loss of each stage against its steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(workdirs), 3), layout="constrained")
    axes = figure.subplots(1, len(workdirs), squeeze=False)[0]
    for axis, (name, workdir) in zip(axes, workdirs.items()):
        rows = run_log.read_metrics(workdir)
        axis.set(title=name, xlabel="step", ylabel="loss", yscale="log" if rows else "linear")
        if rows:
            axis.plot(
                [row["step"] for row in rows],
                [row["loss"] for row in rows],
                linewidth=1,
                marker="." if len(rows) == 1 else "",
            )
        else:
            axis.text(
                0.5,
                0.5,
                "ended before the\nfirst logged step",
                ha="center",
                va="center",
                transform=axis.transAxes,
            )
            axis.set(xticks=[], yticks=[])
        axis.grid(alpha=0.3)
    write_atomically(path, pictures.figure_png(figure))
    return path


def write_html(
    path: Path,
    prompts: Sequence[str],
    sheet: Path,
    curves: Path,
    measured: Mapping[str, Mapping[str, Any]],
    workdirs: Mapping[str, Path],
    seconds: float,
) -> Path:
    """Writes the report as one file without links to other files."""
    parts = [
        (
            f"<h1>imagen_jax demo</h1><p>{len(prompts)} prompts, {seconds / 60:.1f} minutes in"
            " all.</p>"
        ),
        (
            "<h2>Pictures</h2><p>Left: the embedded weights. Right: the weights trained in this"
            " run. Small images are enlarged.</p>"
        ),
        embedded_image(sheet, "contact sheet"),
        "<h2>Does the picture belong to its caption?</h2>",
        (
            "<p>Share of sampled base images whose captioned image is among the nearest of all"
            " images, with a 95 % interval in brackets.</p>"
        ),
        retrieval_table(measured),
        "<h2>Do the pictures look like the real ones?</h2>",
        (
            "<p>KID, a distance between the base images and real images of the same split by"
            " features of a pretrained classifier, with one standard error: 0 for images that"
            " cannot be told apart from real ones, smaller is better.</p>"
        ),
        kid_table(measured),
        "<h2>Training</h2>",
        training_table(workdirs),
        embedded_image(curves, "loss curves"),
    ]
    page = (
        f"<!doctype html><meta charset=utf-8><title>imagen_jax demo</title><style>{STYLE}</style>"
        + "\n".join(parts)
    )
    write_atomically(path, page.encode())
    return path


def embedded_image(path: Path, title: str) -> str:
    """An <img> element that contains the file."""
    return (
        f'<img alt="{html.escape(title)}"'
        f' src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table with escaped cells."""
    line = lambda tag, cells: (
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    )
    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def training_table(workdirs: Mapping[str, Path]) -> str:
    """A table of the steps, loss and speed of each stage, from its metrics."""
    rows = []
    for name, workdir in workdirs.items():
        metrics = run_log.read_metrics(workdir)
        if not metrics:
            rows.append([name, "none logged", "-", "-", "-"])
        else:
            speed = np.median(
                [row["time/images_per_s"] for row in metrics if "time/images_per_s" in row]
                or [np.nan]
            )
            rows.append(
                [
                    name,
                    f"{metrics[-1]['step']:,}",
                    f"{metrics[0]['loss']:.4f}",
                    f"{metrics[-1]['loss']:.4f}",
                    f"{speed:.0f}",
                ]
            )
    return table(["stage", "steps", "first loss", "last loss", "images/s"], rows)


def retrieval_table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of top-1 and top-5 retrieval by weights, split and kind of caption."""
    rows = []
    for name, evaluation in measured.items():
        for split, kinds in evaluation["retrieval"].items():
            for kind, result in kinds.items():
                cell = lambda top: (
                    f"{100 * result[top]['rate']:.0f} % [{100 * result[top]['low']:.0f},"
                    f" {100 * result[top]['high']:.0f}]"
                )
                rows.append([name, split, kind, str(result["n"]), cell("top1"), cell("top5")])
    return table(
        ["weights", "captions of", "caption given", "n", "nearest", "among 5 nearest"], rows
    )


def kid_table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of KID by weights and split, or the reason why there is none."""
    rows = []
    for name, evaluation in measured.items():
        if "kid" not in evaluation:
            reason = evaluation["provenance"]["left_out"]["kid"]
            return f"<p>Not measured: {html.escape(reason)}.</p>"
        for split in ("heldout", "train"):
            if (score := evaluation["kid"].get(split)) is not None:
                value = f"{score['mean']:.4f} ± {score['se']:.4f}"
                rows.append([name, split, str(score["n"]), str(score["n_reference"]), value])
    return table(["weights", "captions of", "n", "real images", "KID"], rows)


if __name__ == "__main__":
    cli.run(define_flags, main)
