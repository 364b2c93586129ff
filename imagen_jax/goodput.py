"""Where the time of a run goes, over all processes that have continued it: goodput.jsonl.

Process 0 of a training writes one entry per phase, and one per minute in the training loop:

    {"process": 2, "start": 1767225600.0, "end": 1767225660.0, "seconds": {"step": 57.5, "data":
     2.5}, "from_step": 1200, "to_step": 1260}

`process` counts the processes from 0. The entries of a process leave no gap, from the creation of
the process to its last entry. The last entry is replaced every second (in a bucket, every 30 s)
while its phase lasts, so a killed process loses no more than that; the loss counts as time without
a process. This module does not import jax.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from imagen_jax.line_logs import STORE_S, LineLog, keep_lines, read_lines
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import as_path

GOODPUT = "goodput.jsonl"
# What a process does. start: until it holds the lock of the workdir. restore: reading the
# checkpoint, or initialising the state. data: the loop waits for a batch. step: the rest of the
# loop. checkpoint, evaluation: the loop is blocked by a save, by a validation or a sample grid.
CATEGORIES = ("start", "restore", "compile", "data", "step", "checkpoint", "evaluation", "other")
LOST, DOWN = "lost", "down"  # steps that were done again; no process ran
LOOP = frozenset(("data", "step"))  # share an entry
ENTRY_S = 60.0  # the longest entry of the loop
WRITE_S = 1.0  # after which the last entry is written again

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Seconds of a run by category; they add up to `wall_s`.

    seconds: of each of CATEGORIES, where "step" holds the steps that were kept, and of LOST and
        DOWN. Only categories with time.
    wall_s: from the creation of the first process to the last entry.
    ended: whether the last process has ended by itself.
    """

    seconds: Mapping[str, float]
    wall_s: float
    ended: bool

    @property
    def goodput(self) -> float:
        """Time of the steps that were kept, as a share of the wall time; nan without time."""
        return self.seconds.get("step", 0.0) / self.wall_s if self.wall_s > 0 else math.nan

    def losses(self) -> list[tuple[str, float]]:
        """(category, share of the wall time) of everything but kept steps, the largest first."""
        shares = {name: s / self.wall_s for name, s in self.seconds.items() if name != "step"}
        return sorted(shares.items(), key=lambda item: -item[1])


class Ledger:
    """Writes the entries of one process. A context manager.

    The loop calls `at` or `phase`, which read a clock and add; a thread writes. A file system that
    does not answer, or is full, is a warning.
    """

    def __init__(
        self,
        workdir: AnyPath,
        enabled: bool = True,
        began: float | None = None,
        write_s: float | None = None,
    ):
        """Begins with an entry of "start".

        enabled: False makes every method do nothing, for all processes except the first. began:
        when the command began, by time.monotonic(); None for now. write_s: None for WRITE_S, or
        STORE_S in a bucket.
        """
        self._enabled = enabled
        if not enabled:
            return
        path = as_path("workdir", workdir) / GOODPUT
        keep_lines(path, lambda line: parse_entry(line) is not None)
        earlier = read_entries(workdir)
        self._process = 1 + max((entry["process"] for entry in earlier), default=-1)
        self._log, self._path = LineLog(path), path
        self._write_s = write_s or (STORE_S if in_bucket(path) else WRITE_S)
        self._unix = time.time() - time.monotonic()
        self._category, self._step, self._first_step = "start", 0, 0
        self._since = self._start = time.monotonic() if began is None else began
        self._seconds: dict[str, float] = {}
        self._complete: list[str] = []  # entries to write
        self._is_open = False  # the last written entry is one to replace
        self._lock, self._writing, self._ended = threading.Lock(), threading.Lock(), False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_regularly, daemon=True, name="goodput")

    def at(self, step: int, category: str) -> None:
        """Records that a category begins, after `step` steps of the run."""
        if not self._enabled:
            return
        with self._lock:
            now = time.monotonic()
            self._add(now)
            if self._category in LOOP:
                self._step = step
            if not LOOP.issuperset((category, self._category)) or now - self._start > ENTRY_S:
                self._complete.append(self._line(now))
                self._start, self._seconds, self._first_step = now, {}, step
            self._step, self._category = step, category

    @contextlib.contextmanager
    def phase(self, step: int, category: str) -> Iterator[None]:
        """A category that lasts as long as the context; then the one before continues."""
        before = self._category if self._enabled else ""
        self.at(step, category)
        try:
            yield
        finally:
            self.at(step, before)

    def flush(self) -> None:
        """Writes all entries. Raises OSError if that fails; they are kept for the next time."""
        if not self._enabled:
            return
        with self._writing:
            with self._lock:
                self._add(time.monotonic())
                lines, last = list(self._complete), self._line(self._since)
            for line in lines:
                self._put(line, is_open=False)
                self._complete.pop(0)
            self._put(last, is_open=not self._ended)
            self._log.flush()

    def __enter__(self) -> "Ledger":
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if not self._enabled:
            return
        self._stop.set()
        self._thread.join()
        self._ended = kind is None
        self._try_flush()
        with contextlib.suppress(OSError):
            self._log.close()

    def _write_regularly(self) -> None:
        warned = False
        while True:
            warned = not self._try_flush(quiet=warned)
            if self._stop.wait(self._write_s):
                return

    def _try_flush(self, quiet: bool = False) -> bool:
        try:
            self.flush()
        except OSError as error:
            if not quiet:
                log.warning("%s was not written, trying again: %s", self._path, error)
            return False
        return True

    def _add(self, now: float) -> None:
        """Adds the time up to now to the current category."""
        self._seconds[self._category] = self._seconds.get(self._category, 0.0) + now - self._since
        self._since = now

    def _line(self, end: float) -> str:
        seconds = {name: round(value, 3) for name, value in self._seconds.items()}
        entry = {
            "process": self._process,
            "start": round(self._unix + self._start, 3),
            "end": round(self._unix + end, 3),
            "seconds": seconds,
            "from_step": self._first_step,
            "to_step": self._step,
        }
        return json.dumps(entry | ({"ended": True} if self._ended else {}))

    def _put(self, line: str, is_open: bool) -> None:
        put = self._log.replace if self._is_open else self._log.append
        put(line)
        self._is_open = is_open


