"""From prompts to a set of pictures: encodes the prompts, samples the cascade, writes the files.

All processes of a run call it together. The text encoder is freed before the stages are placed on
the devices. Memory holds a row of the manifest per picture, and the images of a few batches.
"""

import contextlib
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from imagen_jax import (
    cascade,
    cli,
    drawn_sets,
    encoder_identity,
    run_log,
    stage_sizes,
)
from imagen_jax.distributed import agreement, shared_files
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.picture_set import Requests
from imagen_jax.row_batches import row_batches
from imagen_jax.stage_sizes import Size
from imagen_jax.storage import absolute
from imagen_jax.text import feature_file
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.encoder_list import parse_encoders
from imagen_jax.text_inputs import longest_input
from imagen_jax.weights.text_encoders import load_text_encoder, local_mesh, readable_length

log = logging.getLogger("imagen_jax.sample")


class Drawer:
    """A cascade with its text encoders, checked and ready to draw one set.

    config: a complete cascade config. stages: loaded, on the host. encoders: one in memory, none
    once the prompts are encoded. sources: {text input of the stages: name of its encoder}. record:
    the fields of a picture's record that all pictures share; `size` only if the pictures are not
    the squares that the stages draw without it.
    """

    def __init__(self, config: Mapping[str, Any], names: Sequence[str], size: Size | None = None):
        """names: the wanted stages, in order. size: see `load_stages`.

        Raises ValueError if stages, encoder or size do not fit.
        """
        self.config = config
        self.stages = load_stages(config, names, size)
        self.encoders = load_encoders(config, self.stages)
        identities = self.encoders.identities
        self.sources = text_sources(self.stages, identities, config["encoder"])
        self.record = {
            "stages": cascade.run_stages(config, names),
            "config": dict(config),
            "checkpoints": [dict(loaded.identity) for loaded in self.stages],
            "encoder": encoder_identity.to_record(identities),
        }
        stages = [loaded.stage for loaded in self.stages]
        if self.sizes != stage_sizes.of_stages(stages, None):
            self.record["size"] = list(self.sizes[-1])

    @property
    def sizes(self) -> list[Size]:
        """The size of the pictures of each stage."""
        return [loaded.size for loaded in self.stages]


def load_stages(
    config: Mapping[str, Any], names: Sequence[str], size: Size | None = None
) -> list[cascade.LoadedStage]:
    """The stages of a complete cascade config, see `cascade.load_cascade`.

    size: of the pictures of the last stage that runs; None for squares of each stage's image size.
    Raises ValueError if a stage cannot draw at the size that follows for it.
    """
    stages = cascade.load_cascade(config, names)
    sizes = stage_sizes.of_stages([loaded.stage for loaded in stages], size)
    named = zip(stages, sizes, cascade.run_stages(config, names))
    return [
        loaded if loaded.size == own else loaded.with_size(own, cascade.STAGES.index(name))
        for loaded, own, name in named
    ]


def load_encoders(config: Mapping[str, Any], stages: Sequence[cascade.LoadedStage]) -> Encoders:
    """The text encoders of a cascade config.

    Each is loaded for the longest texts of the inputs that read it. A stage may have been trained
    with more padding than its encoder's longest text.
    """
    inputs = [text_input for loaded in stages for text_input in loaded.stage.texts]
    given, dtype = parse_encoders(config["encoder"]), config["encoder_dtype"]
    loaders = {}
    for name, encoder in given.items():
        length = readable_length(encoder, longest_input(name, inputs, given))
        loaders[name] = partial(load_text_encoder, encoder, length, dtype, local_mesh)
    return Encoders(loaders)


