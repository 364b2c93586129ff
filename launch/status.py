"""Shows the progress of trainings in one table, read from their workdirs.

    python -m launch.status WORKDIR [WORKDIR ...]

A WORKDIR is that of a training, or a directory of several, such as a cascade's or a sweep's. It may
be in a bucket (gs://...) if gcloud is on PATH; a training there counts as running while its newest
row of metrics is recent.
"""

import calendar
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

from imagen_jax.checksums import CHECKSUMS
from imagen_jax.locks import is_locked
from imagen_jax.run_log import METRICS, parse_row
from imagen_jax.storage import write_json
from launch import command_line
from launch.job import Job, ask, check_path, in_bucket, name_of, said

# A launcher's last action: {"where", "name", "state", "detail", "attempt", "steps", "time"}
STATE_FILE = "launch.json"
TAIL_BYTES = 65_536  # of metrics.jsonl, which hold the rows for the rate
RATE_ROWS = 10
LARGEST = 2**63  # bound for numbers of steps and images
SILENT_S = 600.0  # a training in a bucket with an older newest row does not count as running
COLUMNS = ("stage", "state", "step", "loss", "images/s", "left", "checkpoint", "")


@dataclasses.dataclass(frozen=True)
class Row:
    """The line of one training in the table; unknown numbers are nan.

    state: not started, running, finished, failed, preempted, waiting, submitted, stopped or
        unreadable.
    step, steps: the newest step, and the number of steps of the whole training.
    loss, images_per_s: of the newest row, and the mean of the last RATE_ROWS rows.
    left: seconds to the end at this rate.
    checkpoint: step of the newest checkpoint; -1 if there is none.
    detail: the reason for the state.
    """

    name: str
    state: str = "not started"
    step: int = 0
    steps: int = 0
    loss: float = math.nan
    images_per_s: float = math.nan
    left: float = math.nan
    checkpoint: int = -1
    detail: str = ""

    @property
    def ended(self) -> bool:
        """Whether the last step has a checkpoint; lost rows of metrics do not count."""
        return bool(self.steps) and self.checkpoint >= self.steps


