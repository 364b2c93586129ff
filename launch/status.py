"""How far trainings are, in one table, read from their workdirs.

    python -m launch.status WORKDIR [WORKDIR ...]

A workdir may be in a bucket (gs://...) if gcloud is on PATH. Whether a training in a bucket runs is
told by how old its newest row is.
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

from imagen_jax import cli
from imagen_jax.run_log import METRICS, parse_row
from imagen_jax.storage import CHECKSUMS, is_kept, write_json
from launch.job import Job, ask, check_path, in_bucket, name_of, said

# what a launcher last did: {"where", "name", "state", "detail", "attempt", "steps", "time"}
RECORD = "launch.json"
TAIL_BYTES = 65_536  # of metrics.jsonl: enough rows for the rate
RATE_ROWS = 10
LARGEST = 2**63  # no number of steps or images reaches it
SILENT_S = 600.0  # a training in a bucket whose newest row is older is not called running
COLUMNS = ("stage", "state", "step", "loss", "images/s", "left", "checkpoint", "")


@dataclasses.dataclass(frozen=True)
class Row:
    """One training. `left`: seconds to its end at the present rate. `checkpoint`: step of the
    newest; -1: none. Numbers not known are nan.
    """

    name: str
    # or running, finished, failed, preempted, waiting, submitted, stopped, unreadable
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
        """Whether the last step is saved. A checkpoint alone says it: the trainer has nothing to do
        then, and makes no lost rows of metrics again.
        """
        return bool(self.steps) and self.checkpoint >= self.steps


class Place:
    """Reads the files of a workdir, in a directory or through gcloud in a bucket."""

    def __init__(self, workdir: str):
        self._workdir = workdir.rstrip("/")

    def tail(self, name: str) -> bytes:
        """`_tail` of one of its files. Raises ValueError if a bucket cannot be read."""
        if not in_bucket(self._workdir):
            return _tail(Path(self._workdir) / name)
        return self._gcloud("cat", f"--range=-{TAIL_BYTES}", f"{self._workdir}/{name}").encode()

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are sealed, which is done when all else of them is written;
        their bytes are the trainer's to check.
        """
        if in_bucket(self._workdir):
            sealed = self._gcloud("ls", f"{self._workdir}/checkpoints/*/{CHECKSUMS}").splitlines()
        else:
            sealed = [
                str(path)
                for path in Path(self._workdir).glob(f"checkpoints/*/{CHECKSUMS}")
                if path.is_file()
            ]
        names = (path.split("/")[-2] for path in sealed if "/" in path)
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    def age(self) -> float:
        """Seconds since metrics.jsonl was written; inf if it was not."""
        if in_bucket(self._workdir):
            text = self._gcloud("ls", "--json", f"{self._workdir}/{METRICS}")
            with _reading("what gcloud says of " + METRICS):
                found = json.loads(text)[0]["metadata"]["updated"] if text.strip() else ""
                return (
                    time.time() - calendar.timegm(time.strptime(found[:19], "%Y-%m-%dT%H:%M:%S"))
                    if found
                    else math.inf
                )
        path = Path(self._workdir) / METRICS
        return time.time() - path.stat().st_mtime if path.exists() else math.inf

    def _gcloud(self, *arguments: str) -> str:
        done = ask(("gcloud", "storage", *arguments), f"it is needed to look into {self._workdir}")
        missing = any(word in done.stderr for word in ("matched no objects", "NOT_FOUND", "404"))
        if done.returncode and not missing:
            raise ValueError(f"cannot read {self._workdir}: {said(done)}")
        return "" if done.returncode else done.stdout


def read(job: Job) -> Row:
    """What a job's files tell. A lock that is held says running; the launcher's record says why a
    training that does not run does not.
    """
    try:
        place = Place(job.workdir)
        last, loss, rate = _metrics(place)
        total, batch = _config(place)
        checkpoint = max(place.checkpoints(), default=-1)
        recorded, detail, asked = _record(job)
        launching = is_kept(job.record) and recorded in ("running", "preempted", "waiting")
        # Another machine's lock may not be seen here; then a row that was written just now tells.
        elsewhere = in_bucket(job.workdir) or recorded == "submitted"
        held = (
            launching
            or (not in_bucket(job.workdir) and is_kept(Path(job.workdir)))
            or (elsewhere and place.age() < SILENT_S)
        )
    except (ValueError, OSError) as error:
        return Row(job.title, "unreadable", detail=str(error))
    steps, step = job.steps or asked or total, max(last, checkpoint)  # rows may have been lost
    left = max(0, steps - step) * batch / rate if batch and rate > 0 else math.nan
    found = Row(
        job.title,
        step=step,
        steps=steps,
        loss=loss,
        images_per_s=rate,
        left=left,
        checkpoint=checkpoint,
    )
    if found.ended:
        return dataclasses.replace(
            found,
            state="finished",
            detail=f"{METRICS} ends at step {last:,}" if last < steps else "",
        )
    if held:
        return dataclasses.replace(
            found, state=recorded if launching else "running", detail=detail if launching else ""
        )
    state = {"running": "stopped", "finished": "stopped" if steps else "finished"}.get(
        recorded, recorded
    )
    return dataclasses.replace(
        found,
        state=state or ("stopped" if step or checkpoint >= 0 else "not started"),
        detail=detail,
    )


