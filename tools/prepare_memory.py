r"""Measures memory, disk and time of `prepare_data` on synthetic items, and of opening the result.

    python -m tools.prepare_memory --items 100000,1000000 --output /tmp/synthetic --processes 2

An item is a PNG of 8x8 pixels with one caption of about 60 characters. Both are computed from the
item's number, so there is no source on disk. The text encoder is a stand-in that draws features
from a table: the numbers are those of the passes, without a text encoder and with images that
decode at once.

It prints one column for each number of items:

- work files: the largest size of OUTPUT/partial, sampled every second
- memory: the largest resident memory (VmHWM) of this process and of a worker process
- opening: `pipeline.batches` until the first batch is there, in a new process, with files evicted
  from the page cache first; once without and once with the start of Python and the imports

Linux only, because it reads /proc.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import flags
from PIL import Image

from imagen_jax import cli, output_paths
from imagen_jax.data.prepare import passes
from imagen_jax.data.prepare.work_directory import work_directory
from imagen_jax.data.sources.source import SourceItem
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.storage import read_json, write_json

RESULT = "measurements.json"
_SIDE = 8  # pixels
_DIM = 64  # features per token
_SAMPLE_S = 1.0  # between two looks at disk and memory
_BATCHES = (64, 256)
_WORKERS = (0, 2)
_DATA = {"image_size": _SIDE, "lowres_size": 0, "crop_size": 0, "text_length": 32}
_DATA |= {"flip": True, "caption": "random", "cache_mib": 0, "decode": "exact", "mixture": ()}
_DATA |= {"view": "centre", "view_scale": (0.8, 1.0), "buckets": ()}
_DATA |= {"shard_cache_dir": "", "shard_cache_gib": 64.0}
_FIRST_BATCH = """
import json, sys, time
path, size, workers, data = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
from imagen_jax.data import pipeline
start = time.monotonic()
reader = pipeline.batches(data | {"path": path, "batch_size": size, "workers": workers}, 0, 0)
assert len(next(reader)["index"]) == size
print(time.monotonic() - start, flush=True)
reader.close()
del reader
"""


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The flags of `python -m tools.prepare_memory`."""
    flags.DEFINE_list("items", ["100000"], "numbers of items, comma-separated", flag_values=values)
    flags.DEFINE_string(
        "output",
        None,
        f"directory for the prepared data, in ITEMS/, and {RESULT}",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_integer("processes", 2, "worker processes", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "shard_size", 4096, "images or captions per shard", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool(
        "open_only",
        False,
        "measure only the opening, of data that an earlier run left in --output",
        flag_values=values,
    )


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """`count` distinct images of 8x8 pixels with one caption each."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> SourceItem:
        pixels = np.random.default_rng(index).integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        caption = f"synthetic picture number {index} of independent random pixels"
        return SourceItem(f"{index:012d}", buffer.getvalue(), [caption], "train")

    def describe(self) -> dict[str, Any]:
        return {"kind": "synthetic", "items": self.count}

    def notes(self) -> list[dict[str, Any]]:
        return []


class TableEncoder:
    """A stand-in for a text encoder: a token is a word, and its length chooses its features."""

    dim, max_length = _DIM, 32

    def __init__(self):
        table = np.random.default_rng(0).normal(size=(64, _DIM))
        self._table = table.astype(ml_dtypes.bfloat16)
        self.identity = {"name": "table", "weights_sha256": "0", "dtype": "bfloat16"}
        self.identity |= {"max_length": self.max_length, "dim": _DIM}

    def tokenize(self, texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids of each text, and whether it was truncated."""
        rows = [[len(word) % 64 for word in text.split()] for text in texts]
        return [row[: self.max_length] for row in rows], [
            len(row) > self.max_length for row in rows
        ]

    def unknown(self, texts: list[str]) -> list[str]:
        return [""] * len(texts)

    def encode(self, texts: list[str], batch_size: int, fill: bool = False) -> list[np.ndarray]:
        """Features [length dim] bfloat16 of each text."""
        return [self._table[row] for row in self.tokenize(texts)[0]]


def main() -> int:
    """Prepares and opens each number of items; prints the table."""
    args = flags.FLAGS
    cli.log_to_stderr()
    counts = [int(text) for text in args.items if text.isascii() and text.isdigit() and int(text)]
    if len(counts) != len(args.items) or not counts:
        raise ValueError(f"--items {','.join(args.items)}: give whole numbers above 0")
    output_paths.make_directory("output", args.output)
    output, rows = Path(args.output), {}
    if args.open_only:
        rows = {row["items"]: row for row in read_json(output / RESULT)}
    for count in counts:
        prepared = output / str(count)
        if not args.open_only:
            rows[count] = measure(count, prepared, args.processes, args.shard_size)
        if count not in rows:
            raise ValueError(f"{output / RESULT} has no {count} items: leave --open_only out")
        rows[count]["opening"] = openings(prepared)
        write_json(output / RESULT, list(rows.values()))
    print(table(list(rows.values())))
    return 0


def measure(count: int, output: Path, processes: int, shard_size: int) -> dict[str, Any]:
    """Prepares `count` items in `output`, which it replaces."""
    shutil.rmtree(output, ignore_errors=True)
    settings = passes.Settings(
        shard_size=shard_size, min_size=0, batch_size=64, processes=processes
    )
    started = time.monotonic()
    with sampled(work_directory(output)) as peaks:
        manifest = passes.prepare(
            SyntheticSource(count), Encoders.single(TableEncoder()), output, settings
        )
    seconds = time.monotonic() - started
    row = {"items": count, "shards": len(manifest["shards"]), "seconds": seconds} | peaks
    row["result_bytes"] = sum(entry["bytes"] for entry in manifest["shards"].values())
    return row


def openings(prepared: Path) -> dict[str, dict[str, float]]:
    """The results of `first_batch` for each batch size and number of data workers."""
    return {
        f"{size} images, {workers} workers": first_batch(prepared, size, workers)
        for size in _BATCHES
        for workers in _WORKERS
    }


@contextlib.contextmanager
def sampled(partial: Path) -> Iterator[dict[str, int]]:
    """Yields a dictionary that is filled while the block runs.

    work_bytes: largest allocated size of `partial`. start_bytes: resident memory of
    this process at the start. main_bytes, worker_bytes: largest resident memory of this process and
    of its children.
    """
    peaks = {"work_bytes": 0, "start_bytes": _peak_memory(os.getpid(), "VmRSS")}
    peaks |= {"main_bytes": 0, "worker_bytes": 0}
    stop = threading.Event()

    def look() -> None:
        for name, value in (
            ("work_bytes", _work_bytes(partial)),
            ("main_bytes", _peak_memory(os.getpid())),
            ("worker_bytes", max(map(_peak_memory, _children()), default=0)),
        ):
            peaks[name] = max(peaks[name], value)

    def keep_looking() -> None:
        while not stop.wait(_SAMPLE_S):
            look()

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()
        look()


def _work_bytes(partial: Path) -> int:
    total = 0
    for directory, _, names in os.walk(partial):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += 512 * os.stat(os.path.join(directory, name)).st_blocks
    return total


def _children() -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return found


def _peak_memory(process: int, field: str = "VmHWM") -> int:
    """Bytes of resident memory: the largest, or the present (VmRSS). 0 if the process has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return 0


def first_batch(path: Path, size: int, workers: int) -> dict[str, float]:
    """Seconds until a new process has the first batch: in all, and without start and imports."""
    for file in path.rglob("*"):
        if file.is_file():
            _evict(file)
    command = [sys.executable, "-c", _FIRST_BATCH, str(path), str(size), str(workers)]
    started = time.monotonic()
    ran = subprocess.run(
        [*command, json.dumps(_DATA)], stdout=subprocess.PIPE, text=True, check=True
    )
    return {"total_s": time.monotonic() - started, "opening_s": float(ran.stdout)}


def _evict(file: Path) -> None:
    """Removes a file from the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as a Markdown table, one column for each number of items."""
    mib = lambda row, name: f"{row[name] / 2**20:.0f} MiB"
    each = lambda row, name: f"{row[name] / row['items']:.0f}"
    lines = {
        "items": [f"{row['items']:,}" for row in rows],
        "shards": [f"{row['shards']:,}" for row in rows],
        "seconds; per thousand items": [
            f"{row['seconds']:.0f}; {1000 * row['seconds'] / row['items']:.2f}" for row in rows
        ],
        "work files, bytes per image": [each(row, "work_bytes") for row in rows],
        "result, bytes per image": [each(row, "result_bytes") for row in rows],
        "main process before the start; peak": [
            f"{mib(row, 'start_bytes')}; {mib(row, 'main_bytes')}" for row in rows
        ],
        "largest worker process, peak": [mib(row, "worker_bytes") for row in rows],
    }
    for name in rows[0]["opening"]:
        lines[f"opening and first batch, {name}, in s; with imports"] = [
            f"{row['opening'][name]['opening_s']:.2f}; {row['opening'][name]['total_s']:.2f}"
            for row in rows
        ]
    header, *body = (f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items())
    return "\n".join([header, "|---" * (1 + len(rows)) + "|", *body])


if __name__ == "__main__":
    cli.run(define_flags, main)
