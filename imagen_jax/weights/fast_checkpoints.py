"""Frequent checkpoints on the local disk or in the memory of each host.

    FAST_DIR/RUN/process_3/1200/shards.safetensors   the shards of the devices of process 3
    FAST_DIR/RUN/process_3/1200/meta.json            {"token", "layout", "meta": given by the
                                                     caller of `save`}
    FAST_DIR/RUN/process_3/1200/SHA256SUMS           written last

A process writes its own shards, so a save needs neither a network nor other processes. It can be
restored while all processes hold the same save, on the same mesh; RUN keeps the saves of another
run in the same workdir apart. A lost host loses its shards: the run then continues from the newest
checkpoint of the workdir.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from imagen_jax.checksums import find_damage, seal
from imagen_jax.distributed import agreement
from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import entry_names, exists, read_object, remove, write_json
from imagen_jax.weights.leaves import Tree, flatten

KEEP = 2  # processes may be killed while some of them have the newest save and others do not
META, SHARDS, RUN_FILE = "meta.json", "shards.safetensors", "run.json"
FIELDS = {"token": str, "layout": str, "meta": dict}
Index = tuple[tuple[int, int], ...]  # (start, stop) of each dimension
log = logging.getLogger("imagen_jax.weights.checkpoint")


def run_name(workdir: AnyPath) -> str:
    """The name of the run in a workdir, drawn at its first start. All processes call it."""
    name = ""
    if jax.process_index() == 0:
        path = workdir / RUN_FILE
        if not exists(path):
            write_json(path, {"run": os.urandom(8).hex()})
        name = read_object(path, {"run": str})["run"]
    return agreement.gather(name)[0]


class FastCheckpoints:
    """The fast checkpoints of one run. All processes call every method, in the same order.

    A context manager: leaving it waits for the save in progress.
    """

    def __init__(self, directory: str | os.PathLike, run: str, abstract: Tree):
        """directory: local, of this host. run: see `run_name`. abstract: shapes with shardings."""
        self._directory = Path(directory).expanduser() / run / f"process_{jax.process_index()}"
        self._wanted = flatten(abstract)
        self._layout = _layout(self._wanted)
        self._writing: concurrent.futures.Future | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "fast_checkpoint")

    def save(
        self,
        step: int,
        state: Tree,
        meta: Mapping[str, Any],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Copies this process's shards to the host and starts to write them.

        Does nothing, with a warning, if a process is still writing an earlier save. A failed save
        is logged; training continues. before_commit: as for `Checkpoints.save`.
        """
        busy = self._writing is not None and not self._writing.done()
        said = agreement.gather("busy" if busy else f"free {os.urandom(8).hex()}")
        if "busy" in said:
            log.warning("fast checkpoint %d left out: the last one is still being written", step)
            return
        arrays = {
            _key(name, index): data
            for name, leaf in flatten(state).items()
            for index, data in _shards(leaf).items()
        }
        # Started together, the copies of all arrays overlap.
        arrays = dict(zip(arrays, jax.device_get(list(arrays.values()))))
        content = {"token": said[0], "layout": self._layout, "meta": dict(meta)}
        self._writing = self._thread.submit(self._write, step, arrays, content, before_commit)

    def newest(self) -> int | None:
        """The newest step of which all processes hold the same intact save; None if there is none.

        Removes saves that were not finished.
        """
        intact = {}
        for step in self._steps():
            path = self._directory / str(step)
            if reason := find_damage(path):
                log.warning("fast checkpoint %s is not used: %s", path, reason)
                remove(path)
                continue
            content = read_object(path / META, FIELDS)
            if content["layout"] == self._layout:
                intact[str(step)] = content["token"]
        everywhere = [json.loads(text) for text in agreement.gather(json.dumps(intact))]
        common = [
            int(step)
            for step, token in everywhere[0].items()
            if all(other.get(step) == token for other in everywhere)
        ]
        if not common and any(everywhere):
            lacking = [i for i, other in enumerate(everywhere) if not other]
            who = f"process {', '.join(map(str, lacking))} has none" if lacking else "they differ"
            log.info("no fast checkpoint is used: %s", who)
        return max(common, default=None)

    def meta(self, step: int) -> dict[str, Any]:
        """The meta of a step that `newest` returned."""
        return read_object(self._directory / str(step) / META, FIELDS)["meta"]

    def restore(self, step: int, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """(state, meta) of a step that `newest` returned; `abstract` as given at the creation."""
        restored = []
        with safe_open(self._directory / str(step) / SHARDS, "numpy") as file:
            for name, leaf in self._wanted.items():
                indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
                on_devices = [
                    jax.device_put(file.get_tensor(_key(name, _bounds(index, leaf.shape))), device)
                    for device, index in indices.items()
                ]
                restored.append(
                    jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, on_devices)
                )
        return jax.tree.unflatten(jax.tree.structure(abstract), restored), self.meta(step)

    def clear(self) -> None:
        """Removes all saves, of a run that has ended."""
        self._thread.shutdown()
        remove(self._directory)
        with contextlib.suppress(OSError):  # another process of this host has saves there
            self._directory.parent.rmdir()

    def __enter__(self) -> "FastCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def _steps(self) -> list[int]:
        names = entry_names(self._directory)
        return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))

    def _write(
        self,
        step: int,
        arrays: Mapping[str, np.ndarray],
        content: Mapping[str, Any],
        before_commit: Callable[[], None],
    ) -> None:
        """Runs in the background: writes a save, and removes the older ones."""
        path = self._directory / str(step)
        try:
            remove(path)
            path.mkdir(parents=True)
            save_file(dict(arrays), path / SHARDS)
            write_json(path / META, content)
            before_commit()
            seal(path)
            for old in self._steps()[:-KEEP]:
                remove(self._directory / str(old))
        except Exception as error:  # the checkpoints of the workdir remain
            log.error("fast checkpoint %s was not saved: %s", path, error)


def _shards(leaf: jax.Array) -> dict[Index, jax.Array]:
    """The different shards of an array on the devices of this process."""
    return {_bounds(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def _key(name: str, index: Index) -> str:
    """The name of a shard in the file: "ema/conv/kernel 0:3 0:3 0:16 8:16"."""
    return " ".join([name, *(f"{start}:{stop}" for start, stop in index)])


def _layout(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """Identifies the leaves and which shards of them this process holds."""
    lines = []
    for name, leaf in wanted.items():
        indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
        keys = sorted({_key(name, _bounds(index, leaf.shape)) for index in indices.values()})
        lines.append(f"{np.dtype(leaf.dtype).name} {' '.join(keys)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
