"""Selects the images and captions to keep, and their order, once all of them are checked.

The selection is made in a temporary SQLite database, so that memory does not grow with the number
of images. The result is a *plan* on disk, one file per shard that is to be written:

    plan/images-train-000000.json    rows of the first train shard: images and their caption ids
    plan/captions-000000.json        texts of the first caption shard
    plan/skipped.jsonl               lines of skipped.jsonl
    plan/plan.json                   counts and sizes, written last
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from imagen_jax.data.prepare.checks import Checked
from imagen_jax.data.records import SPLITS
from imagen_jax.storage import read_json, read_object, write_atomically

PLAN, SKIPPED = "plan.json", "skipped.jsonl"
DATABASE = "selection.sqlite"
_CACHE_KIB = 65_536  # of the database in memory
_FIELDS = {"shard_size": int, "images": dict, "captions": int, "reasons": dict, "sizes": dict}
_TABLES = """
CREATE TABLE images (
    number INTEGER PRIMARY KEY, split TEXT, source INTEGER, id TEXT, height INTEGER,
    width INTEGER, content TEXT, pixels TEXT UNIQUE
);
CREATE TABLE captions (
    number INTEGER PRIMARY KEY, digest BLOB UNIQUE, text TEXT, first_id TEXT
);
CREATE TABLE pairs (image INTEGER, caption INTEGER, UNIQUE (image, caption));
"""


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

    def __init__(self, directory: Path):
        """Raises ValueError if the plan is damaged."""
        content = read_object(directory / PLAN, _FIELDS, f"remove {directory}")
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

    def shard_rows(self, count: int) -> list[int]:
        """The number of rows of each shard of `count` rows."""
        size = self.shard_size
        return [min(size, count - start) for start in range(0, count, size)]

    def images_of(self, split: str, shard: int) -> list[KeptImage]:
        """The images of a shard."""
        return images_of(self.directory, split, shard)

    def captions_of(self, shard: int) -> list[str]:
        """The captions of a shard; their ids begin with shard * shard_size."""
        return read_json(self.directory / caption_file(shard), f"remove {self.directory}")

    def skipped(self) -> Iterator[str]:
        """The lines of skipped.jsonl."""
        with open(self.directory / SKIPPED, encoding="utf-8") as file:
            yield from file


def images_of(directory: Path, split: str, shard: int) -> list[KeptImage]:
    """The images of a shard of the plan in `directory`, which may be unfinished."""
    rows = read_json(directory / image_file(split, shard), f"remove {directory}")
    return [KeptImage(*row) for row in rows]


def image_file(split: str, shard: int) -> str:
    return f"images-{split}-{shard:06d}.json"


def caption_file(shard: int) -> str:
    return f"captions-{shard:06d}.json"


def select(
    checked: Iterable[Checked],
    notes: Iterable[Mapping[str, Any]],
    shard_size: int,
    directory: Path,
) -> Plan:
    """Selects images and captions; the result depends on the order of the source alone.

    Unusable images are skipped. A duplicate of an earlier image is skipped too: its captions go to
    the earlier image. If the earlier image is in the other split, the duplicate's captions are
    dropped, so that training uses no held-out picture or caption pair. A caption of several images
    is stored once and noted.

    notes: further lines for skipped.jsonl. directory: of the plan; an unfinished one is removed.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with contextlib.closing(
        sqlite3.connect(directory / DATABASE, isolation_level=None)
    ) as database:
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KIB}"):
            database.execute(f"PRAGMA {setting}")
        database.executescript(_TABLES)
        database.execute("BEGIN")
        with open(directory / SKIPPED, "w", encoding="utf-8") as skipped:
            selector = _Selector(database, skipped)
            for index, item in enumerate(checked):
                selector.add(index, item)
            for note in notes:
                selector.skip(dict(note))
        selector.write(directory, shard_size)
    (directory / DATABASE).unlink()
    return Plan(directory)


