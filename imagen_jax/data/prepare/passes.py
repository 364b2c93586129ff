"""The four passes of prepare_data: check every image, select, encode each caption, write images.

They write to OUTPUT.partial, which is renamed to OUTPUT at the end. A journal there lists the
finished shards, so the same call continues an interrupted run, with any number of processes, and
produces the same bytes.
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from imagen_jax.data import records
from imagen_jax.data.prepare import checks
from imagen_jax.data.prepare.crew import AGAIN, ALONE, Crew, wait_for_stragglers
from imagen_jax.data.prepare.manifest import finish, listed
from imagen_jax.data.prepare.preview import preview
from imagen_jax.data.prepare.resize import AS_IS, Resize
from imagen_jax.data.prepare.selection import PLAN, Plan, select
from imagen_jax.data.prepare.shards import (
    cut_captions,
    encode_shard,
    finished,
    shards_of,
    write_captions,
    write_images,
)
from imagen_jax.data.prepare.workers import Workers
from imagen_jax.data.sources.source import Source
from imagen_jax.storage import check_object, only_process, read_json, read_object, write_atomically

_CHUNK = 256  # images in one task of the first pass, the unit in which it is resumed
# Caption shards in memory at once; one core writes about 800 captions per second at XXL's width.
_WRITERS = 6
# Everything that the written bytes depend on, each a key of the manifest. A run continues only if
# all of them are equal.
_SIZES = ("max_length", "shard_size", "min_size", "batch_size")
_REQUEST = dict.fromkeys(("source", "encoder"), dict) | dict.fromkeys(_SIZES, int)
# Keys that are only there if images are stored resized or features are not in bfloat16, with what
# their absence means.
_ABSENT = {"store_size": 0, "store_format": "none", "embedding_dtype": "bfloat16"}

# An empty file in the work directory of int8 features. Versions of the program from before int8
# refuse to continue a directory with it.
_INT8 = "int8"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the passes.

    shard_size: images or captions per shard.
    min_size: images with a side shorter than this, in pixels, are skipped.
    batch_size: captions per device and batch, see text.encoder.TextEncoder.encode.
    processes: worker processes that check and write images; they do not affect the result.
    resize: how large images are resized before they are stored.
    embedding: dtype of the stored token features, one of records.EMBEDDINGS.
    """

    shard_size: int
    min_size: int
    batch_size: int
    processes: int
    resize: Resize = AS_IS
    embedding: str = records.EMBEDDINGS[0]

    def __post_init__(self):
        least = {"shard_size": 1, "min_size": 0, "batch_size": 1, "processes": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name} {getattr(self, name)} is less than {value}")
        if self.resize.side < 0:
            raise ValueError(f"--store_size {self.resize.side} is less than 0")
        if self.embedding not in records.EMBEDDINGS:
            known = " or ".join(records.EMBEDDINGS)
            raise ValueError(f"--embedding {self.embedding} is not implemented: use {known}")


def prepare(
    source: Source, encoder, output: Path, settings: Settings, crew: Crew = ALONE
) -> dict[str, Any]:
    """Writes the prepared directory `output`, or continues it, as one process of the crew.

    Args:
      encoder: a text.encoder.TextEncoder.

    Returns:
      The manifest.

    Raises:
      ValueError: `output` or its unfinished part was made with other settings, `output` cannot be
        replaced, nothing in the source is usable, or the disk has no room for the result.
      ProcessLost: another process of the crew failed.
    """
    started = time.monotonic()
    request = _request(source, encoder, settings)
    partial = work_directory(output)
    if not crew.leads:
        _follow(source, encoder, output, settings, crew, request)
    elif _is_complete(output, request):
        print(f"{output} is already complete")
        crew.dismiss()
        if partial.exists():
            with _locked(partial):
                shutil.rmtree(partial)
    else:
        _remove_empty(output)
        manifest = _lead(source, encoder, output, settings, crew, request)
        shutil.rmtree(partial, ignore_errors=crew.count > 1)
        _report(manifest, output, time.monotonic() - started)
        return manifest
    return records.Prepared(output).manifest


def work_directory(output: Path) -> Path:
    """The directory that holds everything until `output` is complete; on the same file system."""
    return output.with_name(f"{output.name}.partial")


def check_output(output: Path) -> None:
    """Raises ValueError if the finished data cannot become `output` by a rename."""
    if (output / records.MANIFEST).is_file() or not output.exists():
        return
    if os.path.ismount(output):
        raise ValueError(_mounted(output))
    if not output.is_dir() or any(output.iterdir()):
        raise ValueError(f"{output} exists and is not prepared data: choose another --output")


def _mounted(output: Path) -> str:
    return f"{output} is a mount point and cannot be replaced: give --output {output / 'data'}"


def _remove_empty(output: Path) -> None:
    """Removes an empty directory from where the result will be, before the work."""
    if output.exists():
        try:
            output.rmdir()
        except OSError as error:
            reason = _mounted(output) if error.errno == errno.EBUSY else str(error)
            raise ValueError(reason) from error


