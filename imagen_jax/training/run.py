"""A run before its first step: its compiled program, its data's identity and its FLOPs."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax

from imagen_jax import cascade, sharding
from imagen_jax.data.pipeline import open_prepared
from imagen_jax.hardware import chips
from imagen_jax.stage import RNG, create_stage
from imagen_jax.training import state
from imagen_jax.training.step import TrainProgram, forward_flops
from imagen_jax.weights import checkpoint

log = logging.getLogger("imagen_jax.train")


@dataclasses.dataclass(frozen=True)
class Run:
    """A config with the objects made from it.

    config: complete, of a new run (see `schema.complete`).
    meta: saved with every checkpoint; a resume compares it.
    program: the train step on the mesh.
    flops_per_image: of one image and step, without recomputation.
    peak_flops: of all devices, a second.
    """

    config: Mapping[str, Any]
    meta: Mapping[str, Any]
    program: TrainProgram
    flops_per_image: float
    peak_flops: float

    @classmethod
    def create(cls, config: Mapping[str, Any]) -> "Run":
        """Checks a complete config against data and devices; no array is allocated.

        Raises ValueError for a config that does not fit them.
        """
        mesh = sharding.make_mesh(config["mesh"])
        data = open_prepared(config["data"])
        if config["text"]["dim"]:
            data.check_text(config["text"]["dim"])
        program = TrainProgram.create(config, mesh)
        peak, source = chips.peak_flops(mesh.devices.flat[0])
        meta = {"config": config, "encoder": data.encoder, "manifest_hash": data.hash, "rng": RNG}
        flops = 3 * forward_flops(create_stage(config))
        run = cls(config, meta, program, flops, peak * mesh.size)
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
            "%.4g GFLOP an image and step; peak %.4g TFLOP/s (%s)",
            self.flops_per_image / 1e9,
            self.peak_flops / 1e12,
            peak_source,
        )
        for row in sharding.bytes_table(program.abstract, program.shardings):
            if row["bytes"] > 1024:
                log.info(
                    "  %-10s %9.2f MiB, %9.2f MiB a device, %3.0f %% sharded",
                    row["part"],
                    row["bytes"] / 2**20,
                    row["bytes_per_device"] / 2**20,
                    100 * row["sharded_bytes"] / row["bytes"],
                )
        for line in sharding.badly_split(
            program.abstract.params, program.mesh, settings["rules"], settings["fsdp_min_elements"]
        ):
            log.warning("not split: %s", line)

    def fresh_state(self, init_from: str = "") -> tuple[state.TrainState, dict[str, Any]]:
        """(the state before the first step, the origin of its weights for checkpoints).

        init_from: weights to start from, as `cascade.resolve` takes them; parameters and EMA become
        those. Raises ValueError if they do not fit the model or the data's text encoder.
        """
        program = self.program
        fresh = state.create_state(
            program.stage, program.optimizer, self.config["seed"], program.shardings
        )
        if not init_from:
            return fresh, {}
        params, meta = checkpoint.load_params(cascade.resolve(init_from))
        if program.stage.text_dim:
            cascade.check_encoder(
                meta["encoder"], self.meta["encoder"], f"{init_from} and the data"
            )
        origin = {name: meta[name] for name in ("step", "which", "sha256")} | {"path": init_from}
        return state.with_params(fresh, params, program.shardings), {"init_from": origin}

    @property
    def rows(self) -> list[int]:
        """The rows of each global batch that this process reads."""
        return sharding.process_rows(self.config["data"]["batch_size"], self.program.mesh)

    def place(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of a host batch that the step reads, on the mesh."""
        fields = {name: batch[name] for name in self.program.batch}
        return sharding.place_batch(fields, self.program.mesh)

    def rates(self, times: Mapping[str, float]) -> dict[str, float]:
        """Times of an interval with model FLOPs a second and MFU (recomputation not counted)."""
        if not times:
            return {}
        flops = self.flops_per_image * times["time/images_per_s"]
        return {
            **times,
            "time/model_tflops_per_s": flops / 1e12,
            "time/mfu": flops / self.peak_flops,
        }
