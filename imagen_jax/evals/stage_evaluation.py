"""Evaluates checkpoints of one stage on prepared data, one or as they appear.

All processes of a run call it together; process 0 writes the results.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from imagen_jax import schema, sharding
from imagen_jax.cascade import STAGE_META
from imagen_jax.data.example_text import read_stored
from imagen_jax.data.records import open_once
from imagen_jax.data.shard_cache import Place
from imagen_jax.distributed import agreement
from imagen_jax.evals import evaluation_text, history, provenance, report
from imagen_jax.evals.evaluation import Evaluation, Probe
from imagen_jax.evals.measures import measure
from imagen_jax.evals.rows import Data, Settings
from imagen_jax.object_storage import AnyPath
from imagen_jax.sampling_parameters import for_sampling, parameter_shardings
from imagen_jax.stage import Params, check_interval, check_sampling, create_stage
from imagen_jax.storage import (
    as_path,
    check_object,
    check_outputs,
    exists,
    read_object,
    write_arrays,
    write_atomically,
    write_json,
)
from imagen_jax.text import program
from imagen_jax.text_inputs import text_inputs
from imagen_jax.weights.checkpoint import (
    CheckpointError,
    Checkpoints,
    load_params,
    opened,
    read_params,
)
from imagen_jax.weights.leaves import check_fit
from imagen_jax.weights.retention import Retention

POLL_S = 10.0
RESULT, ROWS, CURVES = "evaluation.json", "rows.npz", "loss.png"
FILES = (RESULT, ROWS, CURVES, "samples.npz")
log = logging.getLogger("imagen_jax.evaluate")


class Evaluator:
    """Evaluates checkpoints one after another. All processes make the same calls.

    Rows and compiled functions are reused as long as the config does not change.
    """

    def __init__(
        self,
        data: str,
        which: str,
        names: list[str],
        numbers: Mapping[str, Any],
        sampling: Mapping[str, Any],
        encoder: str = "",
        cache: Place = Place(),
    ):
        """Loads nothing yet; `run` loads a checkpoint and the data.

        data: a prepared directory. cache: where shards of a bucket are copied to.
        which: the weights to load, such as "ema".
        names: names of the measures; [] for all that apply.
        numbers: fields of `rows.Settings`.
        sampling: values that override those of the checkpoint's config.
        encoder: text encoder for data without the features that the checkpoint needs; "": that of
            the checkpoint's config.

        Raises ValueError for an unknown measure.
        """
        measure.check_known(names)
        self._data, self._which, self._names = data, which, names
        self._numbers, self._sampling, self._encoder = numbers, sampling, encoder
        self._cache = cache
        self._config: Mapping[str, Any] | None = None

    def run(self, checkpoint: AnyPath, output: AnyPath) -> dict[str, Any]:
        """Evaluates one checkpoint; process 0 writes all files to `output`, evaluation.json last.

        Returns the content of evaluation.json.
        """
        check_outputs(output, FILES, ())
        params, meta = load_same(checkpoint, self._which)
        remedy = "use a checkpoint of imagen_jax.train, or its export"
        check_object(checkpoint, meta, STAGE_META, remedy)
        meta = meta | {"config": schema.complete(meta["config"], f"config of {checkpoint}")}
        self._prepare(meta, params)
        model = jax.eval_shape(self._probe.stage.init, jax.random.key(0))
        check_fit(params, model, f"{checkpoint}: ")
        params = for_sampling(params, self._probe.stage)
        shardings = parameter_shardings(params, self._mesh, meta["config"]["mesh"])
        evaluation = Evaluation(self._probe, self._rows, sharding.place_tree(params, shardings))
        del params
        log.info("%s, step %s: %s", meta["config"]["name"], meta["step"], ", ".join(self._chosen))
        for name, reason in self._left_out.items():
            log.warning("skipping %s: %s", name, reason)
        results = {name: chosen.measure(evaluation) for name, chosen in self._chosen.items()}
        values = measure.row_values(self._chosen, evaluation)
        weights = {"path": str(checkpoint), "which": meta["which"], "sha256": meta["sha256"]}
        provenance = {"checkpoint": weights} | self._provenance(meta)
        header = {"stage": meta["config"]["name"], "step": meta["step"]}
        result = header | results | {"provenance": provenance}
        if jax.process_index() == 0:
            self._write(output, evaluation, result, values)
        agreement.gather()  # the files are written
        return result

    def _write(
        self,
        output: AnyPath,
        evaluation: Evaluation,
        result: Mapping[str, Any],
        values: measure.RowValues,
    ) -> None:
        """Writes the files of one evaluation and prints its table."""
        results = {name: result[name] for name in self._chosen}
        output.mkdir(parents=True, exist_ok=True)
        if curves := measure.curves(results):
            write_atomically(output / CURVES, report.plot(curves))
        sampling = json.dumps(self._probe.settings.sampling)
        sha256 = result["provenance"]["checkpoint"]["sha256"]
        origin = {"checkpoint_sha256": sha256, "sampling": sampling}
        measure.write(self._chosen, evaluation, output, origin)
        write_arrays(output / ROWS, values)
        write_json(output / RESULT, result)
        skipped = [(name, f"skipped: {reason}") for name, reason in self._left_out.items()]
        table = report.table([*measure.lines(results), *skipped])
        print(f"{result['stage']}, step {result['step']}", table, sep="\n")
        print(f"all results: {output / RESULT}")

    def check_continues(self, record: AnyPath) -> None:
        """Raises ValueError if the last line of `record` has other settings or data than this run.

        record: an evaluations.jsonl, which may be missing.
        """
        recorded = history.last_provenance(record)
        if recorded is None:
            return
        trained = schema.complete_sampling(recorded["config"]["sampling"], f"{record}")
        data = open_once(self._data, self._cache).hash
        current = self._numbers | {"data": data, "which": self._which}
        current |= {"sampling": trained | self._sampling}
        previous = {name: recorded[name] for name in self._numbers if name in recorded}
        previous |= {
            "data": recorded["data"]["manifest_hash"],
            "which": recorded["checkpoint"]["which"],
            "sampling": schema.complete_sampling(recorded["sampling"], f"{record}"),
        }
        changed = [
            f"{name}: {previous.get(name, 'not recorded')}, now {value}"
            for name, value in current.items()
            if name not in previous or previous[name] != value
        ]
        if changed:
            raise ValueError(
                f"{record} was made with other settings; give another --output:"
                f" {'; '.join(changed)}"
            )

    def _prepare(self, meta: Mapping[str, Any], params: Params) -> None:
        """Creates mesh, stage, rows and compiled functions for a config; selects the measures.

        params: of the checkpoint, for their size.

        Raises ValueError if checkpoint, data and settings are incompatible, before anything is
        computed.
        """
        if meta["config"] == self._config:
            return
        config = meta["config"]
        self._mesh = make_mesh(sum(4 * leaf.size for leaf in jax.tree.leaves(params)))
        stage = create_stage(config, self._mesh)
        settings = Settings(**self._numbers, sampling={**stage.sampling, **self._sampling})
        check_sampling(settings.sampling)
        self._check_effect(config | {"sampling": settings.sampling}, stage.sampling)
        if self._sampling:
            check_interval(settings.sampling, stage.schedule)
        chosen = measure.choose(self._names, stage, settings)
        self._rows, self._text_features = self._read(meta, settings)
        if "heldout" not in self._rows.counts:
            log.warning("%s has no held-out images; evaluating on training images", self._data)
        if self._rows.prepared.hash not in (meta["manifest_hash"], *meta.get("mixture_hashes", ())):
            log.warning("the checkpoint was trained on other data than %s", self._data)
        if settings.lowres_from:
            log.info("low-res images are the samples of %s", self._rows.origin)
        self._chosen, self._left_out = measure.allowed(chosen, stage, self._rows)
        possible = json.dumps([list(self._chosen), self._left_out])
        agreement.check({"data": self._rows.prepared.hash, "possible measures": possible})
        self._probe, self._config = Probe(stage, settings, self._mesh), config

    def _read(self, meta: Mapping[str, Any], settings: Settings) -> tuple[Data, str]:
        """(the rows, where their text features are from: see `evaluation_text.kind`)."""
        prepared, config = open_once(self._data, self._cache), meta["config"]
        trained = meta["encoder"]
        encoder = evaluation_text.choose_encoder(config, trained, prepared, self._encoder)
        data_cfg = dict(config["data"]) | {"path": self._data, "mixture": ()}
        data_cfg |= self._cache.fields
        read = read_stored(text_inputs(config))
        if encoder:
            captions = Data(data_cfg, settings).caption_ids()
            encoded = evaluation_text.encode(
                config, trained, prepared, captions, encoder, make_mesh
            )
            read = lambda prepared, caption_ids: encoded
        return Data(data_cfg, settings, read), evaluation_text.kind(config, encoder)

    def _check_effect(self, config: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
        """Raises ValueError if a flag changes a field of `sampling` that has no effect.

        config: with the flags' values. trained: the section `sampling` without them.
        """
        changed = [
            f"sampling.{name}"
            for name, value in self._sampling.items()
            if value != trained[name] and schema.SAMPLING[name].defaults
        ]
        if changed:
            schema.check_effect(config, changed, "the flags")

    def _provenance(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """The provenance besides the checkpoint: config, data, settings, versions, devices."""
        settings, rows = self._probe.settings, self._rows
        return {
            "config": meta["config"],
            "encoder": meta["encoder"],
            "text_features": self._text_features,
            "data": {
                "manifest_hash": rows.prepared.hash,
                "trained_on": meta["manifest_hash"],
                "images": rows.counts,
            },
            **{name: getattr(settings, name) for name in self._numbers},
            "sampling": dict(settings.sampling),
            "lowres_samples": rows.origin,
            "left_out": self._left_out,
            **provenance.software(),
            "devices": provenance.devices(),
        }


def make_mesh(weights: int) -> Mesh:
    """A mesh of all devices of all processes, for `weights` bytes of parameters.

    The parameters are in as few shards as fit; rows are split over all devices.
    """
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    slices = len({sharding.slice_of(device) for device in jax.devices()})
    parts = program.fewest_parts(weights, memory, jax.device_count() // slices)
    return sharding.batch_mesh(jax.devices(), int(agreement.gather(str(parts))[0]))


def load_same(checkpoint: AnyPath, which: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`load_params` of the same checkpoint in all processes, chosen and verified by process 0.

    Its trainer does not delete it before all processes have read it. Raises CheckpointError in all
    processes if one of them cannot read it, also if it was deleted in the meantime.
    """
    if jax.process_count() == 1:
        try:
            return load_params(checkpoint, which)
        except FileNotFoundError as error:
            raise CheckpointError(f"{checkpoint} cannot be read: {error}") from error
    with contextlib.ExitStack() as stack:
        loaded, chosen, fault = None, "", ""
        if jax.process_index() == 0:
            try:
                chosen = str(stack.enter_context(opened(checkpoint)))
            except (ValueError, OSError) as error:
                fault = str(error)
        chosen, fault = json.loads(agreement.gather(json.dumps([chosen, fault]))[0])
        if not fault:
            try:
                loaded = read_params(as_path("checkpoint", chosen), which)
            except (ValueError, OSError) as error:
                fault = str(error)
        faults = [text for text in agreement.gather(fault) if text]
    if faults:
        raise CheckpointError(faults[0])
    return loaded


