"""Checkpoints of the training state: directories in which a checksum covers every byte.

    workdir/checkpoints/1200/meta.json     {"format_version", "step", "meta": the caller's,
                                           "leaves": {path: [shape, dtype]}}
    workdir/checkpoints/1200/state/...     orbax; one array a leaf, named by its path,
                                           "ema/down_0/block_0/conv_1/kernel"
    workdir/checkpoints/1200/SHA256SUMS    every other file of the directory;
                                           `sha256sum -c SHA256SUMS` checks it without Python

A save is written under "1200.writing" and renamed when all of it, SHA256SUMS last, has reached the
disk; a deletion first renames to "1200.deleting". So a kill at any moment leaves either a whole
checkpoint or a directory that no reader looks at. What happens to the bytes later is what
SHA256SUMS is for: orbax restores most flipped bits without an error. The directory has to be on a
POSIX file system.
"""

import concurrent.futures
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from orbax.checkpoint import v1 as ocp

from imagen_jax.distributed import agreement
from imagen_jax.exit_codes import HardwareFault
from imagen_jax.storage import CHECKSUMS, find_damage, flush, seal, sha256_file
from imagen_jax.weights.exports import read_export
from imagen_jax.weights.leaves import (
    FORMAT_VERSION,
    CheckpointError,
    Tree,
    check_version,
    first_line,
    flatten,
    to_json,
    unflatten,
)

