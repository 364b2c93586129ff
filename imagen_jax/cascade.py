"""A cascade: text -> base image -> super-resolution -> super-resolution.

Images are rounded to uint8 between stages, because stages are trained on uint8 low-res images.
"""

import dataclasses
import importlib.resources
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Key, Shaped, UInt8

from imagen_jax import schema
from imagen_jax.data.transforms import pad_text
from imagen_jax.stage import (
    Stage,
    check_finite,
    check_interval,
    check_sampling,
    create_stage,
    images_and_finite,
    random_key,
)
from imagen_jax.storage import check_object
from imagen_jax.weights import checkpoint
from imagen_jax.weights.leaves import check_fit

Features = BFloat16[np.ndarray, "_ d"]  # of one text, unpadded; each has its own length
STAGES = ("base", "sr_1", "sr_2")  # the names in a cascade config, in order
# What train stores with the weights: {name: type}.
STAGE_META = {"config": dict, "encoder": dict, "manifest_hash": str}
# Fields of an encoder's identity that determine its features.
SAME_TEXT = ("weights_sha256", "tokenizer_sha256", "dim")


@dataclasses.dataclass(frozen=True)
class LoadedStage:
    """A stage with parameters, ready to sample.

    sampling: the config section of that name.
    encoder: identity of the text encoder that the stage was trained with.
    identity: provenance of the parameters: path, stage name, step, which weights, manifest hash and
        checksum.
    sample: jitted (params, keys [b], batch) -> (uint8 images [b s s 3], whether each one is finite
        [b]).
    """

    stage: Stage
    params: Any
    sampling: Mapping[str, Any]
    encoder: Mapping[str, Any]
    identity: Mapping[str, Any]
    sample: Callable


def resolve(path: str) -> str:
    """Resolves "embedded:NAME" to a file of the package; returns other paths unchanged.

    Raises ValueError for an unknown NAME.
    """
    name = path.removeprefix("embedded:")
    if name == path:
        return path
    file = Path(
        str(importlib.resources.files("imagen_jax") / "assets" / "cascade" / f"{name}.safetensors")
    )
    if not file.exists():
        raise ValueError(
            f"there is no embedded checkpoint {name!r}; choose one of"
            f" {sorted(f.stem for f in file.parent.glob('*.safetensors'))}"
        )
    return str(file)


def load_stage(path: str, sampling: Mapping[str, Any], which: str) -> LoadedStage:
    """Loads one stage with its training config.

    path: a workdir, a checkpoint, an exported file, or embedded:NAME.
    sampling: replaces the section `sampling` of the stage's config.
    which: the weights to load, see `checkpoint.load_params`.
    """
    sampling = schema.complete_sampling(sampling, f"sampling of {path}")
    check_sampling(sampling)
    params, meta = checkpoint.load_params(resolve(path), which)
    check_object(path, meta, STAGE_META, "use a checkpoint of imagen_jax.train, or its export")
    stage = create_stage(schema.complete(meta["config"], f"config of {path}"))
    check_fit(params, jax.eval_shape(stage.init, jax.random.key(0)), f"{path}: ")
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    sample = jax.jit(
        lambda params, keys, batch: images_and_finite(stage.sample(params, keys, batch, sampling))
    )
    identity = {"checkpoint": path, "name": stage.name} | {
        key: meta[key] for key in ("step", "which", "manifest_hash", "sha256")
    }
    return LoadedStage(stage, params, sampling, meta["encoder"], identity, sample)


def load_cascade(config: Mapping[str, Any], wanted: Sequence[str] = STAGES) -> list[LoadedStage]:
    """Loads the stages of a cascade config, in order, up to the first one without a checkpoint.

    Raises ValueError if the config is wrong, the first stage has no checkpoint, a checkpoint is of
    the wrong kind (base or super-resolution), the output size of a stage is not the input size of
    the next one, or two stages were trained with different text encoders.
    """
    config = schema.complete_cascade(config)
    names = list(itertools.takewhile(lambda name: config[name]["checkpoint"], wanted))
    if not names:
        raise ValueError(
            f"stage {wanted[0]} has no checkpoint: give --config.{wanted[0]}.checkpoint=PATH"
        )
    stages = [
        load_stage(config[name]["checkpoint"], config[name]["sampling"], config["which"])
        for name in names
    ]
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
    text_stages = [loaded for loaded in stages if loaded.stage.text_dim]
    for before, after in zip(text_stages, text_stages[1:]):
        check_encoder(
            before.encoder, after.encoder, f"stages {before.stage.name} and {after.stage.name}"
        )
    return stages


def check_intervals(stages: Sequence[LoadedStage]) -> None:
    """Raises ValueError for a guidance interval without effect, see `stage.check_interval`."""
    for loaded in stages:
        if loaded.stage.text_dim:
            check_interval(loaded.sampling, loaded.stage.schedule)


def check_encoder(a: Mapping[str, Any], b: Mapping[str, Any], who: str) -> None:
    """Raises ValueError unless both encoder identities agree in weights, tokenizer and width.

    who: the two things that are compared, the subject of the message.
    """
    differ = [
        f"{key}: {a.get(key)} and {b.get(key)}" for key in SAME_TEXT if a.get(key) != b.get(key)
    ]
    if differ:
        raise ValueError(
            f"{who} do not share a text encoder ({'; '.join(differ)}); use stages that were"
            " trained with the same text encoder"
        )


def sample_keys(seeds: Sequence[int], stage_index: int) -> Key[Array, "b"]:
    """PRNG keys [b], one per picture, from its seed and the stage's position in the cascade."""
    key = lambda seed: jax.random.fold_in(random_key(seed), stage_index)
    return jax.vmap(key)(jnp.asarray(seeds, jnp.uint32))


def generate(
    stages: Sequence[LoadedStage],
    seeds: Sequence[int],
    text: Sequence[Features],
    batch_size: int,
    lowres: UInt8[np.ndarray, "n r r 3"] | None = None,
    first_stage: int = 0,
) -> Iterator[list[UInt8[np.ndarray, "b s s 3"]]]:
    """Yields, for each batch of pictures, a list with the images of every stage.

    seeds: one per picture.
    text: unpadded features [l d] per picture.
    lowres: input of the first stage if that is a super-resolution stage.
    first_stage: position of stages[0] in the full cascade. With it, a stage that runs alone gets
        the same noise as in the cascade.

    The last batch is padded to `batch_size` with its last picture, so each stage is compiled once.
    A picture depends only on its own seed and text.
    """
    for start in range(0, len(seeds), batch_size):
        indices = np.arange(start, start + batch_size)
        indices = np.minimum(indices, len(seeds) - 1)
        image = None if lowres is None else lowres[indices]
        stage_images = []
        for i, loaded in enumerate(stages):
            batch = pad_rows([text[index] for index in indices], loaded.stage)
            if image is not None:
                batch["lowres"] = image
            keys = sample_keys([seeds[index] for index in indices], first_stage + i)
            image, finite = jax.device_get(loaded.sample(loaded.params, keys, batch))
            check_finite(finite, loaded.stage.name)
            stage_images.append(image[: min(batch_size, len(seeds) - start)])
        yield stage_images


def pad_rows(features: Sequence[Features], stage: Stage) -> dict[str, Shaped[np.ndarray, "b ..."]]:
    """{"text": [b l d], "text_mask": [b l]} for a stage; {} for a stage without text.

    Raises ValueError if a caption has more tokens than the stage's text length.
    """
    if not stage.text_dim:
        return {}
    text, mask = zip(*(pad_text(feature, stage.text_length) for feature in features))
    return {"text": np.stack(text), "text_mask": np.stack(mask)}
