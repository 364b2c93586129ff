"""What is kept of a source: the files of the plan, and the lines of skipped.jsonl.

`selection` and `beam_ingest` write the plan; the passes that store images and encode captions read
it, one shard at a time.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from imagen_jax.data.prepare.checks import Checked
from imagen_jax.many_files import each
from imagen_jax.object_storage import AnyPath, bucket_errors
from imagen_jax.storage import read_json, read_object, write_atomically

PLAN, SKIPPED = "plan.json", "skipped.jsonl"
_FIELDS = {"shard_size": int, "images": dict, "captions": int} | dict.fromkeys(
    ("images.train", "images.heldout"), int
)
_FIELDS |= dict.fromkeys(("reasons", "sizes", "examples"), dict)


@dataclasses.dataclass(slots=True)
class KeptImage:
    """An image to be stored.

    index: in the source. id: of the image. height, width: as stored. content: hash of its file,
    see `Checked`.
    """

    index: int
    id: str
    height: int
    width: int
    content: str
    caption_ids: list[int]


class Plan:
    """The result of `select`, read from its files.

    images: the number of kept images by split. captions: the number of distinct captions.
    reasons: the number of files, items or captions of each reason. sizes: of the images.
    """

    def __init__(self, directory: AnyPath):
        """Raises ValueError if the plan is damaged."""
        content = read_object(directory / PLAN, _FIELDS, _remedy(directory))
        self.directory = directory
        self.shard_size: int = content["shard_size"]
        self.images: dict[str, int] = content["images"]
        self.captions: int = content["captions"]
        self.reasons: dict[str, int] = content["reasons"]
        self.sizes: dict[str, float] = content["sizes"]
        self._examples: dict[str, str] = content["examples"]

    def examples(self) -> str:
        """One item of each reason, for a message: "such as missing_image: a.png"."""
        told = [f"{reason}: {self._examples[reason]}" for reason in sorted(self._examples)[:5]]
        return f"such as {', '.join(told)}"

    def captions_of(self, shard: int) -> list[str]:
        """The captions of a shard; their ids begin with shard * shard_size."""
        rows = min(self.shard_size, self.captions - shard * self.shard_size)
        return _rows_of(self.directory / _caption_file(shard), rows)

    def image_sizes(self, split: str) -> Iterator[list[tuple[int, int]]]:
        """(height, width) of each image of a split as stored, shard by shard."""

        def sizes_of(shard: int) -> list[tuple[int, int]]:
            rows = min(self.shard_size, self.images[split] - shard * self.shard_size)
            images = images_of(self.directory, split, shard, rows)
            return [(image.height, image.width) for image in images]

        shards = range(math.ceil(self.images[split] / self.shard_size))
        return each(sizes_of, shards, self.directory)

    def skipped(self) -> Iterator[bytes]:
        """The lines of skipped.jsonl."""
        file = self.directory / SKIPPED
        try:
            with bucket_errors(file), file.open("rb") as lines:
                yield from lines
        except FileNotFoundError:
            raise ValueError(f"{file} is missing; {_remedy(self.directory)}") from None


def sizes(count: int, low: int, high: int, height: int, width: int) -> dict[str, float]:
    """The sizes of a plan, from smallest and largest side and the sums of heights and widths."""
    means = {"mean_height": height / count, "mean_width": width / count}
    return {"min_side": low, "max_side": high} | means


def images_of(directory: AnyPath, split: str, shard: int, rows: int) -> list[KeptImage]:
    """The `rows` images of a shard of the plan in `directory`, which may be unfinished.

    Raises ValueError if the file is damaged.
    """
    file = directory / _image_file(split, shard)
    try:
        return [KeptImage(*row) for row in _rows_of(file, rows)]
    except TypeError as error:
        raise ValueError(f"{file} is damaged ({error}); {_remedy(directory)}") from error


def _rows_of(file: AnyPath, rows: int) -> list[Any]:
    """The rows in a file of the plan. Raises ValueError unless there are `rows` of them."""
    remedy = _remedy(file.parent)
    try:
        found = read_json(file, remedy)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; {remedy}") from None
    if not isinstance(found, list) or len(found) != rows:
        raise ValueError(f"{file} is damaged (it has not {rows} rows); {remedy}")
    return found


def _remedy(directory: AnyPath) -> str:
    """What to do with a damaged plan; shards that were written from it are made again."""
    work = directory.parent
    return f"remove {directory} and {work / 'journal'}, then run the same command again"


def write_images_of(
    directory: AnyPath, split: str, shard: int, images: Sequence[KeptImage]
) -> None:
    """Writes the images of a shard to the plan."""
    rows = [dataclasses.astuple(image) for image in images]
    write_atomically(directory / _image_file(split, shard), json.dumps(rows).encode())


def write_captions_of(directory: AnyPath, shard: int, captions: Sequence[str]) -> None:
    """Writes the captions of a shard to the plan."""
    write_atomically(directory / _caption_file(shard), json.dumps(captions).encode())


def write_plan(
    directory: AnyPath,
    shard_size: int,
    images: Mapping[str, int],
    captions: int,
    reasons: Mapping[str, int],
    examples: Mapping[str, str],
    sizes: Mapping[str, float],
) -> Plan:
    """Completes the plan once all of its other files are there; see `Plan` for the arguments."""
    content = {
        "shard_size": shard_size,
        "images": images,
        "captions": captions,
        "reasons": dict(sorted(reasons.items())),
        "sizes": sizes,
        "examples": examples,
    }
    write_atomically(directory / PLAN, json.dumps(content).encode())
    return Plan(directory)


def _image_file(split: str, shard: int) -> str:
    return f"images-{split}-{shard:06d}.json"


def _caption_file(shard: int) -> str:
    return f"captions-{shard:06d}.json"


def item_lines(item: Checked) -> list[dict]:
    """The lines of skipped.jsonl for an item by itself."""
    bad = [{"id": item.id, "reason": reason} for reason in item.bad_captions]
    removed = [
        {"id": item.id, "reason": "removed_characters", "detail": note, "caption": caption}
        for caption, note in zip(item.captions, item.removed)
        if note
    ]
    refused = {"id": item.id, "reason": item.reason, "detail": item.detail}
    return bad + removed + ([refused] if item.reason else [])


def merged_line(item: Checked, split: str, first: str) -> dict:
    """The line for an item with the pixels of the image `first` of `split`."""
    reason = "duplicate_image" if split == item.split else "duplicate_image_in_other_split"
    return {"id": item.id, "reason": reason, "of": first, "captions": item.captions}


def repeated_line(item_id: str, first: str, caption: str) -> dict:
    """The line for a caption of an item that the item `first` has as well."""
    return {"id": item_id, "reason": "duplicate_caption", "of": first, "caption": caption}


def example(line: Mapping[str, Any]) -> str:
    """The item that a line names, for a message."""
    return line.get("files", [line["id"]])[0]


def caption_digest(caption: str) -> bytes:
    """Identity of a caption: 128 bits."""
    return hashlib.sha256(caption.encode()).digest()[:16]
