"""Makes prepared data: ingests the images, encodes the captions, completes the directory.

All is written into OUTPUT, the manifest last. A journal in OUTPUT/partial lists the finished
shards, so the same call continues an interrupted run, with any number of processes, and produces
the same bytes.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from imagen_jax.data import first_records, manifest_file
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
    earlier_work,
    locked,
    remove_work,
    work_directory,
)
from imagen_jax.data.sources.source import Source
from imagen_jax.data.workers import Workers
from imagen_jax.distributed import agreement, shared_files, startup
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.many_files import each
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import as_path, exists, file_sizes, remove, write_atomically
from imagen_jax.text_inputs import UNNAMED

Ingest = Callable[[Workers, Source, AnyPath, Settings, At], Plan]
log = logging.getLogger(__name__)


def prepare(
    source: Source,
    encoders: Encoders | None,
    output: AnyPath,
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
      ValueError: `output` was made with other settings or is something else, nothing in the source
        is usable, or the disk has no room for the result.
    """
    started, partial = time.monotonic(), work_directory(output)
    request = request_of(source, encoders, settings)
    agreement.check({"--output": str(output)} | {k: json.dumps(v) for k, v in request.items()})
    if _complete_for_all(output, request):
        _say(f"{output} is already complete")
        _remove_left_over(output)
        return manifest_file.read_manifest(output)
    with _shared_work(output):
        if agreement.is_first():
            _begin(source, encoders, output, settings, request)
        shared_files.wait_for_files([partial / REQUEST])
        # Each worker process opens the bucket.
        start = functools.partial(as_path, "--output", os.fspath(output))
        with Workers(source, settings.processes, start) as workers:
            plan = ingest(workers, source, partial, settings, at)
            if encoders is not None:
                at("encode captions")
                captions.encode_all(workers, encoders, partial, plan, settings)
        agreement.gather()
        if encoders is None:
            _say(
                f"the images are in {output}; the same command with --encoder NAME in place of"
                " --images_only continues"
            )
            return {}
        at("complete the data")
        if agreement.is_first():
            _complete(output, request, plan)
        shared_files.wait_for_files([output / manifest_file.MANIFEST])
    manifest = manifest_file.read_manifest(output)
    if agreement.is_first():
        _remove(partial)
        _report(manifest, output, time.monotonic() - started)
    return manifest


def _say(line: str) -> None:
    """Prints a line in process 0."""
    if agreement.is_first():
        print(line)


def _complete_for_all(output: AnyPath, request: Mapping) -> bool:
    """Whether process 0 finds the result complete, see `_is_complete`."""
    return agreement.first_says(agreement.is_first() and _is_complete(output, request))


def _remove_left_over(output: AnyPath) -> None:
    """Removes the work directory of a finished run that was killed before it did so."""
    if not agreement.is_first():
        return
    if exists(partial := work_directory(output)):
        with locked(output):
            pass  # no other process uses it
        _remove(partial)
    if not in_bucket(output) and (earlier_work(output) / REQUEST).is_file():
        _remove(earlier_work(output))


def _remove(partial: AnyPath) -> None:
    """Removes a work directory that is not needed any more; the next command tries it again."""
    try:
        remove(partial)
    except OSError as error:
        log.warning("%s could not be removed: %s", partial, error)


@contextlib.contextmanager
def _shared_work(output: AnyPath) -> Iterator[None]:
    """The work directory, locked by process 0, while the context lasts."""
    with contextlib.ExitStack() as stack:
        if agreement.is_first():
            stack.enter_context(locked(output))
        shared_files.check_shared(work_directory(output))
        yield


def _begin(
    source: Source,
    encoders: Encoders | None,
    output: AnyPath,
    settings: Settings,
    request: Mapping,
) -> None:
    """Continues unfinished work of the same request, or begins if there is room on the disk."""
    partial = work_directory(output)
    before = read_request(partial) if exists(partial / REQUEST) else {}
    if before and _selected_nothing(partial):
        remove_work(partial)
        before = {}
    if before:
        refuse_changes(output, before, request)
        print(f"continuing {output}")
    if not before or (has_text(request) and not has_text(before)):
        _check_room(source, encoders, output, settings, images=not before)
    write_atomically(partial / REQUEST, json.dumps({**before, **request}).encode())


def _selected_nothing(partial: AnyPath) -> bool:
    """Whether an earlier run ended because no image was usable."""
    plan = partial / "plan"
    return exists(plan / PLAN) and not any(Plan(plan).images.values())


def _complete(output: AnyPath, request: Mapping, plan: Plan) -> None:
    """Writes what is missing beside the shards, the manifest last."""
    partial = work_directory(output)
    images = all_finished(partial, image_shards(plan))
    names = [UNNAMED] if "encoder" in request else list(request["encoders"])
    texts = {} if names == [UNNAMED] else all_finished(partial, captions.text_shards(plan))
    shards = {name: captions.feature_shards(plan, name) for name in names}
    features = {name: all_finished(partial, of_encoder) for name, of_encoder in shards.items()}
    cut = {name: _cut_captions(partial, shards[name], features[name]) for name in names}
    finish(output, request, plan, texts, features, images, cut)


def _cut_captions(
    partial: AnyPath, shards: Iterable[Shard], entries: Mapping[str, Mapping]
) -> Iterator[Sequence[int]]:
    """The ids of the truncated captions of each shard."""
    read = lambda shard: captions.cut_captions(partial, shard) if entries[shard.name]["cut"] else ()
    return each(read, shards, partial)


def _check_room(
    source: Source, encoders: Encoders | None, output: AnyPath, settings: Settings, images: bool
) -> None:
    """Raises ValueError if the disk has no room for captions and, if asked, images and work.

    For a result in a bucket, the local disk needs room for a shard of each worker process and for
    the selection.
    """
    size = preview(source, encoders, settings, len(startup.hosts()) or 1)
    if in_bucket(output):
        place, remedy = tempfile.gettempdir(), "make room or set TMPDIR to another directory"
        shards = max(1, len(source) // settings.shard_size)
        need = max(images * size.images, size.captions) * settings.processes // shards
    else:
        place, remedy = os.fspath(output), "make room or choose another --output"
        need = images * size.images + size.captions
    room = shutil.disk_usage(place).free
    if need + images * size.work > room:
        raise ValueError(f"only {room / 2**20:.0f} MiB are free in {place}: {remedy}")


def _is_complete(output: AnyPath, request: Mapping) -> bool:
    """Whether `output` is the finished result of this request; False if absent or unfinished.

    Raises:
      ValueError: it is anything else.
    """
    check_output(output)
    if not exists(output / manifest_file.MANIFEST):
        return False
    manifest = manifest_file.read_manifest(output)
    refuse_changes(output, manifest, request)
    firsts = {} if in_bucket(output) else first_records.read(output, manifest["hash"])
    stores = {name.partition("/")[0] for name in manifest["shards"]}
    sizes = {
        f"{store}/{name}": size
        for store in stores
        for name, size in file_sizes(output / store).items()
    }
    for name, entry in manifest["shards"].items():
        if sizes.get(name) != entry["bytes"]:
            raise ValueError(
                f"{output / name} is missing or cut short: remove {output} and prepare it again"
            )
        first = firsts.get(name)
        if first and first_records.of_file(output / name) != first:
            raise ValueError(
                f"{output / name} is damaged or another shard than the manifest lists: remove"
                f" {output} and prepare it again"
            )
    return True


def _report(manifest: Mapping, output: AnyPath, seconds: float) -> None:
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