def follow(
    run: Callable[[AnyPath, AnyPath], dict[str, Any]],
    workdir: AnyPath,
    output: AnyPath,
    minutes: float,
    poll_s: float = POLL_S,
) -> None:
    """Calls `run` for each intact checkpoint that output/evaluations.jsonl does not list.

    The oldest checkpoint comes first; each result is appended to the file. Returns when the
    checkpoint of the last training step is evaluated, or after `minutes` (0: no limit). The workdir
    may still be empty, and the trainer may delete old checkpoints in the meantime. A damaged
    checkpoint is reported once and skipped. All processes call it; process 0 decides which
    checkpoint is next.
    """
    first = jax.process_index() == 0
    follower = Follower(workdir, output, minutes, poll_s) if first else None
    while step := agreement.gather(follower.next() if follower else "")[0]:
        directory = workdir / "checkpoints" / step
        try:
            result = run(directory, output / step)
        except CheckpointError as error:  # of `load_same`, in all processes
            # Otherwise the trainer deleted it in the meantime.
            if first and exists(directory):
                log.warning("checkpoint %s is skipped: %s", step, error)
        else:
            if first:
                history.append(output / history.FILE, result)
                follower.evaluated += 1


class Follower:
    """Chooses the checkpoints of a running workdir one after another, in process 0.

    evaluated: the number of checkpoints evaluated by this command.
    """

    def __init__(self, workdir: AnyPath, output: AnyPath, minutes: float, poll_s: float):
        """For the arguments see `follow`."""
        # Used only to list steps. It never saves, so the retention has no effect.
        self._checkpoints = Checkpoints(workdir / "checkpoints", Retention(1))
        self._workdir = workdir
        output.mkdir(parents=True, exist_ok=True)
        self._done, self.evaluated = history.steps(output / history.FILE), 0
        self._minutes, self._poll_s, self._tried = minutes, poll_s, False
        self._deadline = time.monotonic() + 60 * minutes if minutes else float("inf")

    def next(self) -> str:
        """Waits for the next checkpoint and returns its step, "" if there is none to wait for."""
        while True:
            over = self._tried and time.monotonic() >= self._deadline
            steps = self._checkpoints.steps()
            waiting = [step for step in steps if step not in self._done]
            if waiting and not over:
                self._tried = True
                self._done.add(waiting[0])
                return str(waiting[0])
            if not waiting and steps and steps[-1] >= last_step(self._workdir):
                return ""
            if over or time.monotonic() >= self._deadline:
                log.info(
                    "followed for %g minutes, %d checkpoints evaluated",
                    self._minutes,
                    self.evaluated,
                )
                return ""
            time.sleep(self._poll_s)


def last_step(workdir: AnyPath) -> float:
    """The last training step, or infinity before the run has written its config."""
    config = workdir / "config.json"
    if not config.is_file():
        return float("inf")
    remedy = "copy it from the meta.json of a checkpoint"
    return read_object(config, {"train.steps": int}, remedy)["train"]["steps"]
