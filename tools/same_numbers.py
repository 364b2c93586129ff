"""Records the results of a checkout to the bit, and compares two records.

    # in a checkout of the old commit
    python tools/same_numbers.py record --output before
    # in the new one, on the same machine
    python tools/same_numbers.py record --output after --begun before
    python tools/same_numbers.py compare before after

A refactoring must not change them. The script uses only the commands' command lines, so it runs in
checkouts of any layout. A record holds:

- the losses and gradient norms of the first 8 steps of base_64:tiny, sr_256:tiny and sr_1024:tiny,
- the pictures of the embedded cascade for two prompts, with their JSON records,
- the evaluation of base_64:tiny, all measures, and the figures of `plan` for base_64:tiny.

With `--begun BEFORE` the new checkout also resumes the workdirs that BEFORE trained to step 4, and
samples BEFORE's pictures again with `--reproduce`. `compare` fails unless all numbers are equal
(pictures: within 1 of 255), and names each difference.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

STAGES = ("base_64", "sr_256", "sr_1024")
PROMPTS = ("a red apple", "a blue heart")
METRICS = ("loss", "norm/grad", "norm/params", "norm/update")
NOT_MEASURED = ("stage", "step", "provenance")  # of an evaluation.json


def run_command(name: str, *arguments: object) -> None:
    """Runs a command of the checkout in the current directory; CalledProcessError if it fails."""
    command = [sys.executable, "-m", f"imagen_jax.{name}", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def losses(workdir: Path) -> list[dict[str, float]]:
    """Step and metrics of each row of a training's record."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: row[name] for name in ("step", *METRICS)} for row in rows]


def train(stage: str, data: Path, workdir: Path, *options: object) -> list[dict[str, float]]:
    """Trains or resumes a tiny stage; its metrics."""
    config = (f"--config=configs/{stage}.py:tiny", f"--config.data.path={data}")
    run_command("train", *config, "--workdir", workdir, *options)
    return losses(workdir)


def record(output: Path, begun: Path | None, plan: bool) -> None:
    """Writes everything to `output`; see the head of this file."""
    output.mkdir(parents=True)
    data = output / "data"
    encoder = ("--encoder", "t5_tiny", "--max_length", 32)
    run_command("prepare_data", "--source", "emoji", "--output", data, *encoder)
    results: dict = {"losses": {}, "resumed": {}}
    for stage in STAGES:
        results["losses"][stage] = train(stage, data, output / stage)
        half = output / f"{stage}_half"
        train(stage, data, half, "--config.train.steps=4")
        if begun:
            copy = output / f"{stage}_begun"
            shutil.copytree(begun / f"{stage}_half", copy)
            results["resumed"][stage] = train(stage, data, copy)
        else:
            results["resumed"][stage] = results["losses"][stage]
    config = ("--config=configs/cascade.py:demo", "--stages=base,sr_1", "--seed", 3)
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    run_command("sample", *config, *prompts, "--output", output / "pictures")
    for picture in sorted(begun.glob("pictures/*.json")) if begun else ():
        run_command("sample", "--reproduce", picture, "--output", output / "reproduced")
    for stage in STAGES[:2]:
        evaluation = output / f"evaluation_{stage}"
        numbers = ("--rows", 8, "--samples", 4, "--gallery", 64, "--bins", 3)
        run_command(
            "evaluate",
            "--checkpoint",
            output / stage,
            "--data",
            data,
            "--output",
            evaluation,
            *numbers,
        )
        result = json.loads((evaluation / "evaluation.json").read_text())
        results[f"evaluation_{stage}"] = {
            name: value for name, value in result.items() if name not in NOT_MEASURED
        }
    if plan:
        plans = output / "plan"
        small = (
            "--config=configs/base_64.py:tiny",
            "--config.data.batch_size=64",
            "--topology=v5e:2x2",
        )
        cache = ("--cache", output / "plan_cache")  # nothing that another checkout has compiled
        run_command("plan", *small, "--config.train.sample_every=4", "--output", plans, *cache)
        results["plan"] = json.loads((plans / "plan.json").read_text())
    (output / "numbers.json").write_text(json.dumps(results, indent=1) + "\n")


def differences(a: object, b: object, path: str = "") -> list[str]:
    """One line per value that differs; values that only `b` has are no differences."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}/{key}: missing" for key in a if key not in b]
        shared = [key for key in a if key in b]
        return missing + [
            line for key in shared for line in differences(a[key], b[key], f"{path}/{key}")
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            line for i, pair in enumerate(zip(a, b)) for line in differences(*pair, f"{path}/{i}")
        ]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]


def pictures_differ(a: Path, b: Path) -> list[str]:
    """One line per picture of `a` that is missing in `b` or differs by more than 1 of 255."""
    lines = []
    for path in sorted(a.glob("*.png")):
        other = b / path.name
        if path.name.startswith("sheet"):
            continue
        if not other.exists():
            lines.append(f"{other}: missing")
            continue
        pixels = [np.asarray(Image.open(file).convert("RGB"), int) for file in (path, other)]
        if pixels[0].shape != pixels[1].shape or np.abs(pixels[0] - pixels[1]).max() > 1:
            lines.append(f"{other}: differs from {path}")
    return lines


def compare(before: Path, after: Path) -> int:
    """Prints the differences; the exit code."""
    numbers = [
        json.loads((directory / "numbers.json").read_text()) for directory in (before, after)
    ]
    lines = differences(*numbers) + pictures_differ(before / "pictures", after / "pictures")
    if (after / "reproduced").is_dir():
        lines += pictures_differ(before / "pictures", after / "reproduced")
    steps = sum(len(rows) for rows in numbers[0]["losses"].values())
    print(
        "\n".join(lines) or f"equal: {steps} steps, their resumes, pictures, evaluations and plan"
    )
    return 1 if lines else 0


def main() -> int:
    """Runs the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("--output", type=Path, required=True)
    recorder.add_argument("--begun", type=Path, help="a record of the old commit to go on from")
    recorder.add_argument("--noplan", action="store_true", help="without the TPU compiler")
    comparer = commands.add_parser("compare")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        return compare(args.before, args.after)
    record(args.output, args.begun, not args.noplan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