def text_sources(
    stages: Sequence[cascade.LoadedStage], identities: Mapping[str, Any], given: str
) -> dict[str, str]:
    """{text input of the stages: name of its encoder}.

    identities: of the encoders, by name. given: the encoders as the config names them.

    Raises ValueError if a stage was trained with another encoder.
    """
    sources, remedy = {}, _remedy(stages)
    for loaded in stages:
        trained, who = (
            encoder_identity.from_record(loaded.encoder),
            f"{loaded.stage.name} and {given}",
        )
        for each in loaded.stage.texts:
            identity = trained[each.name]
            sources[each.name] = encoder_identity.find(each, identity, identities, who, remedy)
    for name in sorted(identities.keys() - set(sources.values())) if agreement.is_first() else ():
        encoder = f"text encoder {name}" if name else "text encoder"
        log.warning("no stage reads the %s: leave it out of the cascade's encoder", encoder)
    return sources


def _remedy(stages: Sequence[cascade.LoadedStage]) -> str:
    """What to do if the encoders are not those of the trainings, for a message."""
    names = dict.fromkeys(
        each.name for loaded in stages for each in loaded.stage.texts if each.name
    )
    form = "+".join(f"{name}=..." for name in names) or "..."
    encoders = "encoders" if len(names) > 1 else "encoder"
    return (
        f"give the text {encoders} of the training, --config.encoder={form} (--cascade.encoder in"
        " evaluate)"
    )


def _names_read(encoders: Encoders, sources: Mapping[str, str]) -> list[str]:
    """The names of the encoders that the stages read, that of the encoder in memory first."""
    return [name for name in encoders.in_turn() if name in sources.values()]


def check_prompts(drawer: Drawer, prompts: Sequence[str]) -> None:
    """`warn_of_prompts` in process 0, and the check of the stages with a shorter text length.

    Raises ValueError, in all processes, for a prompt that such a stage cannot read.
    """
    for name in _names_read(drawer.encoders, drawer.sources):
        lengths = {
            loaded.stage.name: text_input.length
            for loaded in drawer.stages
            for text_input in loaded.stage.texts
            if drawer.sources[text_input.name] == name
        }
        _check_prompts(drawer.encoders.load(name), prompts, lengths)


def _check_prompts(
    encoder: TextEncoder, prompts: Sequence[str], lengths: Mapping[str, int]
) -> None:
    """`check_prompts` for one encoder. lengths: {stage that reads it: its text length}."""
    shortest = min(lengths, key=lengths.get)
    if lengths[shortest] < encoder.max_length:
        _check_lengths(encoder, prompts, shortest, lengths[shortest])
    if agreement.is_first():
        warn_of_prompts(encoder, prompts)


def _check_lengths(encoder: TextEncoder, prompts: Sequence[str], stage: str, length: int) -> None:
    """Raises ValueError for a prompt of more than `length` tokens."""
    for chunk in feature_file.chunks(prompts):
        for prompt, tokens in zip(chunk, encoder.tokenize(chunk)[0]):
            if len(tokens) > length:
                raise ValueError(
                    f"stage {stage} reads at most {length} tokens, but a prompt has {len(tokens)}:"
                    " shorten it, or give stages of one text length:"
                    f" {cli.quoted(prompt)}"
                )


def warn_of_prompts(encoder: TextEncoder, prompts: Sequence[str]) -> None:
    """Prints a warning for each prompt that the encoder cuts or cannot read completely."""
    for chunk in feature_file.chunks(prompts):
        _, cut = encoder.tokenize(chunk)
        for prompt, is_cut, unknown in zip(chunk, cut, encoder.unknown(chunk)):
            if is_cut:
                print(
                    f"warning: prompt is longer than {encoder.max_length} tokens and was cut:"
                    f" {cli.quoted(prompt)}"
                )
            if unknown:
                print(
                    f"warning: the text encoder does not know {unknown!r} and reads it as the"
                    f" unknown token; use other words: {cli.quoted(prompt)}"
                )


def check_disk(output: AnyPath, missing: Sequence[tuple[int, Size]]) -> None:
    """Raises ValueError if the pictures to draw may not fit on the disk. A bucket has no limit.

    missing: (number of pictures, their size) of each set.
    """
    if in_bucket(output):
        return
    output.mkdir(parents=True, exist_ok=True)
    needed = sum(3 * count * math.prod(size) for count, size in missing)
    free = shutil.disk_usage(output).free
    if needed > free:
        raise ValueError(
            f"{sum(count for count, _ in missing):,} pictures need up to {needed / 2**30:.1f} GiB,"
            f" but {output} has {free / 2**30:.1f} GiB: give another --output, or fewer prompts"
        )


