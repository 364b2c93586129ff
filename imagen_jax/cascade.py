"""A cascade: text -> base image -> super-resolution -> super-resolution, on a mesh.

Parameters are sharded by the rules of each stage's training, rows over the batch axes of the mesh.
Images are rounded to uint8 between stages, because stages are trained on uint8 low-res images.
"""

import dataclasses
import importlib.resources
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Key, Shaped, UInt8, UInt32

from imagen_jax import encoder_identity, sampling_parameters, schema, sharding
from imagen_jax.data.example_text import fields_of
from imagen_jax.distributed import agreement
from imagen_jax.row_batches import RowBatch, most_held, row_batches
from imagen_jax.stage import (
    Batch,
    Params,
    Stage,
    check_finite,
    check_interval,
    check_sampling,
    create_stage,
    images_and_finite,
    random_key,
)
from imagen_jax.stage_sizes import Size, square
from imagen_jax.storage import check_object
from imagen_jax.text_inputs import TextFeatures
from imagen_jax.weights import checkpoint
from imagen_jax.weights.leaves import check_fit

Features = Mapping[str, TextFeatures]  # of one text, by the names of the text inputs
STAGES = ("base", "sr_1", "sr_2")  # the names in a cascade config, in order
# What train stores with the weights: {name: type}.
STAGE_META = {"config": dict, "encoder": dict, "manifest_hash": str}
RESIDENT_SHARE = 0.5  # of a device's memory; larger parameters are placed stage by stage
GROUP_BYTES = 2**28  # of the images of earlier stages, if stages are placed one after the other


