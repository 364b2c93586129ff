"""Shows the progress of trainings in one table, read from their workdirs.

    python -m launch.status WORKDIR [WORKDIR ...]

A WORKDIR is that of a training, or a directory of several, such as a cascade's or a sweep's. It may
be in a bucket (gs://..., with the extra `gcs`). Hosts that failed are named below the table.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from imagen_jax import cli, goodput, line_logs
from imagen_jax.checksums import is_sealed
from imagen_jax.distributed import host_failures
from imagen_jax.goodput import GOODPUT
from imagen_jax.locks import LOCK, is_locked
from imagen_jax.object_storage import AnyPath, bucket_errors, check_bucket, in_bucket
from imagen_jax.run_log import METRICS, parse_row
from imagen_jax.storage import as_path, directory_names, entry_names, write_json, written_at
from launch import command_line, endings
from launch.job import Job, check_path, is_bucket_url, name_of

# A launcher's last action: {"where", "name", "state", "detail", "attempt", "steps", "time"}
STATE_FILE = "launch.json"
TAIL_BYTES = 65_536  # of metrics.jsonl, which hold the rows for the rate
RATE_ROWS = 10
LARGEST = 2**63  # bound for numbers of steps and images
SILENT_S = 600.0  # see `WorkdirFiles.is_recent`
LOSSES, LEAST_LOSS = 3, 0.005  # of the time: the most losses to show, and the smallest one
COLUMNS = (
    "stage",
    "state",
    "step",
    "loss",
    "images/s",
    "left",
    "checkpoint",
    "goodput",
    "losses",
    "",
)
# What a workdir holds, in which no training is to be found.
OUTPUTS = frozenset(("checkpoints", "images", "tensorboard", "profile"))


@dataclasses.dataclass(frozen=True)
class Row:
    """The line of one training in the table; unknown numbers are nan.

    state: not started, running, finished, failed, preempted, waiting, submitted, stopped or
        unreadable.
    step, steps: the newest step, and the number of steps of the whole training.
    loss, images_per_s: of the newest row, and the mean of the last RATE_ROWS rows.
    left: seconds to the end at the pace of the last process, with its saves and validations; at
        the rate of images if it has not finished a step.
    checkpoint: step of the newest checkpoint; -1 if there is none.
    goodput: the share of the time that went into steps that were kept.
    losses: (category, share of the time) of the rest, the largest first; see imagen_jax/goodput.py.
    is_locked: whether the lock of the workdir is held, which proves that a training runs.
    detail: the reason for the state.
    failures: a line for each host that failed in this run.
    """

    name: str
    state: str = "not started"
    step: int = 0
    steps: int = 0
    loss: float = math.nan
    images_per_s: float = math.nan
    left: float = math.nan
    checkpoint: int = -1
    goodput: float = math.nan
    losses: tuple[tuple[str, float], ...] = ()
    is_locked: bool = False
    detail: str = ""
    failures: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the last step has a checkpoint; lost rows of metrics do not count."""
        return bool(self.steps) and self.checkpoint >= self.steps


