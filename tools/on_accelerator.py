r"""Checks and measures the package on one GPU, within nine minutes, in one command.

    python -m tools.on_accelerator --output DIR

Parts, in order of value: `correct` (tests in fp32, bf16 against fp32, the sampler against a CPU's),
`train_speed` (images/s, MFU and memory of the train steps; kernels; trials of compiler flags),
`sampling` (the cascade at the paper's size), `side_by_side` (a PyTorch U-Net of DeepFloyd IF-I-M's
shape against the same here), `long_run` (a training killed, continued and traced; its ledger of
time) and `pictures` (the demo cascade, trained and sampled). Each runs in processes of its own with
a time limit; one that fails, hangs or runs out of memory is reported and the next ones run. DIR
gets at most eight files: results.json, table.md (rows for BENCHMARKS.md) and log.txt, all three
written as results come; training.jsonl, base.safetensors, sr_1.safetensors, sr_2.safetensors and
pictures.png from `pictures`.

A machine with one H100 and no network has JAX, Flax, Optax, Orbax, PyTorch and transformers. The
other packages come as wheels. Fetch them where there is a network, into an ignored directory of the
checkout:

    python -m tools.on_accelerator --wheels .whl

Copy the checkout with that directory to the machine and run there, with 570 seconds allowed:

    python3 -m tools.on_accelerator --wheels .whl --commit COMMIT --output $OUT

A second call can take the parts or networks that the first had no time for:

    python3 -m tools.on_accelerator --wheels .whl --commit COMMIT --output $OUT --minutes 4 \
        --parts train_speed --models base_2b,sr_1024 --budget train_speed=230

`--tiny` runs every part at a tiny size on a CPU.
"""

import argparse
import datetime
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.accelerator import wheels
from tools.accelerator.parts import MODELS, SECONDS, TRIALS, Parts, named
from tools.accelerator.results import Results
from tools.accelerator.running import ROOT, Session

RESERVE = 8.0  # seconds of the whole that stay for ending processes


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 if every part was attempted, whatever came of it."""
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    started = time.monotonic()
    if not args.output:
        size = wheels.download(Path(args.wheels))
        print(f"{len(list(Path(args.wheels).glob('*.whl')))} wheels, {size / 2**20:.1f} MiB")
        return 0
    about = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": args.commit or commit(),
        "command": shlex.join(["python", "-m", "tools.on_accelerator", *argv]),
        "python": platform.python_version(),
        "tiny": args.tiny,
    }
    results = Results(Path(args.output), about)
    with tempfile.TemporaryDirectory(prefix="on_accelerator_") as directory:
        work = Path(directory)
        if args.wheels:
            results.about["installed"] = [
                wheel.name for wheel in wheels.install(Path(args.wheels), work / "site")
            ]
        end = started + 60 * args.minutes - RESERVE
        session = Session(results, work, end, environment(work, args.tiny), args.tiny)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            run(session, args)
        finally:
            session.stop_all()
            results.about["minutes"] = round((time.monotonic() - started) / 60, 2)
            results.write()
    print((results.output / "table.md").read_text(encoding="utf-8"))
    return 0


def run(session: Session, args: argparse.Namespace) -> None:
    """The selected parts in order; an error of a part's own bookkeeping costs that part."""
    parts = Parts(session, args.models, args.trials)
    parts.prepare(args.parts)
    for name, part in named(parts).items():
        if name not in args.parts:
            continue
        session.begin(args.budget.get(name, SECONDS[name]))
        try:
            part()
        except Exception as error:
            message = f"failed: {type(error).__name__}: {error}"
            session.results.add(name, "the part itself", message, 0.0, [])


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, with lists and budgets read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="directory for results; without it, --wheels downloads")
    parser.add_argument("--wheels", help="directory of wheels to download to, or to install from")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument("--parts", default=",".join(SECONDS), help="parts to run")
    parser.add_argument("--models", default=",".join(MODELS), help="networks to measure")
    parser.add_argument(
        "--budget", default="", help="seconds of parts: train_speed=300,sampling=60"
    )
    parser.add_argument("--trials", type=int, default=len(TRIALS), help="trials of train_speed")
    parser.add_argument("--commit", default="", help="the commit, where git cannot tell it")
    args = parser.parse_args(argv)
    if not args.output and not args.wheels:
        parser.error("--output DIR is needed, or --wheels DIR to download wheels")
    args.parts, args.models = args.parts.split(","), args.models.split(",")
    for flag, given, known in (("parts", args.parts, SECONDS), ("models", args.models, MODELS)):
        if unknown := set(given) - set(known):
            parser.error(f"--{flag}: {', '.join(sorted(unknown))} unknown; use {', '.join(known)}")
    try:
        pairs = (pair.split("=") for pair in args.budget.split(",") if pair)
        args.budget = {part: float(seconds) for part, seconds in pairs}
    except ValueError:
        parser.error(f"--budget {args.budget} is not PART=SECONDS,...")
    return args


def commit() -> str:
    """The checkout's commit, marked where files differ from it; "unknown" without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def environment(work: Path, tiny: bool) -> dict[str, str]:
    """The variables of every process: where modules, compiled programs and memory come from."""
    paths = [str(work / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(work / "jax")),
    }
    return variables | ({"JAX_PLATFORMS": "cpu"} if tiny else {})


if __name__ == "__main__":
    sys.exit(main())