@dataclasses.dataclass(frozen=True)
class LoadedStage:
    """A stage with parameters, ready to sample.

    params: on the mesh, or on the host if the stages do not fit on the devices together.
    shardings: of the parameters on the mesh.
    sampling: the config section of that name.
    encoder: identity of the text encoder that the stage was trained with, or of several, see
        imagen_jax/encoder_identity.py.
    identity: provenance of the parameters: path, stage name, step, which weights, manifest hash and
        checksum.
    sample: the result of `sample_program`.
    size: of the pictures.
    """

    stage: Stage
    params: Params
    shardings: Params
    sampling: Mapping[str, Any]
    encoder: Mapping[str, Any]
    identity: Mapping[str, Any]
    sample: Callable
    size: Size

    @property
    def mesh(self) -> Mesh:
        return jax.tree.leaves(self.shardings)[0].mesh

    @property
    def resident(self) -> bool:
        """Whether the parameters stay on the devices."""
        return isinstance(jax.tree.leaves(self.params)[0], jax.Array)

    def placed(self) -> Params:
        """The parameters on the mesh."""
        return self.params if self.resident else sharding.place_tree(self.params, self.shardings)

    def on_mesh(self) -> "LoadedStage":
        """This stage with its parameters on the devices."""
        return dataclasses.replace(self, params=self.placed())

    def with_sampling(self, sampling: Mapping[str, Any], index: int) -> "LoadedStage":
        """This stage with another section `sampling`. index: see `load_stage`."""
        program = sample_program(self.stage, self.mesh, self.shardings, sampling, index, self.size)
        return dataclasses.replace(self, sampling=sampling, sample=program)

    def with_size(self, size: Size, index: int) -> "LoadedStage":
        """This stage with pictures of another size. index: see `load_stage`."""
        return dataclasses.replace(self, size=size).with_sampling(self.sampling, index)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The pictures of one batch that this process writes.

    rows: their rows.
    count: the number of pictures in the batch, of all processes.
    images: for each stage the images [b h w 3] of these rows.
    """

    rows: list[int]
    count: int
    images: list[UInt8[np.ndarray, "b _ _ 3"]]


def resolve(path: str) -> str:
    """Resolves "embedded:NAME" to a file of the package; returns other paths unchanged.

    Raises ValueError for an unknown NAME.
    """
    name = path.removeprefix("embedded:")
    if name == path:
        return path
    folder = Path(str(importlib.resources.files("imagen_jax") / "assets" / "cascade"))
    files = {file.stem: str(file) for file in folder.glob("*.safetensors")}
    if name not in files:
        raise ValueError(
            f"there is no embedded checkpoint {name!r}; choose one of {', '.join(sorted(files))}"
        )
    return files[name]


def load_stage(
    path: str, sampling: Mapping[str, Any], which: str, mesh: Mesh, index: int
) -> LoadedStage:
    """Loads one stage with its training config; its parameters stay on the host.

    path: a workdir, a checkpoint, an exported file, or embedded:NAME.
    sampling: replaces the section `sampling` of the stage's config.
    which: the weights to load, see `checkpoint.load_params`.
    index: position of the stage in a cascade, which its noise depends on.
    """
    sampling = schema.complete_sampling(sampling, f"sampling of {path}")
    check_sampling(sampling)
    params, meta = checkpoint.load_params(resolve(path), which)
    check_object(path, meta, STAGE_META, "use a checkpoint of imagen_jax.train, or its export")
    config = schema.complete(meta["config"], f"config of {path}")
    stage = create_stage(config, mesh)
    check_fit(params, jax.eval_shape(stage.init, jax.random.key(0)), f"{path}: ")
    params = sampling_parameters.for_sampling(params, stage)
    shardings = sampling_parameters.parameter_shardings(params, mesh, config["mesh"])
    identity = {"checkpoint": path, "name": stage.name} | {
        key: meta[key] for key in ("step", "which", "manifest_hash", "sha256")
    }
    size = square(stage.image_size)
    program = sample_program(stage, mesh, shardings, sampling, index, size)
    return LoadedStage(stage, params, shardings, sampling, meta["encoder"], identity, program, size)


def sample_program(
    stage: Stage,
    mesh: Mesh,
    shardings: Params,
    sampling: Mapping[str, Any],
    index: int,
    size: Size,
) -> Any:
    """Jitted (params, batch) -> (uint8 images [b h w 3], whether each one is finite [b]).

    batch: `seed` [b] and what `Stage.sample` needs. index: see `load_stage`. size: h and w. plan
    compiles it too.
    """

    def sample(params: Params, batch: Batch) -> tuple[UInt8[Array, "b h w 3"], Bool[Array, "b"]]:
        keys = sample_keys(batch["seed"], index)
        return images_and_finite(stage.sample(params, keys, batch, sampling, size))

    rows = sharding.batch_sharding(mesh)
    return jax.jit(
        sample,
        in_shardings=(shardings, rows),
        out_shardings=rows,
        compiler_options=sharding.compiler_options(mesh),
    )


def check_stages(stages: Sequence[str]) -> None:
    """Raises ValueError unless these are consecutive stages of a cascade."""
    runs = [STAGES[i:j] for i in range(len(STAGES)) for j in range(i + 1, len(STAGES) + 1)]
    if tuple(stages) not in runs:
        raise ValueError(
            f"--stages {','.join(stages)}: give consecutive stages of {','.join(STAGES)}"
        )


def run_stages(
    config: Mapping[str, Any], wanted: Sequence[str], flag: str = "--config"
) -> list[str]:
    """The wanted stages up to the first one without a checkpoint: those that a cascade runs.

    flag: the flag of the config, for the message. Raises ValueError if the stages are not
    consecutive or the first one has no checkpoint.
    """
    check_stages(wanted)
    names = list(itertools.takewhile(lambda name: config[name]["checkpoint"], wanted))
    if not names:
        raise ValueError(
            f"stage {wanted[0]} has no checkpoint: give {flag}.{wanted[0]}.checkpoint=PATH"
        )
    return names


def load_cascade(
    config: Mapping[str, Any], wanted: Sequence[str] = STAGES, mesh: Mesh | None = None
) -> list[LoadedStage]:
    """Loads the stages of a cascade config, in order: those of `run_stages`.

    mesh: by default that of the config, over all devices of all processes.

    Raises ValueError if the config is wrong, the first stage has no checkpoint, a checkpoint is of
    the wrong kind (base or super-resolution), the output size of a stage is not the input size of
    the next one, or two stages read different text encoders under one name.
    """
    config = schema.complete_cascade(config)
    names = run_stages(config, wanted)
    mesh = sharding.make_mesh(config["mesh"]) if mesh is None else mesh
    stages = []
    for name in names:
        section = config[name]["checkpoint"], config[name]["sampling"], config["which"]
        stages.append(load_stage(*section, mesh, STAGES.index(name)))
    for name, loaded in zip(names, stages):
        if bool(loaded.stage.lowres_size) != (name != STAGES[0]):
            kinds = ("a base stage", "a super-resolution stage")
            actual, needed = kinds if name != STAGES[0] else reversed(kinds)
            raise ValueError(
                f"{name}.checkpoint: {config[name]['checkpoint']} is {actual}, but {name} needs"
                f" {needed}"
            )
    for before, after in zip(stages, stages[1:]):
        side, expected = before.stage.image_size, after.stage.lowres_size
        if side != expected:
            raise ValueError(
                f"{before.stage.name} outputs {side}x{side} images, but {after.stage.name} expects"
                f" {expected}x{expected}: give stages of one cascade"
            )
    check_encoders(stages)
    return stages


def check_encoders(stages: Sequence[LoadedStage]) -> None:
    """Raises ValueError if stages read different text encoders under one name.

    Pooled vectors are compared between the stages that read them.
    """
    remedy = "use stages that were trained with the same text encoder"
    # {(name, whether a pooled vector is read): (a stage, its encoders)}
    first: dict[tuple[str, bool], tuple[str, Mapping[str, Any]]] = {}
    for loaded in stages:
        identities = encoder_identity.from_record(loaded.encoder)
        texts = loaded.stage.texts
        tokens = [dataclasses.replace(text_input, pooled_dim=0) for text_input in texts]
        for text_input in (*tokens, *(each for each in texts if each.pooled_dim)):
            key = text_input.name, bool(text_input.pooled_dim)
            stage, theirs = first.setdefault(key, (loaded.stage.name, identities))
            who = f"stages {stage} and {loaded.stage.name}"
            encoder_identity.check_same([text_input], theirs, identities, who, remedy)


def place(stages: Sequence[LoadedStage]) -> list[LoadedStage]:
    """Puts the parameters of all stages on the devices, if they fit there together.

    Otherwise they stay on the host, and `generate` places one stage at a time. Process 0 decides
    for all. Call it when nothing else needs the devices' memory any more, such as a text encoder.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    needed = sum(
        sampling_parameters.bytes_per_device(loaded.params, loaded.shardings) for loaded in stages
    )
    large = len(stages) > 1 and limit is not None and needed > RESIDENT_SHARE * limit
    if agreement.gather("large" if large else "")[0]:  # the memory of processes may differ
        return list(stages)
    return [loaded.on_mesh() for loaded in stages]


