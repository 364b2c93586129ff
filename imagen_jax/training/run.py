"""A training run before its first step: train step, identity of the data, FLOPs.

The train step is not compiled here.
"""

import dataclasses
import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from imagen_jax import encoder_identity, schema, sharding
from imagen_jax.data import pipeline, sets
from imagen_jax.data.example_text import EvaluationText, StoredFeatures, read_stored
from imagen_jax.data.records import Prepared, caption_store
from imagen_jax.data.shard_cache import check_room
from imagen_jax.hardware import chips
from imagen_jax.online_text import OnlineText, named_encoders
from imagen_jax.stage import RNG, check_interval, create_stage
from imagen_jax.stage_sizes import Size, size_text
from imagen_jax.text_inputs import UNNAMED, TextInput, is_text, text_inputs
from imagen_jax.training import state
from imagen_jax.training.bad_steps import Rules
from imagen_jax.training.step import TrainProgram, forward_flops
from imagen_jax.weights.checkpoint import Checkpoints
from imagen_jax.weights.fast_checkpoints import FastCheckpoints

log = logging.getLogger("imagen_jax.train")

MIN_LOGGED_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class Run:
    """A config and the objects built from it.

    config: complete config, checked as that of a new run (see `schema.complete`).
    meta: identity of the run; saved with every checkpoint and compared on resume.
    program: the train step on the mesh.
    flops_per_image: for each image size that the data has, the model FLOPs per image, forward and
        backward, without rematerialization.
    peak_flops: peak FLOP/s of all devices together.
    overfit: every step has the first batch.
    online: the text encoders of a run with text.online.
    """

    config: Mapping[str, Any]
    meta: Mapping[str, Any]
    program: TrainProgram
    flops_per_image: Mapping[Size, float]
    peak_flops: float
    overfit: bool
    online: OnlineText | None = None

    @classmethod
    def create(cls, config: Mapping[str, Any], overfit: bool = False) -> "Run":
        """Builds a run and checks its complete config against data and devices.

        Allocates only the weights of online text encoders. Raises ValueError for a config that does
        not fit data or devices.
        """
        check_interval(config["sampling"], config["diffusion"]["schedule"])
        mesh = sharding.make_mesh(config["mesh"])
        data = check_data(config)
        _check_shard_cache(config, data)
        for line in _told(config, data):
            log.info("%s", line)
        online = OnlineText.load(config, mesh) if config["text"]["online"] else None
        if online:
            identities = online.identities
            _report_cuts(online, data)
        else:
            identities = _stored_encoders(data, text_inputs(config))
        shares = pipeline.bucket_shares(config["data"])
        program = TrainProgram.create(config, mesh)
        peak, source = chips.peak_flops(mesh.devices.flat[0])
        encoders = encoder_identity.to_record(identities)
        meta = {"config": config, "encoder": encoders, "rng": RNG}
        meta |= pipeline.identity(config["data"])
        stage = create_stage(config)
        sizes = [share.size for share in shares] or stage.buckets
        flops = {size: 3 * forward_flops(stage, size) for size in sizes}
        run = cls(config, meta, program, flops, peak * mesh.size, overfit, online)
        run.describe(source)
        for share in shares:
            log.info("%s", share)
        return run

    def describe(self, peak_source: str) -> None:
        """Logs the model's size, its FLOPs, and the sharding of each part of the state."""
        program, settings = self.program, self.config["mesh"]
        parameters = sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params))
        shape = {axis: size for axis, size in program.mesh.shape.items() if size > 1}
        log.info(
            "%s: %s parameters on %s", self.config["name"], f"{parameters:,}", shape or "one device"
        )
        for bucket, flops in self.flops_per_image.items():
            # The size is named only where there are several.
            of = f" of {size_text(bucket)} pixels" if len(self.flops_per_image) > 1 else ""
            log.info(
                "%.4g GFLOP per image%s; peak %.4g TFLOP/s (%s)",
                *(flops / 1e9, of, self.peak_flops / 1e12, peak_source),
            )
        for row in state.bytes_table(program.abstract, program.shardings):
            if row["bytes"] > MIN_LOGGED_BYTES:
                log.info(
                    "  %-10s %9.2f MiB, %9.2f MiB per device, %3.0f %% sharded",
                    row["part"],
                    row["bytes"] / 2**20,
                    row["bytes_per_device"] / 2**20,
                    100 * row["sharded_bytes"] / row["bytes"],
                )
        for line in sharding.badly_split(
            program.abstract.params, program.mesh, settings["rules"], settings["fsdp_min_elements"]
        ):
            log.warning("not sharded: %s", line)

    def restore(
        self, checkpoints: Checkpoints | FastCheckpoints, step: int, saved: Mapping[str, Any]
    ) -> state.TrainState:
        """The state of a checkpoint of this run, or of one that this run is forked from.

        saved: its meta. A window of gradient norms that it lacks starts empty.
        """
        before = schema.complete(saved["config"], "the checkpoint's config")
        has_window = Rules.of(before["train"]).has_window
        if has_window != Rules.of(self.config["train"]).has_window:
            log.info("the window of gradient norms is %s", "dropped" if has_window else "empty")
        program = self.program
        return state.restore(checkpoints, step, program.abstract, program.mesh, has_window)

    @property
    def rows(self) -> list[int]:
        """The rows of each global batch that this process reads."""
        return sharding.process_rows(self.config["data"]["batch_size"], self.program.mesh)

    def batches(self, step: int, rows: Sequence[int] | None = None) -> Iterator[pipeline.Batch]:
        """The training batches of `step`, step + 1, ... (see `pipeline.batches`)."""
        step = 0 if self.overfit else step
        text = self.online.tokens if self.online else StoredFeatures(text_inputs(self.config))
        data = pipeline.batches(
            self.config["data"], self.config["seed"], step, rows=rows, text=text
        )
        return repeat_first(data) if self.overfit else data

    def place(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Moves the fields that the step reads from a host batch to the mesh.

        With text.online the text features are computed there, asynchronously.
        """
        names = [name for name in self.program.batch if not (self.online and is_text(name))]
        placed = sharding.place_batch({name: batch[name] for name in names}, self.program.mesh)
        return placed | (self.online.place(batch) if self.online else {})

    @property
    def evaluation_text(self) -> EvaluationText:
        """How rows of a validation get their text."""
        return self.online.of_captions if self.online else read_stored(text_inputs(self.config))

    def compile_steps(self) -> dict[Size, Any]:
        """The compiled train step of each image size that the data has.

        Compiling one takes minutes at full size. The programs of online text encoders are compiled
        too.
        """
        if self.online:
            self.online.warm_up(self.config["data"]["batch_size"])
        steps = {}
        for bucket in self.flops_per_image:
            started = time.monotonic()
            of = f" for images of {size_text(bucket)}" if len(self.flops_per_image) > 1 else ""
            log.info("compiling the step%s", of)
            steps[bucket] = self.program.lower(bucket).compile()
            log.info("step compiled%s in %.0f s", of, time.monotonic() - started)
        return steps

    def bucket_of(self, batch: Mapping[str, Any]) -> Size:
        """The size of the images of a batch. Raises ValueError if no step is compiled for it."""
        height, width = batch["image"].shape[1:3]
        if (height, width) not in self.flops_per_image:
            sizes = ", ".join(map(size_text, self.flops_per_image))
            raise ValueError(
                f"a batch has images of {height}x{width}, but the train step is compiled for"
                f" {sizes}: make data.buckets and the data agree"
            )
        return height, width

    def rates(self, times: Mapping[str, float], buckets: Sequence[Size]) -> dict[str, float]:
        """Adds model TFLOP/s and MFU (without rematerialization) to an interval's times.

        buckets: the image sizes of the steps of the interval.
        """
        if not times:
            return {}
        per_image = statistics.fmean(self.flops_per_image[bucket] for bucket in buckets)
        flops = per_image * times["time/images_per_s"]
        return {
            **times,
            "time/model_tflops_per_s": flops / 1e12,
            "time/mfu": flops / self.peak_flops,
        }


def check_data(config: Mapping[str, Any]) -> tuple[Prepared, ...]:
    """Opens the sets of a complete config; allocates and reads little.

    Raises ValueError unless they have the text and the image sizes that a run reads. Images are
    compared with buckets by `pipeline.bucket_shares`, online encoders when they are loaded.
    """
    data = pipeline.open_sets(config["data"])
    _check_squares(config, data)
    if config["text"]["online"]:
        named_encoders(config, config["text"]["online_encoder"])
    else:
        _stored_encoders(data, text_inputs(config))
    return data


def _check_shard_cache(config: Mapping[str, Any], data: Sequence[Prepared]) -> None:
    """Raises ValueError unless the shards of buckets that a run reads fit into its cache."""
    online, train = config["text"]["online"], config["train"]
    stores = {caption_store("" if online else each.name) for each in text_inputs(config)}
    squares = train["validate_every"] or train["sample_every"]
    wanted = []
    for prepared in data:
        entries = prepared.entries("images")
        entries |= prepared.entries("images", prepared.evaluation_split) if squares else {}
        for store in stores:
            entries |= prepared.entries(store)
        if prepared.shard_cache:
            wanted.append((prepared.shard_cache, entries))
    check_room(wanted)


def _told(config: Mapping[str, Any], data: Sequence[Prepared]) -> Iterator[str]:
    """A line about each set that a run reads, and one about the view of its images."""
    section = config["data"]
    found = sets.data_sets(section)
    total = sum(one.weight for one in found)
    for one, prepared in zip(found, data, strict=True):
        share = f"{100 * one.weight / total:.3g} % of the examples from " if one.name else ""
        counts = prepared.manifest["counts"]
        images = counts["images"]
        yield (
            f"{share}{one.path}: {images['train']:,} training images,"
            f" {images.get('heldout', 0):,} held out, {counts['captions']:,} captions"
            f" ({_text_of(config, prepared)})"
        )
    low, high = section["view_scale"]
    view = section["view"] + f" of {low:g} to {high:g}" * (section["view"] == "random_crop")
    mirrored = "mirrored at random" if section["flip"] else "not mirrored"
    yield f"view of the images: {view}, {mirrored}"


def _text_of(config: Mapping[str, Any], prepared: Prepared) -> str:
    """What a run reads of the captions of a set, in words."""
    inputs = text_inputs(config)
    if not inputs:
        return "not read"
    names = " of " + " and ".join(each.name for each in inputs) if inputs[0].name else ""
    if config["text"]["online"]:
        return f"features{names} computed in the run"
    return f"features{names} in {prepared.embedding}"


def _check_squares(config: Mapping[str, Any], data: Sequence[Prepared]) -> None:
    """Raises ValueError if images are too small for the squares of validation and sample grids.

    With data.buckets, the training may have sides that are smaller.
    """
    train = config["train"]
    for prepared in data if train["validate_every"] or train["sample_every"] else ():
        try:
            prepared.check_image_size(config["data"]["image_size"])
        except ValueError as error:
            off = "train.validate_every = 0 and train.sample_every = 0, which read squares"
            raise ValueError(f"{error}, or set {off}") from error


def _stored_encoders(
    data: Sequence[Prepared], inputs: Sequence[TextInput]
) -> dict[str, encoder_identity.Identity]:
    """{name: identity} of the encoders whose stored features a stage reads.

    A stage without text keeps that of an unnamed encoder. Raises ValueError unless all sets have
    the features, under each name of one encoder.
    """
    remedy = "prepare both with the same --encoder"
    for prepared in data:
        prepared.check_text(inputs)
        who = f"{data[0].path} and {prepared.path} in data.mixture"
        encoder_identity.check_same(inputs, data[0].encoders, prepared.encoders, who, remedy)
    kept = [text_input.name for text_input in inputs] or [UNNAMED]
    return {name: data[0].encoders[name] for name in kept if name in data[0].encoders}


def _report_cuts(online: OnlineText, data: Sequence[Prepared]) -> None:
    """Logs the share of captions that are longer than each of the stage's inputs."""
    for prepared in data:
        for text_input, share in online.cut_shares(prepared).items():
            if share:
                reader = f" for {text_input.name}" if text_input.name else ""
                log.warning(
                    "about %.2g %% of the captions of %s are cut%s; raise %s, if the encoder reads"
                    " more",
                    *(100 * share, prepared.path, reader, text_input.length_field),
                )


def repeat_first(
    data: Iterator[pipeline.Batch],
) -> Iterator[pipeline.Batch]:
    """Yields the first batch of `data` forever."""
    batch = next(data)
    data.close()
    while True:
        yield batch