class WorkdirFiles:
    """Reads the files of a workdir: a directory, or a bucket through gcloud."""

    def __init__(self, workdir: str):
        self._workdir = workdir.rstrip("/")

    def tail(self, name: str) -> bytes:
        """`_tail` of a file. Raises ValueError if a bucket cannot be read."""
        if not in_bucket(self._workdir):
            return _tail(Path(self._workdir) / name)
        return self._gcloud("cat", f"--range=-{TAIL_BYTES}", f"{self._workdir}/{name}").encode()

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, in order.

        A checkpoint is complete when its checksum file, written last, exists. The trainer verifies
        the checksums.
        """
        if in_bucket(self._workdir):
            paths = self._gcloud("ls", f"{self._workdir}/checkpoints/*/{CHECKSUMS}").splitlines()
        else:
            files = Path(self._workdir).glob(f"checkpoints/*/{CHECKSUMS}")
            paths = [str(path) for path in files if path.is_file()]
        names = (path.split("/")[-2] for path in paths if "/" in path)
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    def age(self) -> float:
        """Seconds since metrics.jsonl was written; inf if it does not exist."""
        if in_bucket(self._workdir):
            text = self._gcloud("ls", "--json", f"{self._workdir}/{METRICS}")
            if not text.strip():
                return math.inf
            with _reading(f"gcloud's description of {METRICS}"):
                updated = json.loads(text)[0]["metadata"]["updated"][:19]
                written = calendar.timegm(time.strptime(updated, "%Y-%m-%dT%H:%M:%S"))
            return time.time() - written
        path = Path(self._workdir) / METRICS
        return time.time() - path.stat().st_mtime if path.exists() else math.inf

    def _gcloud(self, *arguments: str) -> str:
        done = ask(("gcloud", "storage", *arguments), f"install it to read {self._workdir}")
        missing = any(word in done.stderr for word in ("matched no objects", "NOT_FOUND", "404"))
        if done.returncode and not missing:
            raise ValueError(f"cannot read {self._workdir}: {said(done)}")
        return "" if done.returncode else done.stdout


def read(job: Job) -> Row:
    """The state of a job, from its files.

    A lock that is held means running. If the training does not run, the launcher's record gives the
    reason.
    """
    try:
        workdir_files = WorkdirFiles(job.workdir)
        last, loss, rate = _metrics(workdir_files)
        total, batch = _config(workdir_files)
        checkpoint = max(workdir_files.checkpoints(), default=-1)
        recorded, detail, requested = _read_state(job)
        launching = is_locked(job.record) and recorded in ("running", "preempted", "waiting")
        # Locks of other machines may be invisible here; then a recent row means running.
        elsewhere = in_bucket(job.workdir) or recorded == "submitted"
        held = (
            launching
            or (not in_bucket(job.workdir) and is_locked(Path(job.workdir)))
            or (elsewhere and workdir_files.age() < SILENT_S)
        )
    except (ValueError, OSError) as error:
        return Row(job.title, "unreadable", detail=str(error))
    steps, step = job.steps or requested or total, max(last, checkpoint)  # rows may be lost
    left = max(0, steps - step) * batch / rate if batch and rate > 0 else math.nan
    row = Row(
        job.title,
        step=step,
        steps=steps,
        loss=loss,
        images_per_s=rate,
        left=left,
        checkpoint=checkpoint,
    )
    if row.ended:
        detail = f"{METRICS} ends at step {last:,}" if last < steps else ""
        return dataclasses.replace(row, state="finished", detail=detail)
    if held:
        state, detail = (recorded, detail) if launching else ("running", "")
        return dataclasses.replace(row, state=state, detail=detail)
    ended = {"running": "stopped", "finished": "stopped" if steps else "finished"}
    state = ended.get(recorded, recorded)
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


def _config(workdir_files: WorkdirFiles) -> tuple[int, int]:
    """(steps of the training, images per step); 0 if unknown."""
    content = workdir_files.tail("config.json")
    with _reading("config.json"):
        config = _object(content)
        steps = _field(_field(config, "train", {}), "steps", 0)
        return steps, _field(_field(config, "data", {}), "batch_size", 0)


def _read_state(job: Job) -> tuple[str, str, int]:
    """(state, detail, steps) in the launcher's status file."""
    content = _tail(job.record / STATE_FILE)
    with _reading(str(job.record / STATE_FILE)):
        entry = _object(content)
        return _field(entry, "state", ""), _field(entry, "detail", ""), _field(entry, "steps", 0)


def _tail(path: Path) -> bytes:
    """The last TAIL_BYTES of a file, b"" if it is missing. Raises ValueError for a directory."""
    if not path.exists():
        return b""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
        return file.read()


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
    """The rows below their headings, in aligned columns."""
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells
    )


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
        " ".join(row.detail.split()),
    )


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
        if not in_bucket(workdir) and not Path(workdir).is_dir():
            raise ValueError(f"{workdir} is not a directory")
    return [
        Job(name_of(path), (), path, stage=title)
        for workdir in workdirs
        for title, path in inside(workdir)
    ]


def inside(workdir: str) -> list[tuple[str, str]]:
    """[(title, workdir)] of the trainings in a directory: itself, or those below it."""
    directories = set()
    if not in_bucket(workdir):
        for name in (METRICS, f"launch/{STATE_FILE}"):
            directories |= {path.parent for path in Path(workdir).rglob(name)}
    trainings = sorted({path.parent if path.name == "launch" else path for path in directories})
    if not trainings or Path(workdir) in trainings:
        return [(workdir.rstrip("/").rpartition("/")[2], workdir)]
    return [(str(path.relative_to(workdir)), str(path)) for path in trainings]


if __name__ == "__main__":
    sys.exit(main())