def _lead(
    source: Source, encoder, output: Path, settings: Settings, crew: Crew, request: Mapping
) -> dict[str, Any]:
    """The part of process 0: starts the others, works, publishes. Returns the manifest."""
    partial = work_directory(output)
    with _locked(partial):
        wait_for_stragglers(partial / "crew")
        if _continues(partial, request):
            print(f"continuing {partial}")
        else:
            _check_room(source, encoder, partial, settings, crew)
            if settings.embedding == "int8":
                (partial / _INT8).touch()
            write_atomically(partial / "request.json", json.dumps(request).encode())
        crew.say("go")
        plan, captions, images = _work(source, encoder, partial, settings, crew)
        captions, images = (_all_finished(partial, names, crew) for names in (captions, images))
        cut = (cut_captions(partial, name) for name in captions)
        manifest = finish(partial / "result", request, plan, captions, images, cut)
        os.rename(partial / "result", output)
        crew.dismiss()
    return manifest


def _follow(
    source: Source, encoder, output: Path, settings: Settings, crew: Crew, request: Mapping
) -> None:
    """The part of every other process: works once process 0 has said so."""
    partial = work_directory(output)
    if crew.wait_for_leader("go", "done") == "go":
        with crew.at_work():
            _refuse_changes(partial, _read_request(partial), request)
            _work(source, encoder, partial, settings, crew)
            crew.wait_for_leader("done")
    crew.wait((output / records.MANIFEST).is_file)


def _check_room(source: Source, encoder, partial: Path, settings: Settings, crew: Crew) -> None:
    room = shutil.disk_usage(partial).free
    if preview(source, encoder, settings, crew.count) > room:
        raise ValueError(
            f"only {room / 2**20:.0f} MiB are free in {partial.parent}: make room or choose"
            " another --output"
        )


def _work(
    source: Source, encoder, partial: Path, settings: Settings, crew: Crew
) -> tuple[Plan, list[str], list[str]]:
    """This process's share of the four passes.

    Returns the plan, and the names of all caption shards and of all image shards.
    """
    with Workers(source, settings.processes) as workers:
        plan = _check_all(workers, source, partial, settings, crew)
        if not any(plan.images.values()):
            raise ValueError(
                f"no usable image in --source: {listed(plan.reasons)}, {plan.examples()}"
            )
        captions = _encode_all(workers, encoder, partial, plan, settings, crew)
        images = _write_all(workers, partial, plan, settings, crew)
    return plan, captions, images


def _request(source: Source, encoder, settings: Settings) -> dict[str, Any]:
    sizes = {name: getattr(settings, name) for name in _SIZES if name != "max_length"}
    about = {"source": source.describe(), "encoder": dict(encoder.identity)}
    resize = settings.resize
    stored = {"store_size": resize.side, "store_format": resize.format} if resize.side else {}
    if settings.embedding != _ABSENT["embedding_dtype"]:
        stored["embedding_dtype"] = settings.embedding
    return json.loads(json.dumps(about | {"max_length": encoder.max_length} | sizes | stored))


def _is_complete(output: Path, request: Mapping) -> bool:
    """Whether `output` is the finished result of this request; False if absent or empty.

    Raises:
      ValueError: it is anything else, or cannot be replaced.
    """
    check_output(output)
    if not (output / records.MANIFEST).is_file():
        return False
    _refuse_changes(output, records.Prepared(output).manifest, request)
    return True


def _continues(partial: Path, request: Mapping) -> bool:
    """Whether `partial` holds unfinished work of this request; ValueError if of another one."""
    if not (partial / "request.json").is_file():
        return False
    _refuse_changes(partial, _read_request(partial), request)
    return True


def _read_request(partial: Path) -> dict[str, Any]:
    file, remedy = partial / "request.json", f"remove {partial}; {AGAIN}"
    request = read_object(file, _REQUEST, remedy)
    types = {name: type(value) for name, value in _ABSENT.items()}
    check_object(file, _ABSENT | request, types, remedy)
    return request


