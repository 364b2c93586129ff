"""Checkpoints of the training state: directories with a checksum of every file.

    workdir/checkpoints/1200/meta.json     {"format_version", "step", "leaves": {path: [shape,
                                           dtype]}, "meta": given by the caller of `save`}
    workdir/checkpoints/1200/state/...     orbax; one array per leaf, named by its path,
                                           "ema/down_0/block_0/conv_1/kernel"
    workdir/checkpoints/1200/SHA256SUMS    checksums of all other files of the directory;
                                           `sha256sum -c SHA256SUMS` checks it without Python

SHA256SUMS is written when all other files have been stored, and deleted first. So a kill at any
moment leaves a complete checkpoint or a directory that readers ignore, on a local file system and
in a bucket, which cannot rename directories (see `step_directories`). SHA256SUMS also detects later
damage: orbax restores most flipped bits without an error.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from imagen_jax.checksums import CHECKSUMS, find_damage, seal, sha256_file
from imagen_jax.distributed import agreement
from imagen_jax.exit_codes import HardwareFault
from imagen_jax.object_storage import AnyPath, bucket_errors
from imagen_jax.storage import (
    FREE_SPACE,
    absolute,
    as_path,
    check_utf8,
    disk_limit,
    remove,
    write_atomically,
)
from imagen_jax.weights import retention, step_directories
from imagen_jax.weights.exports import check_which, read_export
from imagen_jax.weights.leaves import (
    FORMAT_VERSION,
    REMEDY,
    CheckpointError,
    Tree,
    check_leaves,
    first_line,
    flatten,
    parse_dtype,
    read_document,
    to_json,
    unflatten,
)
from imagen_jax.weights.retention import META, Retention

RAISED_EVERYWHERE = (FloatingPointError, HardwareFault)  # by all processes at the same step

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    With several processes, all of them call every method except `steps`.

    A context manager: leaving it waits for the save in progress. If the interpreter exits during a
    save, the save never completes, because orbax's thread pools no longer accept work.
    """

    def __init__(self, directory: str | os.PathLike, retention: Retention):
        """directory: created by the first save. retention: which checkpoints stay.

        Raises ValueError if `directory` is a URL of an unknown scheme.
        """
        check_utf8("checkpoint directory", directory)
        self.directory = absolute(as_path("checkpoint directory", directory))
        self._retention = retention
        self._verified: int | None = None  # verified by `latest_good` and not yet restored
        self._damaged: set[int] = set()
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._current: int | None = None  # the step last saved or restored
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None

    def steps(self) -> list[int]:
        """The steps that have a directory, oldest first. `latest_good` checks their content."""
        return step_directories.steps(self.directory)

    def save(
        self,
        step: int,
        state: Tree,
        meta: Mapping[str, Any],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts an asynchronous save. Returns as soon as `state` has been copied to the host.

        The caller may then donate its arrays. Waits for the previous save. Does nothing for the
        step that this object saved or restored last. Renames a damaged directory of `step` to
        "<step>.damaged".

        state: pytree of arrays, none of size zero; no key contains "/". meta: JSON; `restore`
        returns it with `step` and `format_version` added. before_commit: called in process 0 before
        the checkpoint becomes complete, in another thread, to store what a resume from it needs.

        Raises:
            ValueError: a leaf cannot be stored, `meta` is not JSON, or an intact checkpoint of
                `step` exists.
            CheckpointError: the previous save failed.
        """
        self.wait()
        if step == self._current:
            return
        leaves = flatten(state)
        document = _document(step, leaves, meta)
        if reason := self._make_room(step):
            failed = concurrent.futures.Future()
            failed.set_exception(OSError(reason))
            self._saving = step, failed
            return
        if self._thread is None:
            self._thread = concurrent.futures.ThreadPoolExecutor(
                max_workers=1, thread_name_prefix="checkpoint"
            )
        # Uncompressed: compression saved 30 % of the bytes of fp32 weights but made saving three
        # times slower.
        context = ocp.Context()
        context.array.saving.use_compression = False
        with context, jax.transfer_guard("allow"):
            response = ocp.save_async(self.directory / str(step), leaves)
        self._saving = (
            step,
            self._thread.submit(self._commit, step, response.result, document, before_commit),
        )

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises CheckpointError in every process if the save failed in any process.
        """
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        error = future.exception()
        reasons = [
            reason for reason in agreement.gather(first_line(error) if error else "") if reason
        ]
        if reasons:
            text = f"checkpoint {step} was not saved in {self.directory}: {reasons[0]}"
            if number := disk_limit(reasons[0]):
                raise CheckpointError(f"{text}; {FREE_SPACE}") from OSError(number, reasons[0])
            raise CheckpointError(text) from error
        self._current = step

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Waits for the save, unless an error ends a multi-process run: others may be gone."""
        if error is None:
            return self.wait()
        if jax.process_count() > 1 and not isinstance(error, RAISED_EVERYWHERE):
            return
        try:
            self.wait()
        except CheckpointError as failure:
            log.error("%s", failure)

    def latest_good(self) -> int | None:
        """The newest step whose files match their checksums, None if there is no checkpoint.

        Logs each damaged step. Raises CheckpointError if all checkpoints are damaged.
        """
        newest, damage = None, ""
        if jax.process_index() == 0:
            try:
                newest = step_directories.newest_intact(self.directory, self._damaged.add)
            except CheckpointError as error:
                damage = str(error)
        newest, damage = json.loads(agreement.gather(json.dumps([newest, damage]))[0])
        if damage:
            raise CheckpointError(damage)
        if newest is not None:
            self._verified = newest
        return newest

    def meta(self, step: int) -> dict[str, Any]:
        """The meta of a step that `latest_good` returned, without reading the state."""
        return _meta(read_document(self.directory / str(step) / META))

    def restore(self, step: int, abstract_state: Tree) -> tuple[Tree, dict[str, Any]]:
        """Verifies and reads a checkpoint: (state, meta).

        abstract_state: the state's structure with jax.ShapeDtypeStruct (or arrays) as leaves, on
        any mesh. Each array gets the sharding of its leaf.

        Raises:
            CheckpointError: the checkpoint does not exist, is damaged, or cannot be read.
            ValueError: a leaf is missing, unexpected, or has another shape or dtype; or a leaf of
                `abstract_state` has no sharding.
        """
        directory = self.directory / str(step)
        if step != self._verified:
            reason = find_damage(directory) if jax.process_index() == 0 else None
            reason = agreement.gather(reason or "")[0]
            if reason:
                raise CheckpointError(f"checkpoint {directory} cannot be used: {reason}")
        document = read_document(directory / META)
        wanted = flatten(abstract_state)
        check_leaves(directory, document["leaves"], wanted)
        abstract = {
            path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
            for path, a in wanted.items()
        }
        loaded = _load(directory, abstract, partial=False)
        self._verified, self._current = None, step
        return jax.tree.unflatten(
            jax.tree.structure(abstract_state), [loaded[path] for path in wanted]
        ), _meta(document)

    def _make_room(self, step: int) -> str:
        """Removes leftovers of killed processes, renames a damaged directory of `step`, and
        announces the save. Returns why that failed, "" if it did not.
        """
        intact, failure = False, ""
        if jax.process_index() == 0:
            try:
                intact = self._holds_intact(step)
                if not intact:
                    step_directories.remove_leftovers(self.directory)
                    mark = step_directories.mark_path(self.directory, step, "writing")
                    write_atomically(mark, b"")
            except OSError as error:  # a full disk, or a bucket that is away; `wait` reports it
                failure = error.strerror or first_line(error)
        # No process writes before the leftovers are removed.
        intact, failure = json.loads(agreement.gather(json.dumps([intact, failure]))[0])
        if intact:
            raise ValueError(
                f"{self.directory / str(step)} already holds an intact checkpoint; delete it, or"
                " use another workdir"
            )
        return failure

    def _holds_intact(self, step: int) -> bool:
        """Whether there is an intact checkpoint of `step`. Renames a damaged one."""
        target = self.directory / str(step)
        if step not in self.steps():
            return False
        if (reason := find_damage(target)) is None:
            return True
        step_directories.keep_aside(target, reason)
        self._damaged.discard(step)
        return False

    def _commit(
        self,
        step: int,
        written: Callable[[], None],
        document: str,
        before_commit: Callable[[], None],
    ) -> None:
        """Runs in the background: waits for orbax, seals the directory, deletes old checkpoints.

        written: returns when orbax has written the arrays; raises its error.
        """
        written()
        if jax.process_index() != 0:
            return
        before_commit()
        write_atomically(self.directory / str(step) / META, document.encode())
        seal(self.directory / str(step))
        remove(step_directories.mark_path(self.directory, step, "writing"))
        step_directories.delete_old(self.directory, step, self._damaged, self._retention.to_delete)


def load_params(
    path: str | os.PathLike, which: str = "ema"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads one parameter tree to host memory: (nested dict of NumPy arrays, meta).

    Reads no other array, and needs no device or mesh. bfloat16 arrays have the dtype
    ml_dtypes.bfloat16. `meta` also has "which", and "sha256": the checksum of the file, or of the
    checkpoint's SHA256SUMS.

    path: see `opened`.
    which: "ema", "params", or "ema_1", "ema_2" ... for an EMA of optim.ema_tracks. An exported file
        holds one tree; "ema", the default, takes it whatever it is.

    Raises CheckpointError if `path` does not exist, is damaged or was not written by this package;
    ValueError if the state or the exported file has no such tree.
    """
    if not re.fullmatch(r"ema|params|ema_[1-9]\d*", which):
        raise ValueError(f"weights {which!r} are unknown: choose ema, params, or ema_1, ema_2 ...")
    with opened(path) as verified:
        return read_params(verified, which)


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[AnyPath]:
    """The verified directory of one step, or the file, that `path` means.

    path: a workdir or its checkpoints directory (its newest intact step), WORKDIR@STEP or
    WORKDIR@best, the directory of one step, or a file by `export_params`. While the context lasts,
    a trainer does not delete the step.

    Raises CheckpointError if there is none or it is damaged.
    """
    check_utf8("checkpoint", path)
    workdir, step = split_step(absolute(as_path("checkpoint", path)))
    path = workdir if step is None else step_parent(workdir) / str(step)
    with bucket_errors(path):
        is_file, has_checkpoints = path.is_file(), (path / "checkpoints").is_dir()
        is_step = path.name.isdigit() and path.is_dir() and not has_checkpoints
    if is_file:
        yield path
    elif is_step:
        with step_directories.marked(path):
            if reason := find_damage(path):
                raise CheckpointError(f"checkpoint {path} cannot be used: {reason}")
            yield path
    else:
        directory = step_parent(path)
        with step_directories.marked_newest(directory) as step:
            if step is None:
                raise CheckpointError(
                    f"{path} holds no checkpoint: give a workdir, its checkpoints directory, one"
                    " checkpoint, or an exported .safetensors file"
                )
            yield directory / str(step)


def split_step(path: AnyPath) -> tuple[AnyPath, int | None]:
    """(WORKDIR, STEP) of WORKDIR@STEP; WORKDIR@best is the step with the lowest measure.

    (path, None) for a path without a step. Raises CheckpointError if there is no such step.
    """
    workdir, name = step_directories.split_name(path)
    if not name:
        return workdir, None
    if name == "best":
        return workdir, retention.best_step(step_parent(workdir))
    found = step_directories.steps(step_parent(workdir))
    if int(name) not in found:
        known = f"its steps are {', '.join(map(str, found))}" if found else "it has none"
        raise CheckpointError(f"{workdir} has no checkpoint of step {name}; {known}")
    return workdir, int(name)


def step_parent(path: AnyPath) -> AnyPath:
    """The checkpoints directory that a workdir or this directory itself means."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def read_params(path: AnyPath, which: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`load_params` of the result of `opened`, while that lasts, in any process."""
    if path.is_file():
        params, meta = read_export(path)
        check_which(path, meta["which"], which)
        return params, meta
    document = read_document(path / META)
    subtree = _subtree(which)
    specs = {name: spec for name, spec in document["leaves"].items() if name.startswith(subtree)}
    if not specs:
        held = _kinds(document["leaves"])
        raise ValueError(f"checkpoint {path} has no {which!r}; it holds {', '.join(held)}")
    _check_stored(path, specs)
    # NumPy arrays tell orbax to load to the host; np.broadcast_to allocates no memory for them.
    abstract = {
        name: np.broadcast_to(np.zeros((), parse_dtype(dtype)), shape)
        for name, (shape, dtype) in specs.items()
    }
    loaded = _load(path, abstract, partial=True)
    try:
        sha256 = sha256_file(path / CHECKSUMS)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} was deleted while it was read; run the same command again"
        ) from error
    params = unflatten({name.removeprefix(subtree): leaf for name, leaf in loaded.items()})
    return params, _meta(document) | {"which": which, "sha256": sha256}