META = "meta.json"
COMMON = (FloatingPointError, HardwareFault)  # raised in all processes after the same step

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. With several processes, every method but `steps` is called by all
    of them.

    A context manager: leaving it finishes a save that is under way. A save that is still running
    when the interpreter exits never ends, because orbax's thread pools take no work by then.
    """

    def __init__(self, directory: str | os.PathLike, keep: int):
        """`directory` is made on the first save. `keep`: how many of the newest checkpoints stay
        (>= 1).
        """
        if "://" in str(directory):
            raise ValueError(
                f"checkpoint directory {directory} is a URL; mount the bucket and give the mounted"
                " path"
            )
        if keep < 1:
            raise ValueError(f"keep={keep} would delete every checkpoint; it must be at least 1")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._verified: int | None = None  # by `latest_good`, not yet restored
        self._rejected: set[int] = set()
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._current: int | None = None  # the step last saved or restored
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None

    def steps(self) -> list[int]:
        """Steps that have a directory, oldest first; not necessarily intact (see `latest_good`)."""
        return _steps(self.directory)

    def save(self, step: int, state: Tree, meta: Mapping[str, Any]) -> None:
        """Starts writing `state`; returns once its arrays are copied off the devices, so that the
        caller may donate them.

        state: pytree of arrays, none of size zero, and of no dict key with a "/". meta: anything
        JSON can hold; stored and returned by `restore` with `step` and `format_version` added.
        Waits for the save before it. A call for the step last saved or restored by this object does
        nothing. A damaged directory in the way is renamed to "<step>.damaged".

        Raises:
            ValueError: a leaf cannot be stored, meta is not JSON, or an intact checkpoint of `step`
                is already there.
            CheckpointError: the save before this one failed.
        """
        self.wait()
        if step == self._current:
            return
        leaves = flatten(state)
        document = _document(step, leaves, meta)
        self._make_room(step)
        if self._thread is None:
            self._thread = concurrent.futures.ThreadPoolExecutor(
                max_workers=1, thread_name_prefix="checkpoint"
            )
        # Raw: compression saved 30 % of the bytes of fp32 weights and made the save three times
        # slower.
        context = ocp.Context()
        context.array.saving.use_compression = False
        with context, jax.transfer_guard("allow"):
            response = ocp.save_async(self._path(step, "writing"), leaves)
        self._saving = step, self._thread.submit(self._commit, step, response.result, document)

    def wait(self) -> None:
        """Returns when no save is under way. Raises CheckpointError, in every process, if the last
        one failed in any.
        """
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        error = future.exception()
        reasons = [
            reason for reason in agreement.gather(first_line(error) if error else "") if reason
        ]
        if reasons:
            raise CheckpointError(
                f"checkpoint {step} was not saved in {self.directory}: {reasons[0]}"
            ) from error
        self._current = step

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """After an error in one of several processes nothing is awaited: the others may be gone."""
        if error is None:
            return self.wait()
        if jax.process_count() > 1 and not isinstance(error, COMMON):
            return
        try:
            self.wait()
        except CheckpointError as failure:
            log.error("%s", failure)

    def latest_good(self) -> int | None:
        """The newest step whose files all match their checksums, None if there is no checkpoint.
        Each rejected one is logged.

        Raises CheckpointError if there are checkpoints and all are damaged.
        """
        found, damaged = None, ""
        if jax.process_index() == 0:
            try:
                found = newest_intact(self.directory, self._rejected.add)
            except CheckpointError as error:
                damaged = str(error)
        found, damaged = json.loads(agreement.gather(json.dumps([found, damaged]))[0])
        if damaged:
            raise CheckpointError(damaged)
        if found is None:
            return None
        self._verified = found
        return found

    def meta(self, step: int) -> dict[str, Any]:
        """What `restore` returns beside the state, without reading the state; for a step that
        `latest_good` returned.
        """
        return _meta(_read_document(self.directory / str(step)))

    def restore(self, step: int, abstract_state: Tree) -> tuple[Tree, dict[str, Any]]:
        """(state, meta) of a checkpoint, verified first; each array on the sharding that its leaf
        of `abstract_state` carries.

        abstract_state: the state's structure with jax.ShapeDtypeStruct (or arrays) as leaves, on
        any mesh.

        Raises:
            CheckpointError: the checkpoint does not exist, is damaged, or cannot be read.
            ValueError: a leaf is missing, superfluous, or has another shape or dtype; or a leaf of
                `abstract_state` has no sharding.
        """
        directory = self.directory / str(step)
        if step != self._verified:
            reason = find_damage(directory) if jax.process_index() == 0 else None
            reason = agreement.gather(reason or "")[0]
            if reason:
                raise CheckpointError(f"checkpoint {directory} cannot be used: {reason}")
        document = _read_document(directory)
        wanted = flatten(abstract_state)
        _check_leaves(directory, document["leaves"], wanted)
        abstract = {
            path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
            for path, a in wanted.items()
        }
        loaded = _load(directory, abstract, partial=False)
        self._verified, self._current = None, step
        return jax.tree.unflatten(
            jax.tree.structure(abstract_state), [loaded[path] for path in wanted]
        ), _meta(document)

    def _path(self, step: int, suffix: str) -> Path:
        return self.directory / f"{step}.{suffix}"

    def _make_room(self, step: int) -> None:
        """Removes what killed processes left behind, and moves a damaged directory of this step out
        of the way.
        """
        target = self.directory / str(step)
        there = jax.process_index() == 0 and target.exists()
        reason = find_damage(target) if there else None
        if agreement.gather("intact" if there and reason is None else "")[0]:
            raise ValueError(
                f"{target} already holds an intact checkpoint; remove it, or use another workdir"
            )
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            if reason is not None:
                _keep_aside(target, reason)
                self._rejected.discard(step)
            for leftover in sorted(self.directory.iterdir()):
                if re.fullmatch(r"\d+\.(writing|deleting).*", leftover.name):
                    log.warning("removing %s, left by an interrupted run", leftover)
                    shutil.rmtree(leftover)
        agreement.gather()  # nobody writes before it is cleared

    def _commit(self, step: int, written: Callable[[], None], document: str) -> None:
        """In the background: once `written` returns (orbax is done, or it raises), seals the
        directory, gives it its name, deletes old ones.
        """
        written()
        if jax.process_index() != 0:
            return
        writing = self._path(step, "writing")
        (writing / META).write_text(document, encoding="utf-8")
        seal(writing)
        os.rename(writing, self.directory / str(step))
        flush(self.directory)
        self._delete_old(step)

    def _delete_old(self, newest: int) -> None:
        """Deletes all but `keep` of the steps up to `newest`; damaged ones neither count as kept
        nor are deleted.
        """
        older = [s for s in self.steps() if s < newest and s not in self._rejected]
        for step in older[: max(0, len(older) - (self.keep - 1))]:
            try:
                os.rename(self.directory / str(step), self._path(step, "deleting"))
                shutil.rmtree(self._path(step, "deleting"))
            except OSError as error:
                log.warning(
                    "old checkpoint %s could not be deleted: %s", self.directory / str(step), error
                )


def newest_intact(
    directory: Path, on_rejected: Callable[[int], None] = lambda step: None
) -> int | None:
    """The newest undamaged step in a checkpoints directory, None if it has no steps; logs each
    damaged one it passes.

    Raises CheckpointError if all are damaged. A step that a running trainer deletes meanwhile is no
    fault.
    """
    newest_fault = None
    for step in reversed(_steps(directory)):
        reason = find_damage(directory / str(step))
        if reason is None:
            return step
        if not (directory / str(step)).exists():
            continue
        log.warning("CHECKPOINT REJECTED: %s is not used, %s", directory / str(step), reason)
        on_rejected(step)
        newest_fault = newest_fault or f"{step}: {reason}"
    if newest_fault:
        raise CheckpointError(
            f"no checkpoint in {directory} is intact ({newest_fault}); restore a copy, or start in"
            " another workdir"
        )
    return None


def load_params(
    path: str | os.PathLike, which: str = "ema"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(one subtree of a state as nested dicts of host arrays, meta); reads no other array and needs
    no device or mesh.

    path: a workdir or its checkpoints directory (then the newest good step), one step's directory,
    or a file by `export_params`. which: "ema", "params", or "ema_1", "ema_2" ... for a further EMA
    of optim.ema_tracks; an exported file holds one tree only, returned whatever `which` says. meta
    says "which" it is, and its "sha256": of the file, or of a checkpoint's SHA256SUMS. bfloat16
    arrays are numpy arrays of ml_dtypes.bfloat16.

    Raises CheckpointError if there is nothing at `path`, or it is damaged or not ours; ValueError
    if the state has no such subtree.
    """
    path = Path(path).absolute()
    if path.is_file():
        return read_export(path)
    directory = _find_step(path)
    document = _read_document(directory)
    if not re.fullmatch(r"ema|params|ema_[1-9]\d*", which):
        raise ValueError(f"weights {which!r} are unknown: choose ema, params, or ema_1, ema_2 ...")
    subtree = _subtree(which)
    specs = {name: spec for name, spec in document["leaves"].items() if name.startswith(subtree)}
    if not specs:
        held = _kinds(document["leaves"])
        raise ValueError(f"checkpoint {directory} has no {which!r}; it holds {', '.join(held)}")
    # Stand-ins that tell orbax to restore to the host: the right shape and dtype, no memory.
    abstract = {
        name: np.broadcast_to(np.zeros((), _dtype(dtype)), shape)
        for name, (shape, dtype) in specs.items()
    }
    loaded = _load(directory, abstract, partial=True)
    try:
        sha256 = sha256_file(directory / CHECKSUMS)
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} was deleted while it was read") from error
    params = unflatten({name.removeprefix(subtree): leaf for name, leaf in loaded.items()})
    return params, _meta(document) | {"which": which, "sha256": sha256}


