"""Makes prepared data: ingests the images, encodes the captions, completes the directory.

All work is in OUTPUT.partial, which holds `result`, renamed to OUTPUT at the end. A journal there
lists the finished shards, so the same call continues an interrupted run, with any number of
processes, and produces the same bytes.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.data import first_records, records
from imagen_jax.data.prepare import captions
from imagen_jax.data.prepare.ingest import At, image_shards
from imagen_jax.data.prepare.ingest import ingest as ingest_here
from imagen_jax.data.prepare.kept import PLAN, Plan
from imagen_jax.data.prepare.manifest import finish, listed
from imagen_jax.data.prepare.preview import preview
from imagen_jax.data.prepare.request import (
    REQUEST,
    has_text,
    read_request,
    refuse_changes,
    request_of,
)
from imagen_jax.data.prepare.settings import Settings
from imagen_jax.data.prepare.shards import Shard, all_finished
from imagen_jax.data.prepare.work_directory import (
    check_output,
    locked,
    remove_empty,
    remove_work,
    work_directory,
)
from imagen_jax.data.sources.source import Source
from imagen_jax.data.workers import Workers
from imagen_jax.distributed import agreement, startup
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.storage import write_atomically
from imagen_jax.text_inputs import UNNAMED

Ingest = Callable[[Workers, Source, Path, Settings, At], Plan]


def prepare(
    source: Source,
    encoders: Encoders | None,
    output: Path,
    settings: Settings,
    ingest: Ingest = ingest_here,
    at: At = lambda _: None,
) -> dict[str, Any]:
    """Writes the prepared directory `output`, or continues it. All processes of the run call it.

    Args:
      encoders: the text encoders; None to stop when the images are stored. The same call with
        encoders continues.
      ingest: checks, selects and stores the images, see `ingest.ingest`.
      at: called with the name of each phase as it begins.

    Returns:
      The manifest; {} without `encoders`.

    Raises:
      ValueError: `output` or its unfinished part was made with other settings, `output` cannot be
        replaced, nothing in the source is usable, or the disk has no room for the result.
    """
    started, partial = time.monotonic(), work_directory(output)
    request = request_of(source, encoders, settings)
    agreement.check({"--output": str(output)} | {k: json.dumps(v) for k, v in request.items()})
    if _complete_for_all(output, request):
        _say(f"{output} is already complete")
        _remove_left_over(partial)
        return records.Prepared(output).manifest
    with _shared_work(output):
        if agreement.is_first():
            _begin(source, encoders, partial, settings, request)
        agreement.wait_for_files([partial / REQUEST])
        with Workers(source, settings.processes) as workers:
            plan = ingest(workers, source, partial, settings, at)
            if encoders is not None:
                at("encode captions")
                captions.encode_all(workers, encoders, partial, plan, settings)
        agreement.gather()
        if encoders is None:
            _say(
                f"the images are in {partial}; the same command with --encoder NAME in place of"
                " --images_only continues"
            )
            return {}
        at("complete the data")
        if agreement.is_first():
            _publish(output, request, plan)
        agreement.wait_for_files([output / records.MANIFEST])
    manifest = records.Prepared(output).manifest
    if agreement.is_first():
        shutil.rmtree(partial, ignore_errors=True)
        _report(manifest, output, time.monotonic() - started)
    return manifest


def _say(line: str) -> None:
    """Prints a line in process 0."""
    if agreement.is_first():
        print(line)


def _complete_for_all(output: Path, request: Mapping) -> bool:
    """Whether process 0 finds the result complete, see `_is_complete`."""
    return agreement.first_says(agreement.is_first() and _is_complete(output, request))


def _remove_left_over(partial: Path) -> None:
    """Removes the work directory of a finished run that was killed before it did so."""
    if agreement.is_first() and partial.exists():
        with locked(partial):
            shutil.rmtree(partial)


@contextlib.contextmanager
def _shared_work(output: Path) -> Iterator[None]:
    """The work directory, locked by process 0, while the context lasts."""
    partial = work_directory(output)
    with contextlib.ExitStack() as stack:
        if agreement.is_first():
            remove_empty(output)
            stack.enter_context(locked(partial))
        agreement.check_shared(partial)
        yield


def _begin(
    source: Source,
    encoders: Encoders | None,
    partial: Path,
    settings: Settings,
    request: Mapping,
) -> None:
    """Continues unfinished work of the same request, or begins if there is room on the disk."""
    before = read_request(partial) if (partial / REQUEST).is_file() else {}
    if before and _selected_nothing(partial):
        remove_work(partial)
        before = {}
    if before:
        refuse_changes(partial, before, request)
        print(f"continuing {partial}")
    if not before or (has_text(request) and not has_text(before)):
        _check_room(source, encoders, partial, settings, images=not before)
    write_atomically(partial / REQUEST, json.dumps({**before, **request}).encode())


def _selected_nothing(partial: Path) -> bool:
    """Whether an earlier run ended because no image was usable."""
    plan = partial / "plan"
    return (plan / PLAN).is_file() and not any(Plan(plan).images.values())


def _publish(output: Path, request: Mapping, plan: Plan) -> None:
    """Completes the result and renames it to `output`."""
    partial = work_directory(output)
    images = all_finished(partial, image_shards(plan))
    names = [UNNAMED] if "encoder" in request else list(request["encoders"])
    texts = {} if names == [UNNAMED] else all_finished(partial, captions.text_shards(plan))
    shards = {name: captions.feature_shards(plan, name) for name in names}
    features = {name: all_finished(partial, of_encoder) for name, of_encoder in shards.items()}
    cut = {name: _cut_captions(partial, shards[name], features[name]) for name in names}
    finish(partial / "result", request, plan, texts, features, images, cut)
    os.rename(partial / "result", output)


def _cut_captions(
    partial: Path, shards: Iterable[Shard], entries: Mapping[str, Mapping]
) -> Iterator[Sequence[int]]:
    """The ids of the truncated captions of each shard."""
    for shard in shards:
        yield captions.cut_captions(partial, shard) if entries[shard.name]["cut"] else ()


def _check_room(
    source: Source, encoders: Encoders | None, partial: Path, settings: Settings, images: bool
) -> None:
    """Raises ValueError if the disk has no room for captions and, if asked, images and work."""
    room = shutil.disk_usage(partial).free
    size = preview(source, encoders, settings, len(startup.hosts()) or 1)
    if size.captions + images * (size.images + size.work) > room:
        raise ValueError(
            f"only {room / 2**20:.0f} MiB are free in {partial.parent}: make room or choose"
            " another --output"
        )


def _is_complete(output: Path, request: Mapping) -> bool:
    """Whether `output` is the finished result of this request; False if absent or empty.

    Raises:
      ValueError: it is anything else, or cannot be replaced.
    """
    check_output(output)
    if not (output / records.MANIFEST).is_file():
        return False
    prepared = records.Prepared(output)
    refuse_changes(output, prepared.manifest, request)
    for name, entry in prepared.manifest["shards"].items():
        if (output / name).stat().st_size != entry["bytes"]:
            raise ValueError(f"{output / name} is cut short: remove {output} and prepare it again")
        first = prepared.first_sums.get(name)
        if first and first_records.of_file(output / name) != first:
            raise ValueError(
                f"{output / name} is damaged or another shard than the manifest lists: remove"
                f" {output} and prepare it again"
            )
    return True


def _report(manifest: Mapping, output: Path, seconds: float) -> None:
    counts = manifest["counts"]
    size = sum(entry["bytes"] for entry in manifest["shards"].values())
    images = ", ".join(f"{count} {split}" for split, count in counts["images"].items())
    print(
        f"{output}: {images} images, smallest side {manifest['image_sizes']['min_side']} pixels,"
        f" {counts['captions']} captions, {size / 2**20:.1f} MiB, {seconds:.0f} s"
    )
    truncated = counts["truncated_captions"]
    if isinstance(truncated, int):
        truncated = {"truncated_caption": truncated}
    else:
        truncated = {f"truncated_caption of {name}": n for name, n in truncated.items()}
    told = counts["skipped"] | {reason: count for reason, count in truncated.items() if count}
    print(f"skipped or noted in skipped.jsonl: {listed(told)}")
    for line in _encoders(manifest):
        print(line)
    wanted = manifest["source"].get("heldout", 0)
    if wanted and not counts["images"]["heldout"]:
        print(
            f"warning: --heldout {wanted:g} holds out none of these images: give a larger fraction"
        )
    elif not counts["images"]["heldout"]:
        print("note: no image is held out, so validation and evaluate read training images")


def _encoders(manifest: Mapping) -> Iterator[str]:
    """A line for each text encoder, with what a config that reads it needs to know."""
    named = "encoders" in manifest
    identities = manifest["encoders"] if named else {UNNAMED: manifest["encoder"]}
    for name, identity in identities.items():
        longest = (manifest["embedding"][name] if named else manifest["embedding"])["length"]["max"]
        pooled_dim = identity.get("pooled_dim", 0)
        pooled = f"a pooled vector of width {pooled_dim}" if pooled_dim else "no pooled vector"
        yield (
            f"text encoder {f'{name} = ' * named}{identity['name']}: features of width"
            f" {identity['dim']}, captions of up to {longest} tokens{f', {pooled}' * named}"
        )
