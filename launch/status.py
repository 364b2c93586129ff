"""How far trainings are, in one table, read from their workdirs.

    python -m launch.status WORKDIR [WORKDIR ...]

A workdir may be in a bucket (gs://...) if gcloud is on PATH. Whether a training in a bucket runs is told by how old its newest row is.
"""

import argparse
import calendar
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from imagen_jax import cli
from imagen_jax.integrity import is_kept, write_json
from imagen_jax.metrics import METRICS, parse_row
from launch.job import Job, ask, in_bucket, name_of

RECORD = "launch.json"  # what a launcher last did: {"where", "name", "state", "detail", "attempt", "steps", "time"}
TAIL_BYTES = 65_536  # of metrics.jsonl: enough rows for the rate
RATE_ROWS = 10
SILENT_S = 600.0  # a training in a bucket whose newest row is older is not called running
COLUMNS = ("stage", "state", "step", "loss", "images/s", "left", "checkpoint", "")


@dataclasses.dataclass(frozen=True)
class Row:
    """One training. `left`: seconds to its end at the present rate. `checkpoint`: step of the newest; -1: none. Numbers not known are nan."""

    name: str
    state: str = "not started"  # or running, finished, failed, preempted, waiting, submitted, stopped, unreadable
    step: int = 0
    steps: int = 0
    loss: float = math.nan
    images_per_s: float = math.nan
    left: float = math.nan
    checkpoint: int = -1
    detail: str = ""

    @property
    def ended(self) -> bool:
        """Whether the last step is saved: a checkpoint says it, also when rows of metrics were lost."""
        return bool(self.steps) and self.checkpoint >= self.steps


class Place:
    """Reads the files of a workdir, in a directory or through gcloud in a bucket."""

    def __init__(self, workdir: str):
        self._workdir = workdir.rstrip("/")

    def tail(self, name: str) -> bytes:
        """The last TAIL_BYTES of a file; b"" if there is none. Raises ValueError if a bucket cannot be read."""
        if not in_bucket(self._workdir):
            path = Path(self._workdir) / name
            if not path.exists():
                return b""
            with open(path, "rb") as file:
                file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
                return file.read()
        return self._gcloud("cat", f"--range=-{TAIL_BYTES}", f"{self._workdir}/{name}").encode()

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are whole."""
        if in_bucket(self._workdir):
            names = [line.rstrip("/").rpartition("/")[2] for line in self._gcloud("ls", f"{self._workdir}/checkpoints/").splitlines()]
        else:
            directory = Path(self._workdir) / "checkpoints"
            names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit())

    def age(self) -> float:
        """Seconds since metrics.jsonl was written; inf if it was not."""
        if in_bucket(self._workdir):
            text = self._gcloud("ls", "--json", f"{self._workdir}/{METRICS}")
            found = json.loads(text)[0]["metadata"]["updated"] if text.strip() else ""
            return time.time() - calendar.timegm(time.strptime(found[:19], "%Y-%m-%dT%H:%M:%S")) if found else math.inf
        path = Path(self._workdir) / METRICS
        return time.time() - path.stat().st_mtime if path.exists() else math.inf

    def _gcloud(self, *arguments: str) -> str:
        done = ask(("gcloud", "storage", *arguments), f"it is needed to look into {self._workdir}")
        missing = any(word in done.stderr for word in ("matched no objects", "NOT_FOUND", "404"))
        if done.returncode and not missing:
            raise ValueError(f"cannot read {self._workdir}: {' '.join(done.stderr.split()[-30:])}")
        return "" if done.returncode else done.stdout


def read(job: Job) -> Row:
    """What a job's files tell. A lock that is held says running; the launcher's record says why a training that does not run does not."""
    try:
        place = Place(job.workdir)
        rows = [row for row in map(parse_row, place.tail(METRICS).splitlines()) if row]
        config = _parsed(place.tail("config.json"), "config.json")
        checkpoint = max(place.checkpoints(), default=-1)
        recorded = _record(job)
        launching = is_kept(job.record) and recorded.get("state") in ("running", "preempted", "waiting")
        # Another machine's lock may not be seen here; then a row that was written just now tells.
        elsewhere = in_bucket(job.workdir) or recorded.get("state") == "submitted"
        held = launching or (not in_bucket(job.workdir) and is_kept(Path(job.workdir))) or (elsewhere and place.age() < SILENT_S)
    except ValueError as error:
        return Row(job.title, "unreadable", detail=str(error))
    last = rows[-1] if rows else {}
    step = max(last.get("step", 0), checkpoint)  # rows may have been lost
    steps = job.steps or recorded.get("steps") or config.get("train", {}).get("steps", 0)
    rates = [row["time/images_per_s"] for row in rows[-RATE_ROWS:] if "time/images_per_s" in row]
    rate = sum(rates) / len(rates) if rates else math.nan
    batch = config.get("data", {}).get("batch_size", 0)
    found = Row(
        job.title, step=step, steps=steps, loss=last.get("loss", math.nan), images_per_s=rate, checkpoint=checkpoint,
        left=max(0, steps - step) * batch / rate if batch and rate > 0 else math.nan,
    )  # fmt: skip
    if found.ended:
        return dataclasses.replace(found, state="finished")
    if held:
        return dataclasses.replace(found, state=recorded["state"] if launching else "running", detail=recorded.get("detail", "") if launching else "")
    state = {"running": "stopped", "finished": "stopped" if steps else "finished"}.get(recorded.get("state"), recorded.get("state"))
    return dataclasses.replace(found, state=state or ("stopped" if rows or checkpoint >= 0 else "not started"), detail=recorded.get("detail", ""))


def record(job: Job, where: str, state: str, detail: str = "", attempt: int = 0) -> None:
    """Writes down what a launcher does, for `read`."""
    content = {"where": where, "name": job.name, "state": state, "detail": detail, "attempt": attempt, "steps": job.steps, "time": time.time()}
    write_json(job.record / RECORD, content)


def _record(job: Job) -> dict[str, Any]:
    path = job.record / RECORD
    return _parsed(path.read_bytes() if path.exists() else b"", str(path))


def _parsed(content: bytes, name: str) -> dict[str, Any]:
    """A file's JSON object, {} of an empty one. Raises ValueError that names the file."""
    try:
        found = json.loads(content or b"{}")
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} is damaged: it holds no object")
    return found