def _subtree(which: str) -> str:
    """The prefix of the leaf names of a parameter tree: "ema_tracks/1/" for "ema_2"."""
    track = re.fullmatch(r"ema_([1-9]\d*)", which)
    return f"ema_tracks/{int(track[1]) - 1}/" if track else f"{which}/"


def _kinds(leaves: Iterable[str]) -> list[str]:
    """The values of `which` in `load_params` that a state with these leaf names supports."""
    kinds = set()
    for name in leaves:
        first, _, rest = name.partition("/")
        if first == "ema_tracks":
            kinds.add(f"ema_{int(rest.partition('/')[0]) + 1}")
        elif first in ("ema", "params"):
            kinds.add(first)
    return sorted(kinds)


def _load(directory: AnyPath, abstract: Mapping[str, Any], partial: bool) -> dict[str, Any]:
    """Reads arrays by path; each is a sharded jax.Array or a NumPy array, as in `abstract`."""
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    try:
        with context:
            return ocp.load(directory, abstract)
    except Exception as error:  # orbax raises bare Exception among others
        raise CheckpointError(
            f"checkpoint {directory} could not be read: {first_line(error)}"
        ) from error


def _check_stored(directory: AnyPath, specs: Mapping[str, Any]) -> None:
    """Raises CheckpointError naming the first leaf that orbax stored otherwise than meta.json says.

    orbax itself ignores the shape and converts to the dtype.
    """
    try:
        stored = ocp.metadata(directory).metadata
    except Exception as error:  # orbax raises bare Exception among others
        raise CheckpointError(
            f"checkpoint {directory} could not be read: {first_line(error)}"
        ) from error
    for name, (shape, dtype) in specs.items():
        leaf = stored.get(name)
        have = leaf and f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        if have != (said := f"{dtype}{shape}"):
            raise CheckpointError(
                f"checkpoint {directory} is damaged: leaf {name} is {said} in {META}, but"
                f" {have or 'missing'} in the stored arrays; {REMEDY}"
            )


def _document(step: int, leaves: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    shapes = {path: [list(leaf.shape), np.dtype(leaf.dtype).name] for path, leaf in leaves.items()}
    return to_json(
        {"format_version": FORMAT_VERSION, "step": step, "meta": dict(meta), "leaves": shapes}
    )


def _meta(document: Mapping[str, Any]) -> dict[str, Any]:
    return document["meta"] | {
        "step": document["step"],
        "format_version": document["format_version"],
    }