def draw(
    drawer: Drawer,
    requests: Requests,
    output: AnyPath,
    image: Mapping[str, Any],
    lowres: UInt8[np.ndarray, "h w 3"] | None = None,
) -> AnyPath:
    """Draws all rows of a set that are not drawn yet. Returns the path of its manifest.

    image: the fields `image` and `image_sha256` of the record. lowres: the --image itself, the
    input of the first stage.

    Raises ValueError if the processes do not agree, FloatingPointError, see `cascade.generate`.
    """
    record = drawer.record | image
    agreement.check(
        drawn_sets.facts_of(drawn_sets.job_of(requests, record))
        | {"--output": str(absolute(output))}
    )
    shared_files.check_shared(output)
    inputs = None
    if lowres is not None:
        inputs = np.broadcast_to(lowres, (len(requests), *lowres.shape))
    with drawn_sets.Reservation(output, requests, record, earlier=drawer.sizes[:-1]) as reserved:
        if reserved.left:
            text = encode_prompts(drawer, requests, [reserved.left], output)
            stages = cascade.place(drawer.stages)
            draw_left(reserved, stages, text, drawer.config["batch_size"], inputs)
        return reserved.finish()


def encode_prompts(
    drawer: Drawer, requests: Requests, sets: Iterable[Sequence[int]], directory: AnyPath
) -> Callable[[int], cascade.Features]:
    """Row -> its text features, for the rows that this process holds; frees the encoders.

    sets: rows to draw, of one set or of several sets with the same requests. Each distinct prompt
    is encoded once. directory: of the temporary file, which is local in any case.
    """
    if in_bucket(directory):
        directory = Path(tempfile.gettempdir())
    batch_size, mesh = drawer.config["batch_size"], drawer.stages[0].mesh
    batches = [batch for rows in sets for batch in row_batches(rows, batch_size, mesh)]
    texts = {requests.prompt(row): None for batch in batches for row in batch.held}
    per_device = feature_file.texts_per_device(batch_size, jax.device_count())
    encoded = {}
    for name in _names_read(drawer.encoders, drawer.sources):
        label = f"prompts encoded{f' by {name}' if name else ''}"
        with run_log.Progress(label, len(texts), quiet=not agreement.is_first()) as progress:
            given = texts, per_device, directory, progress.update
            encoded[name] = feature_file.encode(drawer.encoders.load(name), *given)
    drawer.encoders.release()  # its memory is needed for the stages
    files = {text_input: encoded[source] for text_input, source in drawer.sources.items()}

    def features(row: int) -> cascade.Features:
        return {text_input: file[requests.prompt(row)] for text_input, file in files.items()}

    return features


def draw_left(
    reserved: drawn_sets.Reservation,
    stages: Sequence[cascade.LoadedStage],
    text: Callable[[int], cascade.Features],
    batch_size: int,
    lowres: Sequence[UInt8[np.ndarray, "h w 3"]] | UInt8[np.ndarray, "n h w 3"] | None = None,
    label: str = "pictures",
) -> None:
    """Samples the rows of a set that are left, and writes those that this process owns.

    stages: as placed by `cascade.place`. text: of `encode_prompts`. lowres: input of the first
    stage per row. label: of the progress bar.
    """
    requests = reserved.requests
    seeds = range(requests.first_seed, requests.first_seed + len(requests))
    drawn = cascade.generate(stages, seeds, text, batch_size, lowres, reserved.left)
    started, done = time.monotonic(), 0
    with (
        contextlib.closing(reserved.pictures()) as pictures,
        run_log.Progress(label, len(reserved.left), quiet=not agreement.is_first()) as progress,
    ):
        for batch in drawn:
            pictures.add_all(batch.rows, list(zip(*batch.images)))
            done += batch.count
            progress.update(done)
    seconds = time.monotonic() - started
    log.info("%d pictures in %.0f s: %.3g pictures/s", done, seconds, done / seconds)
