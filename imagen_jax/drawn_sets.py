"""The set of pictures that a command draws: what identifies it, and its reservation.

All processes of a run make the same calls; process 0 reserves the set for all of them.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax import cascade, field, picture_set, set_reservations
from imagen_jax.distributed import agreement, shared_files
from imagen_jax.object_storage import AnyPath
from imagen_jax.picture_set import PictureSet, Requests
from imagen_jax.stage_sizes import Size
from imagen_jax.storage import exists

# Fields of a cascade config that change no picture.
FREE_FIELDS = ("mesh", "batch_size")
NO_IMAGE = {"image": "", "image_sha256": ""}  # the record's fields without --image
SHOWN = 5  # changed pictures that are named
log = logging.getLogger("imagen_jax.sample")


def job_of(
    requests: Requests, record: Mapping[str, Any], free: Sequence[str] = FREE_FIELDS
) -> dict[str, Any]:
    """The inputs that determine the pictures of a set.

    free: fields of the config that change no picture.
    """
    job = requests.job | {
        name: value for name, value in record.items() if name not in ("config", "image")
    }
    config = {name: value for name, value in record["config"].items() if name not in free}
    # The field `config` of a stage is for `plan`; it changes no picture either.
    stages = {name: config[name] for name in cascade.STAGES if name in config}
    without = lambda stage: {name: value for name, value in stage.items() if name != "config"}
    return job | {"config": config | {name: without(stage) for name, stage in stages.items()}}


def facts_of(job: Mapping[str, Any]) -> dict[str, str]:
    """{dotted path of a field: its value as JSON} of a job, for `agreement.check`."""
    return {name: json.dumps(value) for name, value in field.flat(job).items()}


def missing(
    requests: Requests, record: Mapping[str, Any], directory: AnyPath, sizes: Sequence[Size]
) -> list[tuple[int, Size]]:
    """(pictures to draw, their size) of each stage of a set; other sets do not count.

    record: the fields that all pictures share, with those of the image. sizes: of the stages.
    """
    job, earlier = job_of(requests, record), sizes[:-1]
    left = len(requests) - picture_set.count_written(directory, job, len(requests), earlier)
    return [(left, size) for size in sizes]


class Reservation:
    """The set of a job, reserved by process 0 for all processes while the context lasts.

    first: the number of row 0. left: the rows to draw, ascending.
    """

    first: int
    left: list[int]

    def __init__(
        self,
        output: AnyPath,
        requests: Requests,
        record: Mapping[str, Any],
        free: Sequence[str] = FREE_FIELDS,
        earlier: Sequence[Size] = (),
    ):
        """record: the fields that all pictures share. free: see `job_of`.

        earlier: image sizes of the stages before the last one, if the set has their pictures.
        """
        self._output, self.requests, self._record = output, requests, record
        self._earlier = earlier
        job = job_of(requests, record, free)
        self._context = (
            set_reservations.reserve(output, job, len(requests)) if agreement.is_first() else None
        )
        self._parts: list[AnyPath] = []  # of this process

    def __enter__(self) -> "Reservation":
        text = ""
        if self._context:
            first = self._context.__enter__()
            done = self._done(first)
            left = [row for row in range(len(self.requests)) if row not in done]
            text = json.dumps({"first": first, "left": to_ranges(left)})
            if done:
                log.info("%d of %d pictures are there already", len(done), len(self.requests))
        agreed = json.loads(agreement.gather(text)[0])
        self.first, self.left = agreed["first"], from_ranges(agreed["left"])
        return self

    def _done(self, first: int) -> set[int]:
        """The rows that are there as they were drawn. Warns of pictures that were changed."""
        rows = picture_set.part_rows(self._output, first, self.requests, self._earlier)
        changed = picture_set.changed_rows(self._output, rows)
        for row in changed[:SHOWN]:
            path = self._output / row["file"]
            log.warning("%s was changed since it was drawn; it is drawn again", path)
        if len(changed) > SHOWN:
            log.warning("... and %d more pictures", len(changed) - SHOWN)
        return {row["row"] for row in rows} - {row["row"] for row in changed}

    def __exit__(self, *error: Any) -> None:
        if self._context:
            self._context.__exit__(*error)

    def pictures(self) -> PictureSet:
        """The part of the set that this process writes."""
        process = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"  # never used before
        part = picture_set.part_path(self._output, self.first, process)
        self._parts.append(part)
        owned = self._output, self.requests, self._record, self.first, part, self._earlier
        return PictureSet(*owned)

    def finish(self) -> AnyPath:
        """Waits for all processes; process 0 writes or repairs the manifest. Returns its path."""
        path = picture_set.manifest(self._output, self.first)
        shared_files.share_files(part for part in self._parts if exists(part))
        listed = picture_set.listed_files(self._output, self.first, self._earlier)
        shared_files.wait_for_files(listed)
        if self._context:
            self.pictures().finish()
        shared_files.share_files([path] if self._context else [])
        return path


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
