"""Ingestion on an Apache Beam runner: leaves the same files as `ingest.ingest`.

`beam_pipeline` has the work itself. All workers read the source and write to the work directory, so
both are on a file system that they share. A task that runs twice writes the same bytes.
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.runner import create_runner

from imagen_jax.data.prepare import ingest, kept
from imagen_jax.data.prepare.beam_pipeline import SUMMARY, TOKEN, Tasks, build
from imagen_jax.data.prepare.kept import PLAN, SKIPPED, Plan
from imagen_jax.data.prepare.settings import Settings
from imagen_jax.data.prepare.shards import AGAIN, finished
from imagen_jax.data.sources.source import Source
from imagen_jax.data.workers import Workers
from imagen_jax.distributed import agreement, shared_files
from imagen_jax.exit_codes import PipelineFailed
from imagen_jax.run_log import Progress
from imagen_jax.storage import read_json, write_atomically, write_lines

BLOCK = 4096  # consecutive items that are sorted and numbered together
PROGRESS_S = 5.0


def on_runner(options: Sequence[str]) -> Callable[..., Plan]:
    """`ingest.ingest` on a runner. options: of the pipeline, such as ["--runner=FlinkRunner"].

    Raises ValueError for an option with a wrong value, for a runner that Beam does not know, and
    without a runner. A cluster may know options that Beam itself does not; DirectRunner has none.
    """
    parsed = _parse(options)
    runner = parsed.view_as(StandardOptions).runner
    if not runner:
        raise ValueError("--beam names no runner: give --runner=DirectRunner, FlinkRunner, ...")
    create_runner(runner)
    unknown = set(parsed.get_all_options(retain_unknown_options=True))
    unknown -= set(parsed.get_all_options())
    if unknown and runner == "DirectRunner":
        raise ValueError(f"--beam: DirectRunner has no option --{min(unknown)}")

    def run(
        workers: Workers, source: Source, partial: Path, settings: Settings, at: ingest.At
    ) -> Plan:
        del workers
        at("ingest with Beam")
        if agreement.is_first() and not _is_done(partial):
            _run(parsed, source, partial, settings)
        shared_files.wait_for_files([partial / "plan" / PLAN])
        plan = Plan(partial / "plan")
        ingest.check_usable(plan)
        return plan

    return run


def _parse(options: Sequence[str]) -> PipelineOptions:
    """Beam's options; Beam itself prints its usage and exits for a wrong value."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            parsed = PipelineOptions(list(options))
            parsed.get_all_options()
    except SystemExit:
        reason = told.getvalue().strip().rpartition("error: ")[2] or "give the options of a runner"
        raise ValueError(f"--beam: {reason}") from None
    return parsed


def _is_done(partial: Path) -> bool:
    if not (partial / "plan" / PLAN).is_file():
        return False
    shards = ingest.image_shards(Plan(partial / "plan"))
    return all(finished(partial, shard) for shard in shards)


def _run(options: PipelineOptions, source: Source, partial: Path, settings: Settings) -> None:
    """Runs the pipeline, then completes the plan."""
    directory = partial / "plan"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    token = os.urandom(8).hex()
    write_atomically(directory / TOKEN, token.encode())
    tasks = Tasks(
        source, partial, settings.shard_size, settings.min_size, settings.resize, BLOCK, token
    )
    try:
        with _progress(partial, source), beam.Pipeline(options=options) as pipeline:
            build(pipeline, tasks)
    except RuntimeError as error:
        causes = [line for line in str(error).splitlines() if "[while running" in line]
        cause = (causes or str(error).splitlines() or [type(error).__name__])[-1]
        cause = cause.strip().removeprefix("RuntimeError: ")
        if cause.startswith("ValueError: "):  # which says what to do
            raise ValueError(f"the Beam pipeline failed: {cause[12:]}") from error
        raise PipelineFailed(f"the Beam pipeline failed: {cause}; {AGAIN}") from error
    _complete(source, directory, settings.shard_size)


@contextlib.contextmanager
def _progress(partial: Path, source: Source) -> Iterator[None]:
    """Shows how many spans are checked, while the context lasts."""
    total = sum(-(-(stop - start) // ingest.CHUNK) for start, stop in ingest.shard_bounds(source))
    done = threading.Event()

    def show() -> None:
        with Progress("checked", total) as progress:
            while not done.wait(PROGRESS_S):
                progress.update(len(os.listdir(partial / "checked")))

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _complete(source: Source, directory: Path, shard_size: int) -> None:
    """Joins the lines of the blocks, adds the notes of the source, and writes plan.json."""
    summary = read_json(directory / SUMMARY)
    reasons, examples = Counter(summary["reasons"]), dict(summary["examples"])
    notes = source.notes()
    for note in notes:
        reasons[note["reason"]] += note.get("count", 1)
        examples.setdefault(note["reason"], kept.example(note))
    parts = sorted(directory.glob(f"*-{SKIPPED}"))
    if len(parts) != summary["blocks"]:
        raise ValueError(
            f"{directory} has {len(parts)} of the {summary['blocks']} files that the workers wrote:"
            f" check the shared file system; {AGAIN}"
        )
    told = itertools.chain.from_iterable(_read_lines(part) for part in parts)
    write_lines(directory / SKIPPED, itertools.chain(told, (json.dumps(n) + "\n" for n in notes)))
    for file in (*parts, directory / SUMMARY, directory / TOKEN):
        file.unlink()
    images, captions, sizes = (summary[name] for name in ("images", "captions", "sizes"))
    kept.write_plan(directory, shard_size, images, captions, reasons, examples, sizes)


def _read_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="\n") as file:
        yield from file
