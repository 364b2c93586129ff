"""A training run before its first step: train step, identity of the data, FLOPs.

The train step is not compiled here.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from imagen_jax import cascade, encoder_identity, sharding
from imagen_jax.data import pipeline
from imagen_jax.hardware import chips
from imagen_jax.stage import RNG, check_interval, create_stage
from imagen_jax.text_inputs import text_inputs
from imagen_jax.training import state
from imagen_jax.training.step import TrainProgram, forward_flops
from imagen_jax.weights import checkpoint

log = logging.getLogger("imagen_jax.train")

MIN_LOGGED_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class Run:
    """A config and the objects built from it.

    config: complete config, checked as that of a new run (see `schema.complete`).
    meta: identity of the run; saved with every checkpoint and compared on resume.
    program: the train step on the mesh.
    flops_per_image: model FLOPs per image, forward and backward, without rematerialization.
    peak_flops: peak FLOP/s of all devices together.
    overfit: every step has the first batch.
    """

    config: Mapping[str, Any]
    meta: Mapping[str, Any]
    program: TrainProgram
    flops_per_image: float
    peak_flops: float
    overfit: bool

    @classmethod
    def create(cls, config: Mapping[str, Any], overfit: bool = False) -> "Run":
        """Builds a run and checks its complete config against data and devices.

        Allocates no arrays. Raises ValueError for a config that does not fit data or devices.
        """
        check_interval(config["sampling"], config["diffusion"]["schedule"])
        mesh = sharding.make_mesh(config["mesh"])
        data = pipeline.open_prepared(config["data"])
        if not config["text"]["online"]:
            data.check_text(text_inputs(config))
        program = TrainProgram.create(config, mesh)
        peak, source = chips.peak_flops(mesh.devices.flat[0])
        meta = {"config": config, "encoder": data.encoder, "manifest_hash": data.hash, "rng": RNG}
        flops = 3 * forward_flops(create_stage(config))
        run = cls(config, meta, program, flops, peak * mesh.size, overfit)
        run.describe(source)
        return run

    def describe(self, peak_source: str) -> None:
        """Logs the model's size, its FLOPs, and the sharding of each part of the state."""
        program, settings = self.program, self.config["mesh"]
        parameters = sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params))
        shape = {axis: size for axis, size in program.mesh.shape.items() if size > 1}
        log.info(
            "%s: %s parameters on %s", self.config["name"], f"{parameters:,}", shape or "one device"
        )
        log.info(
            "%.4g GFLOP per image; peak %.4g TFLOP/s (%s)",
            self.flops_per_image / 1e9,
            self.peak_flops / 1e12,
            peak_source,
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

    def fresh_state(self, init_from: str = "") -> tuple[state.TrainState, dict[str, Any]]:
        """(initial training state, origin of its weights to store in checkpoints).

        init_from: the initial weights, as for `cascade.resolve`, copied to parameters and EMA; ""
        for random parameters. Raises ValueError if the weights do not fit the model or the text
        encoder of the data.
        """
        program = self.program
        initial = state.create_state(
            program.stage, program.optimizer, self.config["seed"], program.shardings
        )
        if not init_from:
            return initial, {}
        params, meta = checkpoint.load_params(cascade.resolve(init_from))
        if program.stage.text_dim:
            encoder_identity.check_encoder(
                meta["encoder"], self.meta["encoder"], f"{init_from} and the data"
            )
        origin = {name: meta[name] for name in ("step", "which", "sha256")} | {"path": init_from}
        return state.with_params(initial, params, program.shardings), {"init_from": origin}

    @property
    def rows(self) -> list[int]:
        """The rows of each global batch that this process reads."""
        return sharding.process_rows(self.config["data"]["batch_size"], self.program.mesh)

    def batches(self, step: int, rows: Sequence[int] | None = None) -> Iterator[pipeline.Batch]:
        """The training batches of `step`, step + 1, ... (see `pipeline.batches`)."""
        step = 0 if self.overfit else step
        data = pipeline.batches(self.config["data"], self.config["seed"], step, "train", rows)
        return repeat_first(data) if self.overfit else data

    def place(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Moves the fields that the step reads from a host batch to the mesh."""
        fields = {name: batch[name] for name in self.program.batch}
        return sharding.place_batch(fields, self.program.mesh)

    def rates(self, times: Mapping[str, float]) -> dict[str, float]:
        """Adds model TFLOP/s and MFU (without rematerialization) to an interval's times."""
        if not times:
            return {}
        flops = self.flops_per_image * times["time/images_per_s"]
        return {
            **times,
            "time/model_tflops_per_s": flops / 1e12,
            "time/mfu": flops / self.peak_flops,
        }


def repeat_first(
    data: Iterator[pipeline.Batch],
) -> Iterator[pipeline.Batch]:
    """Yields the first batch of `data` forever."""
    batch = next(data)
    data.close()
    while True:
        yield batch