def table(rows: Iterable[Row]) -> str:
    """The rows under their headings."""
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def _cells(row: Row) -> tuple[str, ...]:
    number = lambda value, form: "-" if math.isnan(value) else form.format(value)
    steps = f"{row.step:,}/{row.steps:,}" if row.steps else f"{row.step:,}"
    left = "-" if math.isnan(row.left) or row.ended else span(row.left)
    checkpoint = f"{row.checkpoint:,}" if row.checkpoint >= 0 else "-"
    return (row.name, row.state, steps, number(row.loss, "{:.4f}"), number(row.images_per_s, "{:.4g}"), left, checkpoint, row.detail)


def span(seconds: float) -> str:
    """Days and hours, hours and minutes, or minutes and seconds."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h:02} h" if days else f"{h} h {m:02} min" if h else f"{m} min {s:02} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m launch.status", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a training, or the directory of several (a cascade's, a sweep's)")
    args = parser.parse_args(argv)
    for workdir in args.workdirs:
        if not in_bucket(workdir) and not Path(workdir).is_dir():
            raise ValueError(f"{workdir} is no directory")
    jobs = [Job(name_of(path), (), path, stage=title) for workdir in args.workdirs for title, path in inside(workdir)]
    print(table(read(job) for job in jobs))
    return 0


def inside(workdir: str) -> list[tuple[str, str]]:
    """[(title, workdir)] of the trainings in a directory: itself, or those below it."""
    found = [] if in_bucket(workdir) else sorted({path.parent for name in (METRICS, f"launch/{RECORD}") for path in Path(workdir).rglob(name)})
    trainings = sorted({path.parent if path.name == "launch" else path for path in found})
    if not trainings or Path(workdir) in trainings:
        return [(workdir.rstrip("/").rpartition("/")[2], workdir)]
    return [(str(path.relative_to(workdir)), str(path)) for path in trainings]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(cli.fail(str(error)))
