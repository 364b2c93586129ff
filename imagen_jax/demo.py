"""The whole system in one command, run as a user would run it: each step is another verb in a process of its own.

    python -m imagen_jax.demo --output demo --prompt "a red apple"

1 prepares the embedded images, 2 draws prompts with the embedded cascade, 3 trains the same cascade from scratch for --minutes,
4 draws and measures with the fresh weights, and writes demo/report.html. The same command again continues where it stopped.
"""

import json
import sys
import time
from pathlib import Path
from typing import Sequence

from absl import flags

from imagen_jax import cli

STAGES = {"base": "base_64", "sr_1": "sr_256", "sr_2": "sr_1024"}  # cascade stage -> config file
SHARE = {"base": 0.64, "sr_1": 0.2, "sr_2": 0.16}  # of the training time
TEXT_LENGTH = 32
SHOWN = {"heldout": 8, "train": 8}  # captions of the contact sheet besides the user's


def define_flags() -> None:
    """The command line, see `cli.run`."""
    flags.DEFINE_string("output", "demo", "directory for everything the demo makes")
    flags.DEFINE_multi_string("prompt", [], "a prompt of your own; may be given several times")
    flags.DEFINE_float("minutes", 7.5, "training time for the three stages together", lower_bound=0.1)
    flags.DEFINE_integer("rows", 96, "captions drawn to measure each base model", lower_bound=2)


def main() -> int:
    args = flags.FLAGS
    root, output = Path(__file__).parent.parent, Path(args.output)
    if not (root / "configs").is_dir():
        raise ValueError(f"{root} has no configs/: run the demo from a checkout of the project")
    cli.check_prompts(args.prompt)
    started = time.monotonic()
    data = output / "data"
    if not (data / "manifest.json").exists():
        verb("prepare_data", "--source", "emoji", "--output", data, "--encoder", "t5_tiny", "--max_length", TEXT_LENGTH)
    prompts = write_prompts(data, output, args.prompt)
    cascade = f"--config={root / 'configs' / 'cascade.py'}:demo"
    draw(cascade, output / "prompts.txt", output / "embedded")
    announce(f"first pictures after {time.monotonic() - started:.0f} s: {output / 'embedded' / 'sheet_0000.png'}")
    for stage, name in STAGES.items():
        trained = output / f"{stage}.trained"
        if trained.exists():
            announce(f"{stage} is trained already; delete {output / stage} and {trained} to train it again")
            continue
        config = f"--config={root / 'configs' / name}.py:demo"
        budget = args.minutes * SHARE[stage]
        verb("train", config, f"--config.data.path={data}", "--workdir", output / stage, "--minutes", f"{budget:.4f}")
        trained.touch()
    fresh = [f"--config.{stage}.checkpoint={output / stage}" for stage in STAGES]
    draw(cascade, output / "prompts.txt", output / "fresh", *fresh)
    for name, checkpoint in (("embedded", "embedded:base_16"), ("fresh", output / "base")):
        verb(
            "evaluate", "--checkpoint", checkpoint, "--data", data, "--output", output / f"evaluate_{name}",
            "--rows", args.rows, "--measures", "retrieval",
        )  # fmt: skip
    report = write_report(output, prompts, time.monotonic() - started)
    announce(f"done after {(time.monotonic() - started) / 60:.1f} minutes: open {report}")
    return 0


def announce(text: str) -> None:
    print(f"== {text}", flush=True)


def verb(name: str, *arguments: object) -> None:
    """Runs another verb, its output shown; ends the demo if it fails."""
    command = [sys.executable, "-m", f"imagen_jax.{name}", *map(str, arguments)]
    announce(" ".join(["python", *command[1:]]))
    code = cli.call(command)
    if code:
        raise ValueError(f"{name} failed with exit code {code}; mend it and run the same command again, it continues")


def draw(cascade: str, prompts: Path, output: Path, *options: str) -> None:
    """Draws the prompts in place of earlier ones: pictures of another call's prompts would get into the report."""
    for left in [*output.glob("[0-9]*_*.png"), *output.glob("[0-9]*_*.json"), *output.glob("sheet_*.png")]:
        left.unlink()
    verb("sample", cascade, *options, "--prompts", prompts, "--output", output)


def write_prompts(data: Path, output: Path, own: Sequence[str]) -> list[str]:
    """The user's prompts, then held-out and training captions evenly spread over the data; also written to prompts.txt."""
    from imagen_jax.data.records import Prepared

    prepared = Prepared(data)
    captions, prompts = prepared.captions(), list(own)
    for split, count in SHOWN.items():
        images, total = prepared.images(split), prepared.num_images(split)
        prompts += [captions[images[(2 * i + 1) * total // (2 * count)].caption_ids[0]].text for i in range(count)]
    (output / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return prompts


def write_report(output: Path, prompts: Sequence[str], seconds: float) -> Path:
    """The contact sheet of both cascades, the loss curves, and report.html with both inside."""
    from imagen_jax import report

    sheet = report.cascade_sheet(prompts, {"embedded": output / "embedded", "fresh": output / "fresh"}, output / "contact_sheet.png")
    curves = report.loss_curves({stage: output / stage for stage in STAGES}, output / "loss_curves.png")
    measured = {name: json.loads((output / f"evaluate_{name}" / "evaluation.json").read_text()) for name in ("embedded", "fresh")}
    return report.write_html(output / "report.html", prompts, sheet, curves, measured, {s: output / s for s in STAGES}, seconds)


if __name__ == "__main__":
    cli.run(define_flags, main)
