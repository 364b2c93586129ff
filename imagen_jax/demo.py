"""The whole system in one command, run as a user would run it: each step is another verb in a process of its own.

    python -m imagen_jax.demo --output demo --prompt "a red apple"

1 prepares the embedded images, 2 draws prompts with the embedded cascade, 3 trains the same cascade from scratch for --minutes,
4 draws and measures with the fresh weights, and writes demo/report.html. The same command again continues where it stopped.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Sequence

from absl import flags

from imagen_jax import cli

OUTPUT = flags.DEFINE_string("output", "demo", "directory for everything the demo makes")
PROMPT = flags.DEFINE_multi_string("prompt", [], "a prompt of your own; may be given several times")
MINUTES = flags.DEFINE_float("minutes", 7.5, "training time for the three stages together", lower_bound=0.0)
ROWS = flags.DEFINE_integer("rows", 96, "captions drawn to measure each base model", lower_bound=2)

STAGES = {"base": "base_64", "sr_1": "sr_256", "sr_2": "sr_1024"}  # cascade stage -> config file
SHARE = {"base": 0.64, "sr_1": 0.2, "sr_2": 0.16}  # of the training time
TEXT_LENGTH = 32
SHOWN = {"heldout": 8, "train": 8}  # captions of the contact sheet besides the user's


def main() -> int:
    root, output = Path(__file__).parent.parent, Path(OUTPUT.value)
    if not (root / "configs").is_dir():
        raise ValueError(f"{root} has no configs/: run the demo from a checkout of the project")
    started = time.monotonic()
    data = output / "data"
    if not (data / "manifest.json").exists():
        verb("prepare_data", "--source", "emoji", "--output", data, "--encoder", "t5_tiny", "--max_length", TEXT_LENGTH)
    prompts = write_prompts(data, output, PROMPT.value)
    cascade = f"--config={root / 'configs' / 'cascade.py'}:demo"
    verb("sample", cascade, "--prompts", output / "prompts.txt", "--output", output / "embedded")
    announce(f"first pictures after {time.monotonic() - started:.0f} s: {output / 'embedded' / 'sheet.png'}")
    for stage, name in STAGES.items():
        trained = output / f"{stage}.trained"
        if trained.exists():
            continue
        config = f"--config={root / 'configs' / name}.py:demo"
        budget = MINUTES.value * SHARE[stage]
        verb("train", config, f"--config.data.path={data}", "--workdir", output / stage, "--minutes", f"{budget:.2f}")
        trained.touch()
    fresh = [f"--config.{stage}.checkpoint={output / stage}" for stage in STAGES]
    verb("sample", cascade, *fresh, "--prompts", output / "prompts.txt", "--output", output / "fresh")
    for name, checkpoint in (("embedded", "embedded:base_16"), ("fresh", output / "base")):
        verb(
            "evaluate", "--checkpoint", checkpoint, "--data", data, "--output", output / f"evaluate_{name}",
            "--rows", ROWS.value, "--measures", "retrieval",
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
    code = subprocess.call(command)
    if code:
        raise ValueError(f"{name} failed with exit code {code}; mend it and run the same command again, it continues")


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
    cli.run(main)
