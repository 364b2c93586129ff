"""Ingestion on worker processes: checks every image, selects images and captions, stores images.

Every process of the run does a share of the checks and of the image shards; process 0 selects.
`beam_ingest` does the same work on an Apache Beam runner and leaves the same files.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator

from imagen_jax.data.prepare import checks
from imagen_jax.data.prepare.kept import PLAN, Plan
from imagen_jax.data.prepare.manifest import listed
from imagen_jax.data.prepare.resize import Resize
from imagen_jax.data.prepare.selection import select
from imagen_jax.data.prepare.settings import Settings
from imagen_jax.data.prepare.shards import AGAIN, Shard, shards_of, unfinished, write_images
from imagen_jax.data.sources.source import Source
from imagen_jax.data.workers import Workers
from imagen_jax.distributed import agreement, shared_files
from imagen_jax.many_files import each
from imagen_jax.object_storage import AnyPath
from imagen_jax.run_log import Progress
from imagen_jax.storage import entry_names, exists, read_json, write_atomically

CHUNK = 512  # most images in one file of checks, the unit in which checking is resumed
At = Callable[[str], None]  # called with the name of each phase as it begins


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive items of a source, checked by one process and stored in one file of checks."""

    start: int
    stop: int

    def file(self, partial: AnyPath) -> AnyPath:
        """The file of the checks."""
        return partial / "checked" / f"{self.start:012d}-{self.stop:012d}.json"


def spans_of(source: Source) -> list[Span]:
    """The items of a source in order, in spans that do not cross the ends of its shards."""
    return [span for bounds in shard_bounds(source) for span in spans_between(*bounds)]


def shard_bounds(source: Source) -> list[tuple[int, int]]:
    """(first item, item after the last) of each shard of a source; of all items if it has none."""
    ends = getattr(source, "shard_ends", None) or [len(source)]
    return list(itertools.pairwise([0, *ends]))


def spans_between(start: int, stop: int) -> Iterator[Span]:
    """The spans of the items from `start` to before `stop`."""
    for first in range(start, stop, CHUNK):
        yield Span(first, min(first + CHUNK, stop))


def ingest(
    workers: Workers, source: Source, partial: AnyPath, settings: Settings, at: At = lambda _: None
) -> Plan:
    """Checks, selects, and stores the images; continues what an earlier run has done.

    partial: the work directory. settings: shard_size, min_size, resize, processes.
    """
    plan = _check_and_select(workers, source, partial, settings, at)
    check_usable(plan)
    at("write images")
    _write_all(workers, partial, plan, settings)
    return plan


def check_usable(plan: Plan) -> None:
    """Raises ValueError if no image was selected."""
    if not any(plan.images.values()):
        raise ValueError(f"no usable image in --source: {listed(plan.reasons)}, {plan.examples()}")


def _check_and_select(
    workers: Workers, source: Source, partial: AnyPath, settings: Settings, at: At
) -> Plan:
    directory = partial / "plan"
    if agreement.first_says(exists(directory / PLAN)):
        shared_files.wait_for_files([directory / PLAN])
        return Plan(directory)
    spans = spans_of(source)
    at("check images")
    _check_all(workers, partial, agreement.own_share(spans), settings)
    agreement.gather()
    at("select images")
    if agreement.is_first():
        with Progress("select images", len(source)) as progress:
            rows = _checked_rows(partial, spans, progress)
            select(rows, source.notes(), settings.shard_size, directory)
    shared_files.wait_for_files([directory / PLAN])
    return Plan(directory)


def _check_all(workers: Workers, partial: AnyPath, spans: list[Span], settings: Settings) -> None:
    """Writes the checks of these spans that are missing."""
    present = set(entry_names(partial / "checked"))
    todo = [span for span in spans if span.file(partial).name not in present]
    tasks = ((partial, span, settings.min_size, settings.resize) for span in todo)
    total, left = (sum(span.stop - span.start for span in part) for part in (spans, todo))
    show("check images", total, left, workers.each(check_span, tasks, 4 * settings.processes))


def check_span(source: Source, partial: AnyPath, span: Span, min_size: int, resize: Resize) -> int:
    """Writes the file of checks of a span; returns the number of its items."""
    checked = (checks.check(source[i], min_size, resize) for i in range(span.start, span.stop))
    rows = [dataclasses.asdict(row) for row in checked]
    write_atomically(span.file(partial), json.dumps(rows).encode())
    return len(rows)


def _checked_rows(
    partial: AnyPath, spans: list[Span], progress: Progress
) -> Iterator[checks.Checked]:
    """The checks of all processes in the order of the source."""

    def read(span: Span) -> list[checks.Checked]:
        shared_files.wait_to_see(span.file(partial))
        return read_checked(partial, span)

    for span, rows in zip(spans, each(read, spans, partial)):
        yield from rows
        progress.update(span.stop)


def read_checked(partial: AnyPath, span: Span) -> list[checks.Checked]:
    """The checks of a span. Raises ValueError if its file is damaged."""
    file, remedy = span.file(partial), f"remove it; {AGAIN}"
    try:
        rows = [checks.Checked(**row) for row in read_json(file, remedy)]
    except TypeError as error:
        raise ValueError(f"{file} is damaged ({error}); {remedy}") from error
    if len(rows) != span.stop - span.start:
        raise ValueError(
            f"{file} is damaged ({len(rows)} items instead of {span.stop - span.start}); {remedy}"
        )
    return rows


def image_shards(plan: Plan) -> list[Shard]:
    """All image shards of a plan."""
    return [
        shard
        for split, count in plan.images.items()
        for shard in shards_of("images", split, count, plan.shard_size)
    ]


def _write_all(workers: Workers, partial: AnyPath, plan: Plan, settings: Settings) -> None:
    """Writes this process's share of the image shards."""
    mine = agreement.own_share(image_shards(plan))
    todo = unfinished(partial, mine)
    tasks = ((partial, shard, settings.resize) for shard in todo)
    total, left = (sum(shard.rows for shard in part) for part in (mine, todo))
    show("write images", total, left, workers.each(write_images, tasks, 2 * settings.processes))


def show(name: str, total: int, left: int, done: Iterable[int]) -> None:
    """Shows the progress of work of which `left` of `total` is left; `done` yields what is done."""
    finished = total - left
    with Progress(name, total, finished, quiet=not left) as progress:
        for count in done:
            finished += count
            progress.update(finished)