def check_intervals(stages: Sequence[LoadedStage]) -> None:
    """Raises ValueError for a guidance interval without effect, see `stage.check_interval`."""
    for loaded in stages:
        if loaded.stage.reads_text:
            check_interval(loaded.sampling, loaded.stage.schedule)


def sample_keys(seeds: Sequence[int] | UInt32[Array, "b"], stage_index: int) -> Key[Array, "b"]:
    """PRNG keys [b], one per picture, from its seed and the stage's position in the cascade."""
    key = lambda seed: jax.random.fold_in(random_key(seed), stage_index)
    return jax.vmap(key)(jnp.asarray(seeds, jnp.uint32))


def generate(
    stages: Sequence[LoadedStage],
    seeds: Sequence[int],
    text: Callable[[int], Features],
    batch_size: int,
    lowres: Sequence[UInt8[np.ndarray, "h w 3"]] | UInt8[np.ndarray, "n h w 3"] | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[Drawn]:
    """Samples rows and yields this process's pictures, batch by batch, in the order of the rows.

    A picture depends only on its own seed and text. All processes of a run call it with the same
    rows; each reads the seeds, texts and low-res images of the rows that it holds only.

    seeds: one per row.
    text: row -> its features, unpadded, by the names of the text inputs.
    batch_size: rows per batch, see `row_batches`. The last batch is padded with its last row, so
        each stage is compiled once; padding is never returned.
    lowres: input of the first stage per row if that is a super-resolution stage; may be lazy.
    rows: the rows to sample; by default all.

    Raises FloatingPointError for a picture with values that are not finite.
    """
    rows = range(len(seeds)) if rows is None else rows
    batches = row_batches(rows, batch_size, stages[0].mesh)

    def inputs(batch: RowBatch, stage: Stage) -> dict[str, Shaped[np.ndarray, "b ..."]]:
        seed = np.asarray([seeds[row] for row in batch.held], np.uint32)
        return {"seed": seed, **pad_rows([text(row) for row in batch.held], stage)}

    def first(batch: RowBatch) -> UInt8[np.ndarray, "b h w 3"] | None:
        return None if lowres is None else np.stack([lowres[row] for row in batch.held])

    if all(loaded.resident for loaded in stages):
        yield from _stage_after_stage(stages, batches, inputs, first)
    else:
        per_row = sum(3 * math.prod(loaded.size) for loaded in stages[:-1])
        held = most_held(batch_size, stages[0].mesh)  # the order of programs depends on it
        group = max(1, GROUP_BYTES // max(1, per_row * held))
        for start in range(0, len(batches), group):
            yield from _stage_by_stage(stages, batches[start : start + group], inputs, first)


def _stage_after_stage(
    stages: Sequence[LoadedStage], batches: Sequence[RowBatch], inputs: Callable, first: Callable
) -> Iterator[Drawn]:
    """Samples all stages of a batch, then the next batch. Images stay on the devices in between.

    A batch is yielded once the next one is dispatched, so the devices do not wait for its files.
    """
    before = None
    for batch in batches:
        image, results = first(batch), []
        for loaded in stages:
            fields = inputs(batch, loaded.stage)
            given = {} if image is None else {"lowres": image}
            if isinstance(image, np.ndarray):
                fields, given = fields | given, {}
            placed = sharding.place_batch(fields, loaded.mesh) | given
            image, finite = loaded.sample(loaded.params, placed)
            results.append((image, finite))
        if before is not None:
            yield _fetch(stages, *before)
        before = batch, results
    if before is not None:
        yield _fetch(stages, *before)


def _stage_by_stage(
    stages: Sequence[LoadedStage], batches: Sequence[RowBatch], inputs: Callable, first: Callable
) -> Iterator[Drawn]:
    """Samples all batches with one stage, then with the next: one stage is on the devices."""
    images: list[UInt8[np.ndarray, "b _ _ 3"] | None] = [None] * len(batches)
    earlier: list[list[UInt8[np.ndarray, "b _ _ 3"]]] = [[] for _ in batches]
    for loaded in stages:
        params = loaded.placed()
        for i, batch in enumerate(batches):
            fields = inputs(batch, loaded.stage)
            lowres = first(batch) if loaded is stages[0] else images[i]
            fields |= {} if lowres is None else {"lowres": lowres}
            result = loaded.sample(params, sharding.place_batch(fields, loaded.mesh))
            images[i] = _held(loaded, batch, *result)
            earlier[i].append(images[i][list(batch.owned.values())])
            if loaded is stages[-1]:
                yield Drawn(list(batch.owned), batch.count, earlier[i])
                images[i], earlier[i] = None, []
        del params


def _fetch(stages: Sequence[LoadedStage], batch: RowBatch, results: Sequence[Any]) -> Drawn:
    """The pictures of this process on the host, checked."""
    images = [_held(loaded, batch, *result) for loaded, result in zip(stages, results)]
    owned = list(batch.owned.values())
    return Drawn(list(batch.owned), batch.count, [image[owned] for image in images])


def _held(
    loaded: LoadedStage,
    batch: RowBatch,
    image: UInt8[Array, "b h w 3"],
    finite: Bool[Array, "b"],
) -> UInt8[np.ndarray, "held h w 3"]:
    """The images of the rows that this process holds. Raises FloatingPointError, see `generate`."""
    real = [i for i, row in enumerate(batch.held) if row not in batch.held[:i]]
    check_finite(sharding.fetch_rows(finite)[real], loaded.stage.name)
    return sharding.fetch_rows(image)


def pad_rows(features: Sequence[Features], stage: Stage) -> dict[str, Shaped[np.ndarray, "b ..."]]:
    """The text fields of a stage for these texts (see `Stage.batch_shapes`); {} without text.

    Raises ValueError if a text has more tokens than the stage's text length.
    """
    fields = {}
    for text_input in stage.texts:
        rows = [fields_of(text_input, each[text_input.name]) for each in features]
        fields |= {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return fields
