r"""Measures how many images per second and core are read, beside PyTorch's DataLoader.

    python -m tools.reader_speed DATA --make
    python -m tools.reader_speed DATA --output speed.json

DATA has any of the directories that --make writes (see tools/reading/fixture.py), with your own
data or with synthetic photographs: tars, parquet, prepared, and tars_N, prepared_N with images that
are stored with N pixels. The latter are read at N pixels only.

Every reader decodes with the same function, has the same number of worker processes and is pinned
to the same cores. Rounds alternate between the readers; a number is the median of the rounds, with
the lowest and the highest. "times DataLoader" compares with the DataLoader on tars, exactly
decoded, in the same round. CPU time is that of all processes of a reader; it varies less than the
speed if other programs run. The first batches are not counted.

The DataLoader needs the extra `bench` (torch, webdataset); without it its rows are left out.
Prepared records come with text features, as in training; other readers have none.
"""

import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from imagen_jax import cli, output_paths
from imagen_jax.run_log import Progress
from imagen_jax.storage import write_json

log = logging.getLogger("imagen_jax.reader_speed")
SIZES = (64, 256, 1024)
DECODES = ("exact", "draft")
BASELINE = "DataLoader"
OPTIONAL = ("torch", "webdataset")
START_S = 120.0  # for the imports and the first batch of a measurement
Row = dict[str, Any]  # fields of a Reading, and the medians of its results


def define_flags() -> None:
    """The flags of `python -m tools.reader_speed`."""
    flags.DEFINE_bool("make", False, "write synthetic data to DATA, which must be empty or absent")
    flags.DEFINE_integer("images", 96, "images of --make", lower_bound=1)
    flags.DEFINE_integer("side", 1024, "shorter side of the images of --make", lower_bound=1)
    flags.DEFINE_integer("text_dim", 4096, "width of the features of --make", lower_bound=1)
    flags.DEFINE_list("sizes", [str(size) for size in SIZES], "sizes in pixels to read")
    flags.DEFINE_integer("rounds", 5, "measurements of each reader", lower_bound=1)
    flags.DEFINE_float("seconds", 3.0, "seconds of a measurement", lower_bound=0)
    flags.DEFINE_integer("cores", 1, "cores of each reader", lower_bound=1)
    flags.DEFINE_integer("workers", 0, "worker processes; 0: none", lower_bound=0)
    flags.DEFINE_integer("batch_size", 16, "images per batch", lower_bound=1)
    flags.DEFINE_string("output", "", "JSON file for all numbers")


def main(arguments: Sequence[str]) -> int:
    """Makes data or measures; the exit code."""
    args = flags.FLAGS
    cli.log_to_stderr()
    if len(arguments) != 1:
        raise ValueError(f"{len(arguments)} directories are given; give one: DATA")
    data, sizes = Path(arguments[0]), _sizes(args.sizes)
    output_paths.check_directory("make" if args.make else "output", str(data))
    if args.make:
        from tools.reading import fixture

        stored = [size for size in sizes if size < args.side]
        fixture.make(data, args.images, args.side, stored, args.text_dim)
        return 0
    output_paths.check_file("output", args.output)
    if args.cores > (available := len(os.sched_getaffinity(0))):
        raise ValueError(f"--cores {args.cores}: only {available} are available")
    readings = plan(data, sizes, args.batch_size, args.workers, baseline_available())
    rows = measured(readings, args.rounds, args.seconds, args.cores)
    print(f"cores: {args.cores}, worker processes: {args.workers}")
    print(table(rows))
    if args.output:
        write_json(Path(args.output), rows)
    return 0


def _sizes(texts: Sequence[str]) -> list[int]:
    if not texts or not all(text.isascii() and text.isdigit() and int(text) for text in texts):
        raise ValueError(f"--sizes {','.join(texts)}: give whole numbers above 0, such as 64,256")
    return [int(text) for text in texts]


def baseline_available() -> bool:
    """Whether the DataLoader can be measured; logs a line if it cannot."""
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    if missing:
        log.warning(
            "%s: not installed, so %s is left out; pip install -e '.[bench]' installs it",
            " and ".join(missing),
            BASELINE,
        )
    return not missing