class _Selector:
    """Selects item by item."""

    def __init__(self, database: sqlite3.Connection, skipped: TextIO):
        self._database, self._skipped = database, skipped
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._images, self._captions = 0, 0

    def skip(self, line: dict[str, Any]) -> None:
        """Adds a line to skipped.jsonl; a "count" in it says how many files it stands for."""
        reason = line["reason"]
        self._reasons[reason] += line.get("count", 1)
        self._examples.setdefault(reason, line.get("files", [line["id"]])[0])
        self._skipped.write(json.dumps(line) + "\n")

    def add(self, index: int, item: Checked) -> None:
        """The next item of the source."""
        for line in _caption_notes(item):
            self.skip(line)
        if item.reason:
            self.skip({"id": item.id, "reason": item.reason, "detail": item.detail})
            return
        found = self._database.execute(
            "SELECT number, split, id FROM images WHERE pixels = ?", (item.pixels,)
        ).fetchone()
        if found is None:
            number = self._images
            row = (number, item.split, index, item.id, item.height, item.width, item.content)
            self._database.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, item.pixels)
            )
            self._images += 1
        else:
            number, split, first = found
            if not self._merge(split, first, item):
                return
        self._add_captions(number, item)

    def _merge(self, split: str, first: str, item: Checked) -> bool:
        """Notes a duplicate of the image `first`; returns whether its captions are used."""
        same_split = split == item.split
        reason = "duplicate_image" if same_split else "duplicate_image_in_other_split"
        self.skip({"id": item.id, "reason": reason, "of": first, "captions": item.captions})
        return same_split

    def _add_captions(self, image: int, item: Checked) -> None:
        for caption in item.captions:
            digest = hashlib.sha256(caption.encode()).digest()[:16]
            found = self._database.execute(
                "SELECT number, first_id FROM captions WHERE digest = ?", (digest,)
            ).fetchone()
            if found is None:
                number = self._captions
                self._database.execute(
                    "INSERT INTO captions VALUES (?, ?, ?, ?)", (number, digest, caption, item.id)
                )
                self._captions += 1
            else:
                number, first = found
                line = {"id": item.id, "reason": "duplicate_caption"}
                self.skip(line | {"of": first, "caption": caption})
            self._database.execute("INSERT OR IGNORE INTO pairs VALUES (?, ?)", (image, number))

    def write(self, directory: Path, shard_size: int) -> None:
        """Writes the files of the plan, plan.json last."""
        images = {split: self._write_images(directory, split, shard_size) for split in SPLITS}
        texts = (text for (text,) in self._all("SELECT text FROM captions ORDER BY number"))
        for shard, rows in enumerate(_chunks(texts, shard_size)):
            write_atomically(directory / caption_file(shard), json.dumps(rows).encode())
        content = {
            "shard_size": shard_size,
            "images": images,
            "captions": self._captions,
            "reasons": dict(sorted(self._reasons.items())),
            "sizes": self._sizes(),
            "examples": self._examples,
        }
        write_atomically(directory / PLAN, json.dumps(content).encode())

    def _write_images(self, directory: Path, split: str, shard_size: int) -> int:
        """Writes the images of a split in the source's order. Returns their number."""
        count = 0
        rows = self._all(
            "SELECT number, source, id, height, width, content FROM images WHERE split = ?"
            " ORDER BY number",
            (split,),
        )
        for shard, part in enumerate(_chunks(rows, shard_size)):
            kept = [[*row, self._caption_ids(number)] for number, *row in part]
            write_atomically(directory / image_file(split, shard), json.dumps(kept).encode())
            count += len(kept)
        return count

    def _caption_ids(self, image: int) -> list[int]:
        """In the order in which the captions were added."""
        query = "SELECT caption FROM pairs WHERE image = ? ORDER BY rowid"
        return [number for (number,) in self._all(query, (image,))]

    def _sizes(self) -> dict[str, float]:
        """Smallest and largest side, and mean height and width, of all kept images."""
        if not self._images:
            return {}
        names = ("min_side", "max_side", "mean_height", "mean_width")
        query = (
            "SELECT min(min(height, width)), max(max(height, width)), sum(height), sum(width)"
            " FROM images"
        )
        low, high, height, width = self._database.execute(query).fetchone()
        return dict(zip(names, (low, high, height / self._images, width / self._images)))

    def _all(self, query: str, values: tuple = ()) -> Iterator[tuple]:
        return iter(self._database.cursor().execute(query, values))


def _caption_notes(item: Checked) -> list[dict]:
    bad = [{"id": item.id, "reason": reason} for reason in item.bad_captions]
    removed = [
        {"id": item.id, "reason": "removed_characters", "detail": note, "caption": caption}
        for caption, note in zip(item.captions, item.removed)
        if note
    ]
    return bad + removed


def _chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The rows in lists of `size`."""
    rows = iter(rows)
    while part := list(itertools.islice(rows, size)):
        yield part