def _subtree(which: str) -> str:
    """Beginning of the leaf names of one tree of parameters: "ema_2" is "ema_tracks/1/"."""
    track = re.fullmatch(r"ema_([1-9]\d*)", which)
    return f"ema_tracks/{int(track[1]) - 1}/" if track else f"{which}/"


def _kinds(leaves: Iterable[str]) -> list[str]:
    """The weights in a state by its leaf names, as `load_params` takes them."""
    kinds = set()
    for name in leaves:
        first, _, rest = name.partition("/")
        if first == "ema_tracks":
            kinds.add(f"ema_{int(rest.partition('/')[0]) + 1}")
        elif first in ("ema", "params"):
            kinds.add(first)
    return sorted(kinds)


def _find_step(path: Path) -> Path:
    """The step directory that `path` (a workdir, a checkpoints directory or a step) stands for,
    verified.
    """
    if path.name.isdigit() and path.is_dir() and not (path / "checkpoints").is_dir():
        reason = find_damage(path)
        if reason is not None:
            raise CheckpointError(f"checkpoint {path} cannot be used: {reason}")
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    step = newest_intact(directory)
    if step is None:
        raise CheckpointError(
            f"{path} holds no checkpoint: give a workdir, its checkpoints, one of them, or an"
            " exported .safetensors file"
        )
    return directory / str(step)


def _load(directory: Path, abstract: Mapping[str, Any], partial: bool) -> dict[str, Any]:
    """Arrays of a step directory by path, as the leaves of `abstract` say (sharded, or numpy)."""
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    try:
        with context:
            return ocp.load(directory, abstract)
    except Exception as error:  # orbax raises bare Exception among others
        raise CheckpointError(
            f"checkpoint {directory} could not be read: {first_line(error)}"
        ) from error


def _check_leaves(directory: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first leaf, by path, that `stored` and `wanted` disagree about,
    and how many do.
    """
    faults = []
    for path in sorted(stored.keys() | wanted.keys()):
        if path not in stored:
            faults.append(f"leaf {path} is missing from it")
        elif path not in wanted:
            faults.append(f"it has a leaf {path} that the state does not have")
        else:
            have = tuple(stored[path][0]), stored[path][1]
            want = tuple(wanted[path].shape), np.dtype(wanted[path].dtype).name
            if have != want:
                faults.append(
                    f"leaf {path} is {have[1]}{list(have[0])} in it, but the state needs"
                    f" {want[1]}{list(want[0])}"
                )
            elif getattr(wanted[path], "sharding", None) is None:
                faults.append(f"leaf {path} of the abstract state has no sharding")
    if faults:
        more = f" (and {len(faults) - 1} more such faults)" if len(faults) > 1 else ""
        raise ValueError(f"checkpoint {directory} does not fit the state: {faults[0]}{more}")


def _document(step: int, leaves: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    shapes = {path: [list(leaf.shape), np.dtype(leaf.dtype).name] for path, leaf in leaves.items()}
    return to_json(
        {"format_version": FORMAT_VERSION, "step": step, "meta": dict(meta), "leaves": shapes}
    )


def _read_document(directory: Path) -> dict[str, Any]:
    document = json.loads((directory / META).read_text(encoding="utf-8"))
    check_version(directory, document)
    return document


def _meta(document: Mapping[str, Any]) -> dict[str, Any]:
    return document["meta"] | {
        "step": document["step"],
        "format_version": document["format_version"],
    }


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _keep_aside(directory: Path, reason: str) -> None:
    aside, n = directory.with_name(f"{directory.name}.damaged"), 1
    while aside.exists():
        n += 1
        aside = directory.with_name(f"{directory.name}.damaged_{n}")
    log.warning(
        "CHECKPOINT REJECTED: %s is in the way and damaged, %s; kept as %s",
        directory,
        reason,
        aside.name,
    )
    os.rename(directory, aside)


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(
        int(p.name)
        for p in directory.iterdir()
        if re.fullmatch(r"0|[1-9]\d*", p.name) and p.is_dir()
    )