def record(job: Job, where: str, state: str, detail: str = "", attempt: int = 0) -> None:
    """Writes down what a launcher does, for `read`."""
    content = {
        "where": where,
        "name": job.name,
        "state": state,
        "detail": detail,
        "attempt": attempt,
        "steps": job.steps,
        "time": time.time(),
    }
    write_json(job.record / RECORD, content)


def _metrics(place: Place) -> tuple[int, float, float]:
    """(step, loss) of the newest row, and images a second of the last RATE_ROWS."""
    content = place.tail(METRICS)
    with _reading(METRICS):
        rows = [row for row in map(parse_row, content.splitlines()) if row]
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


def _config(place: Place) -> tuple[int, int]:
    """How many steps the training takes, and images a step; 0: not known."""
    content = place.tail("config.json")
    with _reading("config.json"):
        found = _object(content)
        return _field(_field(found, "train", {}), "steps", 0), _field(
            _field(found, "data", {}), "batch_size", 0
        )


def _record(job: Job) -> tuple[str, str, int]:
    """(state, detail, steps) that a launcher wrote down."""
    content = _tail(job.record / RECORD)
    with _reading(str(job.record / RECORD)):
        found = _object(content)
        return _field(found, "state", ""), _field(found, "detail", ""), _field(found, "steps", 0)


def _tail(path: Path) -> bytes:
    """The last TAIL_BYTES of a file; b"" if there is none. Raises ValueError if it is none."""
    if not path.exists():
        return b""
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
        return file.read()


def _object(content: bytes) -> dict[str, Any]:
    """A JSON object, {} of an empty file."""
    found = json.loads(content or b"{}")
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


def _field(found: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """A field of the type of `otherwise`, which it is if it is not there. Raises ValueError for
    another type, and for a count that is none.
    """
    value = found.get(name, otherwise)
    fits = isinstance(value, (int, float) if isinstance(otherwise, float) else type(otherwise))
    if not fits or (isinstance(otherwise, int) and not 0 <= value < LARGEST):
        raise ValueError(f"{name} is {value!r:.40}")
    return float(value) if isinstance(otherwise, float) else value


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Whatever is wrong with a file becomes a ValueError that names it."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def table(rows: Iterable[Row]) -> str:
    """The rows under their headings."""
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
    """Days and hours, hours and minutes, or minutes and seconds."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h:02} h" if days else f"{h} h {m:02} min" if h else f"{m} min {s:02} s"


def main(argv: Sequence[str] | None = None) -> int:
    try:
        print(table(read(job) for job in jobs(argv)))
        return 0
    except KeyboardInterrupt:
        return cli.fail("interrupted", 130)
    except (ValueError, OSError) as error:
        return cli.fail(str(error))


def jobs(argv: Sequence[str] | None) -> list[Job]:
    """The trainings in the workdirs of a command line. Raises ValueError for a mistake in it."""
    parser = cli.Parser(
        prog="python -m launch.status", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "workdirs",
        nargs="+",
        metavar="WORKDIR",
        help="of a training, or the directory of several (a cascade's, a sweep's)",
    )
    args = parser.parse_args(argv)
    for workdir in args.workdirs:
        check_path(workdir, "WORKDIR")
        if not in_bucket(workdir) and not Path(workdir).is_dir():
            raise ValueError(f"{workdir} is no directory")
    return [
        Job(name_of(path), (), path, stage=title)
        for workdir in args.workdirs
        for title, path in inside(workdir)
    ]


def inside(workdir: str) -> list[tuple[str, str]]:
    """[(title, workdir)] of the trainings in a directory: itself, or those below it."""
    found = (
        []
        if in_bucket(workdir)
        else sorted(
            {
                path.parent
                for name in (METRICS, f"launch/{RECORD}")
                for path in Path(workdir).rglob(name)
            }
        )
    )
    trainings = sorted({path.parent if path.name == "launch" else path for path in found})
    if not trainings or Path(workdir) in trainings:
        return [(workdir.rstrip("/").rpartition("/")[2], workdir)]
    return [(str(path.relative_to(workdir)), str(path)) for path in trainings]


if __name__ == "__main__":
    sys.exit(main())