def _refuse_changes(directory: Path, before: Mapping, request: Mapping) -> None:
    before, request = _ABSENT | before, _ABSENT | request
    changed = [
        f"{key} was {before[key]}, is {request[key]}"
        for key in (*_REQUEST, *_ABSENT)
        if before[key] != request[key]
    ]
    if changed:
        raise ValueError(
            f"{directory} was made with other settings ({'; '.join(changed)}): choose another"
            " --output or remove it"
        )


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Creates the work directory and locks it for this process."""
    parts = ("checked", "journal", "plan", "result")
    if partial.exists() and {path.name for path in partial.iterdir()} - {
        *parts,
        "crew",
        "lock",
        "request.json",
        _INT8,
    }:
        raise ValueError(
            f"{partial} is in the way and is not unfinished work of prepare_data: choose another"
            " --output"
        )
    for name in parts:
        (partial / name).mkdir(parents=True, exist_ok=True)
    with only_process(partial, "preparing data in"):
        for left in partial.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
        yield


def _check_all(
    workers: Workers, source: Source, partial: Path, settings: Settings, crew: Crew
) -> Plan:
    """First pass, then the selection, which process 0 makes from the checks of all."""
    directory, count = partial / "plan", len(source)
    if (directory / PLAN).is_file():
        return Plan(directory)
    spans = [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    mine = crew.mine(spans)
    files = [(_checked_file(partial, span[0]), *span) for span in mine]
    tasks = [(*task, settings.min_size, settings.resize) for task in files if not task[0].is_file()]
    total = sum(stop - start for start, stop in mine)
    with _bar(
        "check images", total, total - sum(stop - start for _, start, stop, *_ in tasks)
    ) as bar:
        for checked in workers.each(_check_chunk, tasks, 4 * settings.processes):
            bar.update(checked)
            crew.check()
    if not crew.leads:
        crew.wait((directory / PLAN).is_file)
        return Plan(directory)
    with _bar("select images", count, 0) as bar:
        rows = _checked_rows(partial, spans, crew, bar)
        return select(rows, source.notes(), settings.shard_size, directory)


def _checked_file(partial: Path, start: int) -> Path:
    return partial / "checked" / f"{start:012d}.json"


def _checked_rows(partial: Path, spans, crew: Crew, bar: tqdm) -> Iterator[checks.Checked]:
    """The checks of all processes in the order of the source; waits for them."""
    for start, stop in spans:
        file = _checked_file(partial, start)
        crew.wait(file.is_file)
        yield from _read_checked(file)
        bar.update(stop - start)


def _read_checked(file: Path) -> list[checks.Checked]:
    remedy = f"remove it; {AGAIN}"
    try:
        return [checks.Checked(**row) for row in read_json(file, remedy)]
    except TypeError as error:
        raise ValueError(f"{file} is damaged ({error}); {remedy}") from error


def _check_chunk(
    source: Source, file: Path, start: int, stop: int, min_size: int, resize: Resize
) -> int:
    checked = (checks.check(source[i], min_size, resize) for i in range(start, stop))
    rows = [dataclasses.asdict(row) for row in checked]
    write_atomically(file, json.dumps(rows).encode())
    return len(rows)


def _encode_all(
    workers: Workers, encoder, partial: Path, plan: Plan, settings: Settings, crew: Crew
) -> list[str]:
    """Third pass: caption shards, encoded in this process and written by the workers.

    Returns the names of all.
    """
    shards = shards_of("captions", "train", plan.shard_rows(plan.captions))
    mine = crew.mine(shards)
    todo = [shard for shard in mine if not finished(partial, shard.name)]
    total, left = (sum(shard.rows for shard in part) for part in (mine, todo))
    tasks = (
        encode_shard(
            encoder,
            partial,
            shard.name,
            plan.captions_of(shard.number),
            shard.number * settings.shard_size,
            settings.batch_size,
            settings.embedding,
        )
        for shard in todo
    )
    with _bar("encode captions", total, total - left) as bar:
        for written in workers.each(write_captions, tasks, min(settings.processes, _WRITERS)):
            bar.update(written)
            crew.check()
    return [shard.name for shard in shards]


def _write_all(
    workers: Workers, partial: Path, plan: Plan, settings: Settings, crew: Crew
) -> list[str]:
    """Fourth pass: the image shards. Returns the names of all."""
    shards = [
        shard
        for split, count in plan.images.items()
        for shard in shards_of("images", split, plan.shard_rows(count))
    ]
    mine = crew.mine(shards)
    todo = [shard for shard in mine if not finished(partial, shard.name)]
    tasks = [(partial, plan, shard, settings.resize) for shard in todo]
    total, left = (sum(shard.rows for shard in part) for part in (mine, todo))
    with _bar("write images", total, total - left) as bar:
        for written in workers.each(write_images, tasks, 2 * settings.processes):
            bar.update(written)
            crew.check()
    return [shard.name for shard in shards]


def _all_finished(partial: Path, names: list[str], crew: Crew) -> dict[str, dict]:
    """The journal's entries of all shards, with the number of truncated captions as "cut".

    Waits while other processes write some.
    """
    for name in names:
        crew.wait(lambda: finished(partial, name))
    entries = {name: finished(partial, name) for name in names}
    return {name: entry | {"cut": len(entry.get("cut", ()))} for name, entry in entries.items()}


def _bar(name: str, total: int, done: int) -> tqdm:
    return tqdm(desc=name, total=total, initial=done, unit="", disable=None)


def _report(manifest: Mapping, output: Path, seconds: float) -> None:
    counts = manifest["counts"]
    size = sum(entry["bytes"] for entry in manifest["shards"].values())
    images = ", ".join(f"{count} {split}" for split, count in counts["images"].items())
    print(
        f"{output}: {images} images, smallest side {manifest['image_sizes']['min_side']} pixels,"
        f" {counts['captions']} captions, {size / 2**20:.1f} MiB, {seconds:.0f} s"
    )
    print(
        f"skipped or noted in skipped.jsonl: {listed(counts['skipped'])},"
        f" {counts['truncated_captions']} truncated_caption"
    )