class WorkdirFiles:
    """Reads the files of a workdir: a directory, or a bucket. Raises OSError if that fails."""

    def __init__(self, workdir: str):
        """Raises ValueError for a bucket without the extra `gcs`."""
        self.path = as_path("WORKDIR", workdir)

    def tail(self, name: str) -> bytes:
        """`_tail` of a file."""
        return _tail(self.path / name)

    def entries(self) -> list[dict[str, Any]]:
        """The entries of the ledger of time."""
        return goodput.read_entries(self.path)

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, in order.

        A checkpoint is complete when its checksum file, written last, exists. The trainer verifies
        the checksums.
        """
        directory = self.path / "checkpoints"
        names = (name for name in entry_names(directory) if re.fullmatch("0|[1-9][0-9]*", name))
        return sorted(int(name) for name in names if is_sealed(directory / name))

    def age(self) -> float:
        """Seconds since the metrics or the ledger were written; inf if they do not exist."""
        logs = (line_logs.newest_part(self.path / name) for name in (METRICS, GOODPUT))
        return time.time() - max(map(written_at, logs))

    def is_recent(self, elsewhere: bool, ended: bool) -> bool:
        """Whether a training runs whose lock is not seen: it wrote in the last SILENT_S seconds.

        That happens on other machines, for file systems that do not share locks, and for a training
        that has mounted its bucket: its lock is an empty object, or none.

        elsewhere: the training may run on another machine. ended: the last one has ended by itself.
        """
        in_a_bucket = in_bucket(self.path)
        if ended or not (elsewhere or in_a_bucket):
            return False
        lock_expired = in_a_bucket and bool(_tail(self.path / LOCK))
        return not lock_expired and self.age() < SILENT_S


def read(job: Job) -> Row:
    """The state of a job, from its files.

    A lock that is held means running. If the training does not run, the launcher's record gives the
    reason, or without one what the training itself has recorded.
    """
    try:
        workdir_files = WorkdirFiles(job.workdir)
        last, loss, rate = _metrics(workdir_files)
        total, batch, most = _config(workdir_files)
        checkpoint = max(workdir_files.checkpoints(), default=-1)
        recorded, detail, requested = _read_state(job)
        entries = workdir_files.entries()
        times, step_s = goodput.summarise(entries), goodput.step_seconds(entries)
        failures = host_failures.read(workdir_files.path)
        launching = is_locked(job.record) and recorded in ("running", "preempted", "waiting")
        locked = is_locked(workdir_files.path)
        recent = workdir_files.is_recent(recorded == "submitted", times.ended)
        held = launching or locked or recent
        ask = not held and not recorded  # without a launcher, the training's own records tell
        failed = endings.failure(workdir_files.path, entries, failures, most) if ask else ""
    except (ValueError, OSError) as error:
        detail = cli.describe(error) if isinstance(error, OSError) else str(error)
        return Row(job.title, "unreadable", detail=detail)
    steps, step = job.steps or requested or total, max(last, checkpoint)  # rows may be lost
    if math.isnan(step_s) and batch and rate > 0:  # no ledger, or a process without a step
        step_s = batch / rate
    row = Row(
        job.title,
        step=step,
        steps=steps,
        loss=loss,
        images_per_s=rate,
        left=max(0, steps - step) * step_s,
        checkpoint=checkpoint,
        goodput=times.goodput,
        losses=tuple(times.losses()),
        is_locked=locked,
        failures=tuple(host_failures.summary(failures)),
    )
    if row.ended:
        detail = f"{METRICS} ends at step {last:,}" if last < steps else ""
        return dataclasses.replace(row, state="finished", detail=detail)
    if held:
        state, detail = (recorded, detail) if launching else ("running", "")
        return dataclasses.replace(row, state=state, detail=detail)
    ended = {"running": "stopped", "finished": "stopped" if steps else "finished"}
    state = ended.get(recorded, recorded)
    if failed:
        state, detail = "failed", failed
    state = state or ("stopped" if step or checkpoint >= 0 else "not started")
    return dataclasses.replace(row, state=state, detail=detail)


def write_state(job: Job, where: str, state: str, detail: str = "", attempt: int = 0) -> None:
    """Writes the launcher's status file of a job, for `read`."""
    content = {
        "where": where,
        "name": job.name,
        "state": state,
        "detail": detail,
        "attempt": attempt,
        "steps": job.steps,
        "time": time.time(),
    }
    write_json(job.record / STATE_FILE, content)


def _metrics(workdir_files: WorkdirFiles) -> tuple[int, float, float]:
    """(step, loss) of the newest row, and the mean images/s of the last RATE_ROWS rows."""
    content = workdir_files.tail(METRICS)
    with _reading(METRICS):
        rows = [row for row in map(parse_row, content.split(b"\n")) if row]
        last = rows[-1] if rows else {}
        rates = [
            _field(row, "time/images_per_s", math.nan)
            for row in rows[-RATE_ROWS:]
            if "time/images_per_s" in row
        ]
        return (
            _field(last, "step", 0),
            _field(last, "loss", math.nan),
            sum(rates) / len(rates) if rates else math.nan,
        )


def _config(workdir_files: WorkdirFiles) -> tuple[int, int, int]:
    """(steps of the training, images per step, most skipped steps); 0 if unknown."""
    content = workdir_files.tail("config.json")
    with _reading("config.json"):
        config = _object(content)
        train, data = _field(config, "train", {}), _field(config, "data", {})
        return (
            _field(train, "steps", 0),
            _field(data, "batch_size", 0),
            _field(train, "max_skips", 0),
        )


def _read_state(job: Job) -> tuple[str, str, int]:
    """(state, detail, steps) in the launcher's status file."""
    content = _tail(job.record / STATE_FILE)
    with _reading(str(job.record / STATE_FILE)):
        entry = _object(content)
        return _field(entry, "state", ""), _field(entry, "detail", ""), _field(entry, "steps", 0)


