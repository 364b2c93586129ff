"""From prompts to a set of pictures: encodes the prompts, samples the cascade, writes the files.

All processes of a run call it together. The text encoder is freed before the stages are placed on
the devices, and nothing is kept in memory per picture.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from imagen_jax import cascade, cli, picture_set, run_log
from imagen_jax.distributed import agreement
from imagen_jax.picture_set import PictureSet, Requests
from imagen_jax.text import feature_file
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.weights.text_encoders import load_text_encoder, local_mesh

# Fields of a cascade config that change no picture.
FREE_FIELDS = ("mesh", "batch_size")
NO_IMAGE = {"image": "", "image_sha256": ""}  # the record's fields without --image
log = logging.getLogger("imagen_jax.sample")


class Drawer:
    """A cascade with its text encoder, checked and ready to draw one set.

    config: a complete cascade config. stages: loaded, on the host. encoder: None once the prompts
    are encoded. record: the fields of a picture's record that all pictures share.
    """

    def __init__(self, config: Mapping[str, Any], names: Sequence[str]):
        """names: the stages, in order. Raises ValueError if stages and encoder do not fit."""
        self.config = config
        self.stages = cascade.load_cascade(config, names)
        self.encoder: TextEncoder | None = load_encoder(config, self.stages)
        self.record = {
            "stages": list(names),
            "config": dict(config),
            "checkpoints": [dict(loaded.identity) for loaded in self.stages],
            "encoder": self.encoder.identity,
        }


def load_encoder(config: Mapping[str, Any], stages: Sequence[cascade.LoadedStage]) -> TextEncoder:
    """The text encoder of a cascade config, if it is the one its stages were trained with."""
    length = max(loaded.stage.text_length for loaded in stages)
    encoder = load_text_encoder(config["encoder"], length, config["encoder_dtype"], local_mesh)
    for loaded in stages:
        if loaded.stage.text_dim:
            who = f"{loaded.stage.name} and {config['encoder']}"
            cascade.check_encoder(loaded.encoder, encoder.identity, who)
    return encoder


def warn_of_prompts(encoder: TextEncoder, prompts: Sequence[str]) -> None:
    """Prints a warning for each prompt that the encoder cuts or cannot read completely."""
    distinct = list(dict.fromkeys(prompts))
    for start in range(0, len(distinct), feature_file.CHUNK):
        chunk = distinct[start : start + feature_file.CHUNK]
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


def draw(
    drawer: Drawer,
    requests: Requests,
    output: Path,
    image: Mapping[str, Any],
    lowres: UInt8[np.ndarray, "r r 3"] | None = None,
) -> Path:
    """Draws all rows of a set that are not drawn yet. Returns the path of its manifest.

    image: the fields `image` and `image_sha256` of the record. lowres: the --image itself, the
    input of the first stage.

    Raises ValueError if the processes do not agree, FloatingPointError, see `cascade.generate`.
    """
    record = drawer.record | image
    job = requests.job | {
        name: value for name, value in record.items() if name not in ("config", "image")
    }
    job["config"] = {k: v for k, v in drawer.config.items() if k not in FREE_FIELDS}
    agreement.check({"pictures": json.dumps(job), "--output": str(output.absolute())})
    agreement.check_shared(output)
    with Reservation(output, job, len(requests)) as reserved:
        if reserved.left:
            part = picture_set.part_path(output, reserved.first, reserved.process)
            pictures = PictureSet(output, requests, record, reserved.first, part)
            _draw_rows(drawer, pictures, reserved.left, lowres)
        agreement.gather()  # all pictures are written
        if jax.process_index() == 0 and reserved.left:
            PictureSet(output, requests, record, reserved.first, Path()).finish()
        agreement.gather()  # the manifest is written
    return picture_set.manifest(output, reserved.first)


class Reservation:
    """The set of a job, reserved by process 0 for all processes while the context lasts.

    first: the number of row 0. left: the rows to draw, ascending. process: a unique name of this
    process, for its files.
    """

    first: int
    left: list[int]

    def __init__(self, output: Path, job: Mapping[str, Any], count: int):
        self._output, self._count = output, count
        self._context = picture_set.reserve(output, job, count) if _is_first() else None
        self.process = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"

    def __enter__(self) -> "Reservation":
        text = ""
        if self._context:
            first = self._context.__enter__()
            done = {row["row"] for row in picture_set.part_rows(self._output, first)}
            left = [row for row in range(self._count) if row not in done]
            text = json.dumps({"first": first, "left": to_ranges(left)})
            if done:
                log.info("%d of %d pictures are there already", len(done), self._count)
        agreed = json.loads(agreement.gather(text)[0])
        self.first, self.left = agreed["first"], from_ranges(agreed["left"])
        return self

    def __exit__(self, *error: Any) -> None:
        if self._context:
            self._context.__exit__(*error)


def _is_first() -> bool:
    return jax.process_index() == 0


def to_ranges(rows: Sequence[int]) -> list[list[int]]:
    """Ascending rows as [first, last + 1] of each run without a gap."""
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and ranges[-1][1] == row:
            ranges[-1][1] = row + 1
        else:
            ranges.append([row, row + 1])
    return ranges


def from_ranges(ranges: Sequence[Sequence[int]]) -> list[int]:
    """The rows of `to_ranges`."""
    return [row for first, end in ranges for row in range(first, end)]


def _draw_rows(
    drawer: Drawer,
    pictures: PictureSet,
    rows: Sequence[int],
    lowres: UInt8[np.ndarray, "r r 3"] | None,
) -> None:
    """Encodes and samples these rows, and writes those that this process owns."""
    requests, batch_size = pictures.requests, drawer.config["batch_size"]
    quiet = not _is_first()
    batches = cascade.row_batches(rows, batch_size, drawer.stages[0].mesh)
    texts = [requests.prompt(row) for batch in batches for row in batch.held]
    with run_log.Progress("prompts encoded", len(set(texts)), quiet=quiet) as progress:
        features = feature_file.encode(
            drawer.encoder, texts, batch_size, pictures.directory, progress.update
        )
    drawer.encoder = None  # its memory is needed for the stages
    stages = cascade.place(drawer.stages)
    seeds = range(requests.first_seed, requests.first_seed + len(requests))
    text = lambda row: features[requests.prompt(row)]
    if lowres is not None:
        lowres = np.broadcast_to(lowres, (len(requests), *lowres.shape))
    drawn = cascade.generate(stages, seeds, text, batch_size, lowres, rows)
    started, done = time.monotonic(), 0
    with run_log.Progress("pictures", len(rows), quiet=quiet) as progress:
        for batch in drawn:
            for i, row in enumerate(batch.rows):
                pictures.add(row, [images[i] for images in batch.images])
            done += batch.count
            progress.update(done)
    seconds = time.monotonic() - started
    log.info("%d pictures in %.0f s: %.3g pictures/s", done, seconds, done / seconds)
