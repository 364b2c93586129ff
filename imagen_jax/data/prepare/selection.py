"""Selects the images and captions to keep, and their order, once all of them are checked.

The selection is made in a temporary SQLite database, so that memory does not grow with the number
of images. The result is a *plan* on disk, one file per shard that is to be written:

    plan/images-train-000000.json    rows of the first train shard: images and their caption ids
    plan/captions-000000.json        texts of the first caption shard
    plan/skipped.jsonl               lines of skipped.jsonl
    plan/plan.json                   counts and sizes, written last
"""

import contextlib
import itertools
import json
import sqlite3
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from imagen_jax.data.prepare.checks import Checked
from imagen_jax.data.prepare.kept import (
    SKIPPED,
    KeptImage,
    Plan,
    caption_digest,
    example,
    item_lines,
    merged_line,
    repeated_line,
    sizes,
    write_captions_of,
    write_images_of,
    write_plan,
)
from imagen_jax.data.records import SPLITS
from imagen_jax.many_files import each
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import remove, written_whole

DATABASE = "selection.sqlite"
_CACHE_KIB = 65_536  # of the database in memory
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


def select(
    checked: Iterable[Checked],
    notes: Iterable[Mapping[str, Any]],
    shard_size: int,
    directory: AnyPath,
) -> Plan:
    """Selects images and captions; the result depends on the order of the source alone.

    Unusable images are skipped. A duplicate of an earlier image is skipped too: its captions go to
    the earlier image. If the earlier image is in the other split, the duplicate's captions are
    dropped, so that training uses no held-out picture or caption pair. A caption of several images
    is stored once and noted.

    notes: further lines for skipped.jsonl. directory: of the plan; an unfinished one is removed.
    """
    remove(directory)
    with _database(directory) as database:
        with (
            written_whole(directory / SKIPPED) as file,
            open(file, "w", encoding="utf-8") as skipped,
        ):
            selector = _Selector(database, skipped)
            for index, item in enumerate(checked):
                selector.add(index, item)
            for note in notes:
                selector.skip(dict(note))
        return selector.write(directory, shard_size)


@contextlib.contextmanager
def _database(directory: AnyPath) -> Iterator[sqlite3.Connection]:
    """An empty database in a local directory, or on a local disk for one in a bucket."""
    with contextlib.ExitStack() as stack:
        if in_bucket(directory):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(directory / DATABASE, isolation_level=None)
        with contextlib.closing(connection) as database:
            for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KIB}"):
                database.execute(f"PRAGMA {setting}")
            database.executescript(_TABLES)
            database.execute("BEGIN")
            yield database
        (directory / DATABASE).unlink()


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
        self._examples.setdefault(reason, example(line))
        self._skipped.write(json.dumps(line) + "\n")

    def add(self, index: int, item: Checked) -> None:
        """The next item of the source."""
        for line in item_lines(item):
            self.skip(line)
        if item.reason:
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
        self.skip(merged_line(item, split, first))
        return split == item.split

    def _add_captions(self, image: int, item: Checked) -> None:
        for caption in item.captions:
            digest = caption_digest(caption)
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
                self.skip(repeated_line(item.id, first, caption))
            self._database.execute("INSERT OR IGNORE INTO pairs VALUES (?, ?)", (image, number))

    def write(self, directory: AnyPath, shard_size: int) -> Plan:
        """Writes the files of the plan."""
        images = {split: self._write_images(directory, split, shard_size) for split in SPLITS}
        texts = (text for (text,) in self._all("SELECT text FROM captions ORDER BY number"))
        captions = enumerate(_chunks(texts, shard_size))
        write = lambda numbered: write_captions_of(directory, *numbered)
        deque(each(write, captions, directory), maxlen=0)
        return write_plan(
            directory,
            shard_size,
            images,
            self._captions,
            self._reasons,
            self._examples,
            self._sizes(),
        )

    def _write_images(self, directory: AnyPath, split: str, shard_size: int) -> int:
        """Writes the images of a split in the source's order. Returns their number."""
        rows = self._all(
            "SELECT number, source, id, height, width, content FROM images WHERE split = ?"
            " ORDER BY number",
            (split,),
        )
        images = (KeptImage(*row, self._caption_ids(number)) for number, *row in rows)

        def write(numbered: tuple[int, list[KeptImage]]) -> int:
            write_images_of(directory, split, *numbered)
            return len(numbered[1])

        return sum(each(write, enumerate(_chunks(images, shard_size)), directory))

    def _caption_ids(self, image: int) -> list[int]:
        """In the order in which the captions were added."""
        query = "SELECT caption FROM pairs WHERE image = ? ORDER BY rowid"
        return [number for (number,) in self._all(query, (image,))]

    def _sizes(self) -> dict[str, float]:
        if not self._images:
            return {}
        query = (
            "SELECT min(min(height, width)), max(max(height, width)), sum(height), sum(width)"
            " FROM images"
        )
        return sizes(self._images, *self._database.execute(query).fetchone())

    def _all(self, query: str, values: tuple = ()) -> Iterator[tuple]:
        return iter(self._database.cursor().execute(query, values))


def _chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The rows in lists of `size`."""
    rows = iter(rows)
    while part := list(itertools.islice(rows, size)):
        yield part