def process_age() -> float:
    """Seconds since this process was created; 0 if the system does not tell."""
    try:
        with open("/proc/self/stat", "rb") as file:
            # The name, in brackets, may contain spaces. The start is field 22, in ticks since boot.
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return max(0.0, age)


def read_entries(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The valid entries of workdir/goodput.jsonl in order; [] if it does not exist.

    Can be called while a trainer writes the file.
    """
    lines = read_lines(as_path("workdir", workdir) / GOODPUT)
    return [entry for entry in map(parse_entry, lines) if entry is not None]


def parse_entry(line: bytes) -> dict[str, Any] | None:
    """The entry in a line, None if the line is invalid, for example cut short by a kill."""
    try:
        entry = json.loads(line)
        numbers = [entry["start"], entry["end"], *entry["seconds"].values()]
        steps = [entry["process"], entry["from_step"], entry["to_step"]]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    fits = all(isinstance(n, (int, float)) and 0 <= n < math.inf for n in numbers)
    return entry if fits and all(isinstance(n, int) and n >= 0 for n in steps) else None


def summarise(entries: Iterable[Mapping[str, Any]]) -> Summary:
    """Where the time of a run went.

    Work is lost when a later process resumes from a checkpoint before it: the step time after the
    checkpoint, in proportion to the steps of an entry. A process that found nothing to do does not
    count.

    entries: of `read_entries`.
    """
    counted = _processes(entries)
    seconds = dict.fromkeys((*CATEGORIES, LOST, DOWN), 0.0)
    kept: list[tuple[int, int, float]] = []  # (first step, last step, seconds) of entries
    for i, mine in enumerate(counted):
        for entry in mine:
            for name, value in entry["seconds"].items():
                seconds[name if name in CATEGORIES else "other"] += value
        if i:
            seconds[DOWN] += max(0.0, mine[0]["start"] - counted[i - 1][-1]["end"])
        worked = [entry for entry in mine if "step" in entry["seconds"]]
        if worked:
            kept, lost = _split(kept, worked[0]["from_step"])
            seconds[LOST] += lost
        kept += [(e["from_step"], e["to_step"], e["seconds"]["step"]) for e in worked]
    seconds["step"] -= seconds[LOST]
    return Summary(
        seconds={name: value for name, value in seconds.items() if value > 0},
        wall_s=sum(seconds.values()),
        ended=bool(counted) and bool(counted[-1][-1].get("ended")),
    )


def last_process(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of the last process that found something to do, in order; [] without one.

    entries: of `read_entries`.
    """
    counted = _processes(entries)
    return counted[-1] if counted else []


def step_seconds(entries: Iterable[Mapping[str, Any]]) -> float:
    """Wall time of a step of the last process, with the saves and validations between its steps.

    nan before it has finished a step.

    entries: of `read_entries`.
    """
    worked = [entry for entry in last_process(entries) if "step" in entry["seconds"]]
    steps = worked[-1]["to_step"] - worked[0]["from_step"] if worked else 0
    return (worked[-1]["end"] - worked[0]["start"]) / steps if steps > 0 else math.nan


def _processes(entries: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The entries of each process that found something to do, in order."""
    processes: dict[int, list[Mapping[str, Any]]] = {}
    for entry in entries:
        processes.setdefault(entry["process"], []).append(entry)
    return [processes[i] for i in sorted(processes) if not _did_nothing(processes[i])]


def _did_nothing(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a process ended by itself after it had looked for a checkpoint."""
    entries = list(entries)
    names = {name for entry in entries for name in entry["seconds"]}
    return names <= {"start", "restore"} and bool(entries[-1].get("ended"))


def _split(
    kept: Iterable[tuple[int, int, float]], resumed: int
) -> tuple[list[tuple[int, int, float]], float]:
    """(what is kept of entries when a process resumes from a step, lost seconds).

    An entry without a finished step is part of the next step.
    """
    remaining, lost = [], 0.0
    for first, last, seconds in kept:
        last = max(last, first + 1)
        share = min(1.0, max(0, last - resumed) / (last - first))
        lost += share * seconds
        if share < 1:
            remaining.append((first, min(last, resumed), (1 - share) * seconds))
    return remaining, lost
