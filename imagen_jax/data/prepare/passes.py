"""Makes prepared data: ingests the images, encodes the captions, completes the directory.

All work is in OUTPUT.partial, which holds `result`, renamed to OUTPUT at the end. A journal there
lists the finished shards, so the same call continues an interrupted run, with any number of
processes, and produces the same bytes.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from imagen_jax.data import records
from imagen_jax.data.prepare import captions
from imagen_jax.data.prepare.ingest import At, image_shards
from imagen_jax.data.prepare.ingest import ingest as ingest_here
from imagen_jax.data.prepare.kept import PLAN, Plan
from imagen_jax.data.prepare.manifest import finish, listed
from imagen_jax.data.prepare.preview import preview
from imagen_jax.data.prepare.resize import AS_IS, Resize
from imagen_jax.data.prepare.shards import AGAIN, all_finished
from imagen_jax.data.sources.source import Source
from imagen_jax.data.workers import Workers
from imagen_jax.distributed import agreement, startup
from imagen_jax.storage import check_object, only_process, read_object, write_atomically

REQUEST = "request.json"
SHARD_INDEX = "index.jsonl"  # in the work directory, see sources.shard_index
DIRECTORIES = ("checked", "journal", "plan", "result")  # of the work directory
# Everything that the written bytes depend on, each a key of the manifest. A run continues only if
# all of them are equal. Those of the second line are there once captions are encoded.
_IMAGE_KEYS = {"source": dict, "shard_size": int, "min_size": int}
_TEXT_KEYS = {"encoder": dict, "max_length": int, "batch_size": int}
# Keys that are only there if images are stored resized, with what their absence means.
_ABSENT = {"store_size": 0, "store_format": "none"}
# The same for features that are not in bfloat16, once captions are encoded.
_ABSENT_TEXT = {"embedding_dtype": records.EMBEDDINGS[0]}
Ingest = Callable[[Workers, Source, Path, "Settings", At], Plan]


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
    source: Source,
    encoder,
    output: Path,
    settings: Settings,
    ingest: Ingest = ingest_here,
    at: At = lambda _: None,
) -> dict[str, Any]:
    """Writes the prepared directory `output`, or continues it. All processes of the run call it.

    Args:
      encoder: a text.encoder.TextEncoder; None to stop when the images are stored. The same call
        with an encoder continues.
      ingest: checks, selects and stores the images, see `ingest.ingest`.
      at: called with the name of each phase as it begins.

    Returns:
      The manifest; {} without an encoder.

    Raises:
      ValueError: `output` or its unfinished part was made with other settings, `output` cannot be
        replaced, nothing in the source is usable, or the disk has no room for the result.
    """
    started, partial = time.monotonic(), work_directory(output)
    request = _request(source, encoder, settings)
    agreement.check({"--output": str(output)} | {k: json.dumps(v) for k, v in request.items()})
    if _complete_for_all(output, request):
        _say(f"{output} is already complete")
        _remove_left_over(partial)
        return records.Prepared(output).manifest
    with _shared_work(output):
        if agreement.is_first():
            _begin(source, encoder, partial, settings, request)
        agreement.wait_for_files([partial / REQUEST])
        with Workers(source, settings.processes) as workers:
            plan = ingest(workers, source, partial, settings, at)
            if encoder is not None:
                at("encode captions")
                captions.encode_all(workers, encoder, partial, plan, settings)
        agreement.gather()
        if encoder is None:
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


def check_work_directory(partial: Path) -> None:
    """Raises ValueError if `partial` exists and is something else than a work directory.

    Also if it is on another file system than its parent: the result could not be renamed.
    """
    if partial.exists() and partial.stat().st_dev != partial.parent.stat().st_dev:
        raise ValueError(
            f"{partial} is on another file system than {partial.parent}: remove it, and give an"
            " --output on the file system that has the room"
        )
    known = {*DIRECTORIES, "hosts.json", "lock", REQUEST, SHARD_INDEX}
    found = {path.name for path in partial.iterdir()} if partial.exists() else set()
    foreign = {name for name in found - known if not re.fullmatch(r"\..*\.tmp", name)}
    if REQUEST not in found:  # then nothing has been written
        foreign |= {name for name in found & {*DIRECTORIES} if any((partial / name).iterdir())}
    if foreign:
        raise ValueError(
            f"{partial} is in the way and is not unfinished work of prepare_data: choose another"
            " --output"
        )


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
        with _locked(partial):
            shutil.rmtree(partial)


@contextlib.contextmanager
def _shared_work(output: Path) -> Iterator[None]:
    """The work directory, locked by process 0, while the context lasts."""
    partial = work_directory(output)
    with contextlib.ExitStack() as stack:
        if agreement.is_first():
            _remove_empty(output)
            stack.enter_context(_locked(partial))
        agreement.check_shared(partial)
        yield


def _begin(source: Source, encoder, partial: Path, settings: Settings, request: Mapping) -> None:
    """Continues unfinished work of the same request, or begins if there is room on the disk."""
    before = _read_request(partial) if (partial / REQUEST).is_file() else {}
    if before and _selected_nothing(partial):
        _remove_work(partial)
        before = {}
    if before:
        _refuse_changes(partial, before, request)
        print(f"continuing {partial}")
    if not before or ("encoder" in request and "encoder" not in before):
        _check_room(source, encoder, partial, settings, images=not before)
    write_atomically(partial / REQUEST, json.dumps({**before, **request}).encode())


def _selected_nothing(partial: Path) -> bool:
    """Whether an earlier run ended because no image was usable."""
    plan = partial / "plan"
    return (plan / PLAN).is_file() and not any(Plan(plan).images.values())


def _remove_work(partial: Path) -> None:
    for name in DIRECTORIES:
        shutil.rmtree(partial / name)
        (partial / name).mkdir()


def _publish(output: Path, request: Mapping, plan: Plan) -> None:
    """Completes the result and renames it to `output`."""
    partial = work_directory(output)
    caption_shards = captions.caption_shards(plan)
    text = all_finished(partial, caption_shards)
    pictures = all_finished(partial, image_shards(plan))
    cut = (captions.cut_captions(partial, shard) for shard in caption_shards)
    finish(partial / "result", request, plan, text, pictures, cut)
    os.rename(partial / "result", output)


def _check_room(source: Source, encoder, partial: Path, settings: Settings, images: bool) -> None:
    """Raises ValueError if the disk has no room for captions and, if asked, images and work."""
    room = shutil.disk_usage(partial).free
    size = preview(source, encoder, settings, len(startup.hosts()) or 1)
    if size.captions + images * (size.images + size.work) > room:
        raise ValueError(
            f"only {room / 2**20:.0f} MiB are free in {partial.parent}: make room or choose"
            " another --output"
        )


def _request(source: Source, encoder, settings: Settings) -> dict[str, Any]:
    resize = settings.resize
    text = {"encoder": dict(encoder.identity), "max_length": encoder.max_length} if encoder else {}
    sizes = {"shard_size": settings.shard_size, "min_size": settings.min_size}
    batch = {"batch_size": settings.batch_size} if encoder else {}
    stored = {"store_size": resize.side, "store_format": resize.format} if resize.side else {}
    request = {"source": source.describe()} | text | sizes | batch | stored
    if encoder and settings.embedding != _ABSENT_TEXT["embedding_dtype"]:
        request["embedding_dtype"] = settings.embedding
    return json.loads(json.dumps(request))


def _is_complete(output: Path, request: Mapping) -> bool:
    """Whether `output` is the finished result of this request; False if absent or empty.

    Raises:
      ValueError: it is anything else, or cannot be replaced.
    """
    check_output(output)
    if not (output / records.MANIFEST).is_file():
        return False
    prepared = records.Prepared(output)
    _refuse_changes(output, prepared.manifest, request)
    for name, entry in prepared.manifest["shards"].items():
        if (output / name).stat().st_size != entry["bytes"]:
            raise ValueError(f"{output / name} is cut short: remove {output} and prepare it again")
    return True


def _read_request(partial: Path) -> dict[str, Any]:
    file, remedy = partial / REQUEST, f"remove {partial}; {AGAIN}"
    request = read_object(file, _IMAGE_KEYS, remedy)
    check_object(file, _ABSENT | request, {"store_size": int, "store_format": str}, remedy)
    if "encoder" in request:
        check_object(file, _ABSENT_TEXT | request, _TEXT_KEYS | {"embedding_dtype": str}, remedy)
    return request


def _refuse_changes(directory: Path, before: Mapping, request: Mapping) -> None:
    before, request = (
        _ABSENT | (_ABSENT_TEXT if "encoder" in keys else {}) | keys for keys in (before, request)
    )
    keys = (*_IMAGE_KEYS, *_TEXT_KEYS, *_ABSENT, *_ABSENT_TEXT)
    changed = [
        line
        for key in keys
        if key in before and key in request
        for line in _differences(key, before[key], request[key])
    ]
    if changed:
        raise ValueError(
            f"{directory} was made with other settings ({'; '.join(changed)}): choose another"
            f" --output or remove {directory}"
        )


def _differences(name: str, before: Any, now: Any) -> list[str]:
    """What differs between two values, for a message; of objects only the differing parts."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = dict.fromkeys([*before, *now])
        parts = (_differences(f"{name}.{part}", before.get(part), now.get(part)) for part in names)
        return [line for lines in parts for line in lines]
    return [] if before == now else [f"{name} was {before}, is {now}"]


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Creates the work directory and locks it for this process."""
    check_work_directory(partial)
    for name in DIRECTORIES:
        (partial / name).mkdir(parents=True, exist_ok=True)
    with only_process(partial, "preparing data in"):
        for left in partial.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
        yield


def _report(manifest: Mapping, output: Path, seconds: float) -> None:
    counts = manifest["counts"]
    size = sum(entry["bytes"] for entry in manifest["shards"].values())
    images = ", ".join(f"{count} {split}" for split, count in counts["images"].items())
    print(
        f"{output}: {images} images, smallest side {manifest['image_sizes']['min_side']} pixels,"
        f" {counts['captions']} captions, {size / 2**20:.1f} MiB, {seconds:.0f} s"
    )
    truncated = {"truncated_caption": counts["truncated_captions"]}
    told = counts["skipped"] | (truncated if truncated["truncated_caption"] else {})
    print(f"skipped or noted in skipped.jsonl: {listed(told)}")
    wanted = manifest["source"].get("heldout", 0)
    if wanted and not counts["images"]["heldout"]:
        print(
            f"warning: --heldout {wanted:g} holds out none of these images: give a larger fraction"
        )