def _tail(path: AnyPath) -> bytes:
    """The last TAIL_BYTES of a file, b"" if it is missing. Raises ValueError for a directory."""
    if not in_bucket(path) and path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")
    return line_logs.last_bytes(path, TAIL_BYTES)


def _object(content: bytes) -> dict[str, Any]:
    """Parses a JSON object; {} for an empty file."""
    parsed = json.loads(content or b"{}")
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    return parsed


def _field(parsed: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of a field, or `default` if it is missing.

    Raises ValueError for a value of another type than `default`, and for a count out of range.
    """
    value = parsed.get(name, default)
    fits = isinstance(value, (int, float) if isinstance(default, float) else type(default))
    if not fits or (isinstance(default, int) and not 0 <= value < LARGEST):
        raise ValueError(f"{name} is {value!r:.40}")
    return float(value) if isinstance(default, float) else value


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns any error while a file is parsed into a ValueError that names the file."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def table(rows: Iterable[Row]) -> str:
    """The rows below their headings, in aligned columns; then a line for each host that failed."""
    rows = list(rows)
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells
    ]
    return "\n".join(lines + [f"{row.name}: {line}" for row in rows for line in row.failures])


def _cells(row: Row) -> tuple[str, ...]:
    number = lambda value, form: "-" if math.isnan(value) else form.format(value)
    steps = f"{row.step:,}/{row.steps:,}" if row.steps else f"{row.step:,}"
    left = span(row.left) if math.isfinite(row.left) and not row.ended else "-"
    checkpoint = f"{row.checkpoint:,}" if row.checkpoint >= 0 else "-"
    return (
        row.name,
        row.state,
        steps,
        number(row.loss, "{:.4f}"),
        number(row.images_per_s, "{:.4g}"),
        left,
        checkpoint,
        number(100 * row.goodput, "{:.0f} %"),
        _losses(row) or "-",
        " ".join(row.detail.split()),
    )


def _losses(row: Row) -> str:
    """The largest losses of time in words, such as "down 4 %, compile 2 %"."""
    shown = [(name, share) for name, share in row.losses[:LOSSES] if share >= LEAST_LOSS]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shown)


def span(seconds: float) -> str:
    """A duration as days and hours, hours and minutes, or minutes and seconds."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h:02} h" if days else f"{h} h {m:02} min" if h else f"{m} min {s:02} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    print(table(read(job) for job in jobs(argv)))
    return 0


def define_flags(values: flags.FlagValues) -> None:
    """Defines nothing: the work directories are the only arguments."""


def jobs(argv: Sequence[str]) -> list[Job]:
    """The trainings in the workdirs of a command line. Raises ValueError if it is invalid."""
    _, workdirs = command_line.parse(argv, define_flags, __doc__)
    if not workdirs:
        raise ValueError("no WORKDIR is given: name the directory of a training or of several")
    if option := next((text for text in workdirs if text.startswith("-")), ""):
        raise ValueError(f"{option!r} is not an option of launch.status; see --help")
    for workdir in workdirs:
        check_path(workdir, "WORKDIR")
        if is_bucket_url(workdir):
            check_bucket("WORKDIR", as_path("WORKDIR", workdir))
        elif not Path(workdir).is_dir():
            raise ValueError(f"{workdir} is not a directory")
    return [
        Job(name_of(path), (), path, stage=title)
        for workdir in workdirs
        for title, path in inside(workdir)
    ]


def inside(workdir: str) -> list[tuple[str, str]]:
    """[(title, workdir)] of the trainings in a directory: itself, or those below it."""
    root = as_path("WORKDIR", workdir)
    trainings = [] if _is_training(root) else sorted(_trainings(root))
    if not trainings:
        return [(workdir.rstrip("/").rpartition("/")[2], workdir)]
    return [(str(path.relative_to(root)), os.fspath(path)) for path in trainings]


def _trainings(directory: AnyPath) -> Iterator[AnyPath]:
    """The trainings below a directory, at any depth; none inside another one."""
    names: list[str] = []
    with contextlib.suppress(PermissionError):
        names = directory_names(directory)
    for name in names:
        path = directory / name
        if _is_training(path):
            yield path
        elif name not in OUTPUTS:
            yield from _trainings(path)


def _is_training(path: AnyPath) -> bool:
    with bucket_errors(path):
        return any((path / name).exists() for name in (METRICS, GOODPUT, f"launch/{STATE_FILE}"))


if __name__ == "__main__":
    sys.exit(main())