def plan(
    data: Path, sizes: Sequence[int], batch_size: int, workers: int, baseline: bool
) -> list[Row]:
    """The readings that the directories below `data` allow, as fields of `readers.Reading`.

    Raises ValueError if there are none.
    """
    common = {"config": "", "batch_size": batch_size, "workers": workers}
    readers = [("tar", "tars"), ("parquet", "parquet"), ("prepared", "prepared")]
    loader = [(BASELINE, "tars")] * baseline
    readings: list[Row] = []
    add = lambda reader, folder, size, decode, config="": readings.append(
        {**common, "reader": reader, "path": str(data / folder), "size": size, "decode": decode}
        | {"config": config}
    )
    for size in sizes:
        for reader, folder in readers + loader:
            for decode in DECODES:
                add(reader, folder, size, decode)
        for reader, folder in [("prepared", "prepared")] + loader:
            add(reader, f"{folder}_{size}", size, "exact")
    for size, config in zip(SIZES, ("base_64", "sr_256", "sr_1024")):
        if size in sizes:
            for decode in DECODES:
                add("prepared", "prepared", size, decode, config)
            add("prepared", f"prepared_{size}", size, "exact", config)
    readings = [reading for reading in readings if Path(reading["path"]).is_dir()]
    if not readings:
        raise ValueError(
            f"{data} has none of the folders prepared, tars and parquet to read: give a new"
            " directory with --make"
        )
    return readings


def measured(readings: Sequence[Row], rounds: int, seconds: float, cores: int) -> list[Row]:
    """The readings with their results; rounds alternate between the readings."""
    results: list[list[Mapping[str, float]]] = [[] for _ in readings]
    with Progress("measurements", rounds * len(readings)) as progress:
        for turn in range(rounds):
            for i, reading in enumerate(readings):
                results[i].append(_measure(reading, seconds, cores))
                progress.update(turn * len(readings) + i + 1)
    rows = []
    for reading, found in zip(readings, results):
        speeds = [result["images_per_s"] for result in found]
        median = lambda name: statistics.median(result[name] for result in found)
        row = {name: median(name) for name in found[0]}
        row |= {"lowest": min(speeds), "highest": max(speeds), "all": speeds}
        rows.append({**reading, "path": Path(reading["path"]).name, **row})
    return [
        row | {"ratio": _ratio(row, rows), "cpu_ratio": _ratio(row, rows, True)} for row in rows
    ]


def _measure(reading: Row, seconds: float, cores: int) -> Mapping[str, float]:
    """One measurement, in a process of its own. Raises ValueError if it fails."""
    command = [sys.executable, "-m", "tools.reading.measure"]
    command += [json.dumps(reading), str(seconds), str(cores)]
    fault, limit = "", START_S + 10 * seconds
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        if done.returncode:
            fault = (done.stderr.strip() or "no message").splitlines()[-1]
    except subprocess.TimeoutExpired:
        fault = f"no result within {limit:g} s"
    if fault:
        raise ValueError(
            f"{Path(reading['path']).name} cannot be read at {reading['size']}: {fault}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _ratio(row: Row, rows: Sequence[Row], cpu: bool = False) -> float | None:
    """Speed relative to the DataLoader on tars at this size, exactly decoded; None without it.

    The median of the ratios of the rounds; cpu: the ratio of the CPU times.
    """
    wanted = {"reader": BASELINE, "path": "tars", "size": row["size"], "decode": "exact"}
    for other in rows:
        if wanted.items() <= other.items():
            if cpu:
                return other["cpu_ms"] / row["cpu_ms"]
            return statistics.median(a / b for a, b in zip(row["all"], other["all"]))
    return None


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| pixels | reader | data | decode | images/s per core | lowest to highest"
        " | times DataLoader | CPU ms per image | times DataLoader, by CPU time | first batch, s |",
        "|" + "---|" * 10,
    ]
    factor = lambda value: "" if value is None else f"{value:.2f}"
    for row in sorted(rows, key=lambda row: (bool(row["config"]), row["size"])):
        reader = f"{row['reader']}, {row['config']}" if row["config"] else row["reader"]
        cells = [row["size"], reader, row["path"], row["decode"]]
        cells += [f"{row['images_per_s']:.1f}", f"{row['lowest']:.1f} to {row['highest']:.1f}"]
        cells += [factor(row["ratio"]), f"{row['cpu_ms']:.2f}", factor(row["cpu_ratio"])]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['first_batch_s']:.1f}"])) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(define_flags, main, positional=True)
