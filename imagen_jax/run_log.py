"""The log of a run: metrics.jsonl and validation.jsonl (the record), TensorBoard, images, times.

wandb_log.py adds Weights & Biases.

This module does not import jax, so that reports and launchers can use it. Values may be anything
that `float()` accepts, device scalars included.
"""

import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.line_logs import STORE_S, LineLog, keep_lines, read_lines
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import as_path, copy_file, write_atomically
from imagen_jax.wandb_log import WandbLog

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
BAD_STEPS = "bad_steps.jsonl"
NONFINITE = "nonfinite.json"  # the batch of a step that ended the run
SPAN = 1000  # consecutive steps in which at most train.max_skips are skipped
VARYING = ("time/", "memory/")  # beginnings of names whose values differ between equal runs
TENSORBOARD_FLUSH_S = 5
BOARD_BYTES = 4 * 2**20

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes scalars to workdir/metrics.jsonl and TensorBoard, images to workdir/images and
    TensorBoard.

    metrics.jsonl and validation.jsonl hold one JSON object per line. TensorBoard's files are in
    workdir/tensorboard. In a bucket, all of them are stored every STORE_S seconds, by `flush` and
    by `close`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        start_step: int,
        enabled: bool = True,
        validated: int | None = None,
    ):
        """Opens the record of a run that continues from `start_step`.

        Drops rows of later steps and invalid rows. Images of later steps stay until they are
        written again. enabled: False makes every method do nothing, for all processes except the
        first. validated: the step from which the run continues, if metrics.jsonl continues from an
        earlier one; rows of validation.jsonl and bad_steps.jsonl up to it stay.
        """
        self._enabled, self._wandb = enabled, None
        if not enabled:
            return
        self._workdir = as_path("workdir", workdir)
        validated = start_step if validated is None else validated
        self._logs = {}
        for name, last in ((METRICS, start_step), (VALIDATION, validated)):
            _truncate(self._workdir / name, last)
            self._logs[name] = LineLog(self._workdir / name)
        _truncate(self._workdir / BAD_STEPS, validated)
        self._start_step = start_step
        self._board = Board(self._workdir / "tensorboard", start_step)
        # TensorBoard has dropped these too, but no step writes them again.
        for row in read_metrics(workdir, VALIDATION):
            if row["step"] > start_step:
                self._add_to_board(row)
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._storing = threading.Thread(target=self._store_regularly, daemon=True)
        if in_bucket(self._workdir):
            self._storing.start()

    def begin(self, config: Mapping[str, Any], wandb: WandbLog) -> None:
        """Writes the config of the run to TensorBoard, as text.

        wandb: gets every row and image from now on.
        """
        if not self._enabled:
            return
        lines = json.dumps(config, indent=1).splitlines()
        text = "\n".join(f"    {line}" for line in lines)  # code, in Markdown
        with self._lock:
            self._board.writer.add_text("config", text, self._start_step)
        self._wandb = wandb

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends {"step": step, **values} and flushes it to the operating system.

        NaN and Infinity are written as such. Raises ValueError if a value is not one number.
        """
        self._write(METRICS, step, values)

    def validation(self, step: int, values: Mapping[str, Any]) -> None:
        """`scalars` for workdir/validation.jsonl."""
        self._write(VALIDATION, step, values)

    def bad_step(self, row: Mapping[str, Any]) -> None:
        """Appends a row to workdir/bad_steps.jsonl; the first one creates the file."""
        if not self._enabled:
            return
        with self._lock:
            if BAD_STEPS not in self._logs:
                self._logs[BAD_STEPS] = LineLog(self._workdir / BAD_STEPS)
            self._logs[BAD_STEPS].append(json.dumps(row))

    def _write(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        if not self._enabled:
            return
        row = {"step": int(step)} | {name: _scalar(name, value) for name, value in values.items()}
        with self._lock:
            self._logs[name].append(json.dumps(row))
            self._add_to_board(row)
        if self._wandb:
            self._wandb.row(row)

    def _add_to_board(self, row: Mapping[str, int | float]) -> None:
        for name in [name for name in row if name != "step"]:
            self._board.writer.add_scalar(name, row[name], row["step"])

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> AnyPath | None:
        """Writes workdir/images/<name>/<step>.png and returns its path.

        Raises ValueError if `image` is not uint8 [h w 3].
        """
        if not self._enabled:
            return None
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"image {name} is {image.dtype}{list(image.shape)}; it must be uint8 [h w 3]"
            )
        from PIL import Image

        path, png = self._workdir / "images" / name / f"{step:08d}.png", io.BytesIO()
        Image.fromarray(image).save(png, format="PNG")
        write_atomically(path, png.getvalue())
        with self._lock:
            self._board.writer.add_image(name, image, step, dataformats="HWC")
        if self._wandb:
            self._wandb.image(step, name, image)
        return path

    def flush(self) -> None:
        """Stores all rows and events. Raises OSError if a bucket does not answer."""
        if self._enabled:
            with self._lock:
                for line_log in self._logs.values():
                    line_log.flush()
                self._board.flush()

    def close(self) -> None:
        """Stores and closes all files. Raises OSError if a bucket does not answer."""
        if not self._enabled:
            return
        self._ended.set()
        if self._storing.is_alive():
            self._storing.join()
        with contextlib.ExitStack() as stack:  # one that fails does not keep the others open
            for part in (self._board, *self._logs.values()):
                stack.callback(part.close)

    def _store_regularly(self) -> None:
        while not self._ended.wait(STORE_S):
            try:
                self.flush()
            except OSError as error:
                log.warning("the metrics were not stored, trying again later: %s", error)


class Board:
    """A writer of TensorBoard events, in `directory`.

    For a bucket the events are written to a local file, which `flush` stores as a whole; a new file
    begins when it has reached BOARD_BYTES.
    """

    def __init__(self, directory: AnyPath, start_step: int):
        """start_step: TensorBoard drops the later steps of an earlier process."""
        self._directory, self._start_step, self._count, self._stored = directory, start_step, 0, 0
        self._local = None
        if in_bucket(directory):
            self._local = tempfile.TemporaryDirectory()
        self._open(purge_step=start_step + 1)

    def _open(self, **options: Any) -> None:
        from tensorboardX import SummaryWriter

        suffix = f".{self._count:04d}" if self._count else ""
        self.writer = SummaryWriter(
            self._local.name if self._local else str(self._directory),
            flush_secs=TENSORBOARD_FLUSH_S,
            filename_suffix=f".{self._start_step}{suffix}",
            **options,
        )

    def flush(self) -> None:
        """Stores the events of a bucket. Raises OSError if it does not answer."""
        self.writer.flush()
        if not self._local:
            return
        (path,) = Path(self._local.name).iterdir()
        if (size := path.stat().st_size) > self._stored:
            copy_file(path, self._directory / path.name)
            self._stored = size
        if size >= BOARD_BYTES:
            self.writer.close()
            copy_file(path, self._directory / path.name)  # with what `close` has added
            path.unlink()
            self._count, self._stored = self._count + 1, 0
            self._open()

    def close(self) -> None:
        """Stores and closes the events."""
        self.writer.close()
        if self._local:
            (path,) = Path(self._local.name).iterdir()
            copy_file(path, self._directory / path.name)
            self._local.cleanup()


def read_metrics(workdir: str | os.PathLike, name: str = METRICS) -> list[dict[str, Any]]:
    """The valid rows of workdir/metrics.jsonl in order; [] if the file does not exist.

    Can be called while a trainer writes the file. name: METRICS, VALIDATION or BAD_STEPS.
    """
    lines = read_lines(as_path("workdir", workdir) / name)
    return [row for row in map(parse_row, lines) if row is not None]


def _truncate(path: AnyPath, start_step: int) -> None:
    """Removes rows of steps after `start_step` and invalid lines from a log."""

    def keep(line: bytes) -> bool:
        row = parse_row(line)
        return row is not None and row["step"] <= start_step

    if removed := keep_lines(path, keep):
        invalid = sum(parse_row(line) is None for line in removed)
        log.warning(
            "%s: dropped %d rows after step %d and %d invalid lines",
            *(path, len(removed) - invalid, start_step, invalid),
        )


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row in a line, None if the line is invalid, for example cut short by a kill."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _scalar(name: str, value: Any) -> int | float:
    if isinstance(value, int):
        return int(value)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name} is {value!r}; it must be one number") from error


class StepClock:
    """Seconds per step and images per second between two readings.

    Time inside `pause()` (evaluation, checkpoints) is not counted.
    """

    def __init__(self, batch_size: int, step: int, now: Callable[[], float] = time.perf_counter):
        """Starts the clock. batch_size: images per step of all processes. step: steps done."""
        self._batch_size = batch_size
        self._now = now
        self._step = step
        self._start = now()
        self._paused = self._waited = 0.0
        self._depth = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside the context as time in which the loop waits for data."""
        start = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside the context. May be nested."""
        start = self._now()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._paused += self._now() - start

    def read(self, step: int) -> dict[str, float]:
        """Step time, throughput and share of waiting since the last reading or the start.

        {"time/step_s", "time/images_per_s", "time/data_share"}; {} if there was no step in between.
        """
        if self._depth:
            raise RuntimeError("the clock is read while it is paused")
        now, steps = self._now(), step - self._step
        seconds = now - self._start - self._paused
        waited, self._waited = self._waited, 0.0
        self._step, self._start, self._paused = step, now, 0.0
        if steps <= 0 or seconds <= 0:
            return {}
        return {
            "time/step_s": seconds / steps,
            "time/images_per_s": self._batch_size * steps / seconds,
            "time/data_share": min(waited / seconds, 1.0),
        }


class Progress:
    """Shows progress: a bar on a terminal, elsewhere one line every `interval_s` seconds.

    A context manager. The last line comes at the end.
    """

    def __init__(
        self,
        name: str,
        total: int,
        start: int = 0,
        interval_s: float = 10.0,
        stream: io.TextIOBase | None = None,
        quiet: bool = False,
    ):
        """start: items done before, not counted in the rate. stream: None for standard error.

        quiet: shows nothing.
        """
        self._name, self._total, self._first, self._interval_s = name, total, start, interval_s
        self._stream = sys.stderr if stream is None else stream
        self._shown: dict[str, str] = {}
        self._printed = time.monotonic()
        # (items, time) from which the rate counts: after the first items, which may compile.
        self._since: tuple[int, float] | None = None
        self._bar, self._quiet = None, quiet
        if self._stream.isatty() and not quiet:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=name, total=total, initial=start, file=self._stream, dynamic_ncols=True
            )

    def update(self, done: int, **values: Any) -> None:
        """Shows `done` of `total`, with the latest value of each name in `values`."""
        self._shown |= {key: f"{float(value):.4g}" for key, value in values.items()}
        if self._bar is not None:
            if values:
                self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        self._since = self._since or (done, now)
        if not self._quiet and (now - self._printed >= self._interval_s or done >= self._total):
            self._printed = now
            self.note(self._line(done, now))

    def note(self, text: str) -> None:
        """Prints a line of text, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, done: int, now: float) -> str:
        first, began = self._since
        rate = (done - first) / (now - began) if now > began else 0.0
        speed = f", {rate:.3g}/s" if rate else ""
        left = f", {(self._total - done) / rate:.0f} s left" if rate and done < self._total else ""
        values = "".join(f", {key} {value}" for key, value in self._shown.items())
        return f"{self._name}: {done}/{self._total}{speed}{left}{values}"
