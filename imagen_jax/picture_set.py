"""A set of pictures in a directory: numbered, written once, continued after an interruption.

A set is the pictures of one command. It owns a range of numbers, and its rows 0, 1 ... have the
numbers from the first of the range on. Its files, for the numbers 0 to 99:

    set_0000.json             the job: what determines the pictures; the number of pictures
    set_0000.part-P.jsonl     rows that are written, while the set is being drawn; one per process
    set_0000.jsonl            the manifest, once all rows are written: row, prompt, seed, file, and
                              the SHA-256 of the file
    0000_a_red_apple.png ...  the pictures; those of large sets in folders of FOLDER_SIZE

The same command continues a set that is not complete, with any number of processes. Several
commands may draw in one directory at the same time: each number belongs to one set.

In a bucket, a part is a log of `line_logs`, and lists its pictures up to STORE_S seconds late.
"""

import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax import line_logs, pictures, run_log, set_reservations, set_rows, stage_sizes
from imagen_jax.checksums import HASH_THREADS, sha256_file
from imagen_jax.line_logs import STORE_S, LineLog
from imagen_jax.many_files import each
from imagen_jax.object_storage import AnyPath, bucket_errors, in_bucket
from imagen_jax.set_rows import Requests, Row
from imagen_jax.stage_sizes import Size
from imagen_jax.storage import entry_names, exists, remove, write_atomically, write_json

FOLDER_SIZE = 1000  # pictures; a larger set is divided into folders
SHEET_ROWS, SHEETS = 100, 10  # pictures on one contact sheet, and contact sheets of one set
MANY = 1000  # pictures; checking more of them shows the progress
LISTINGS = 8  # folders of a bucket whose names are kept


@dataclasses.dataclass
class PictureSet:
    """The part of a set that this process writes. Close it when its rows are added.

    first: number of row 0. part: file of the rows that this process has written. earlier: sizes of
    the pictures of earlier stages, which are written beside the last stage's.
    """

    directory: AnyPath
    requests: Requests
    record: Mapping[str, Any]
    first: int
    part: AnyPath
    earlier: Sequence[Size] = ()
    _lines: LineLog | None = dataclasses.field(init=False, default=None)  # None without rows
    _stored_at: float = dataclasses.field(init=False, default_factory=time.monotonic)

    def add(self, row: int, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> None:
        """Writes the images of all stages of a row, its record, and then its line of the part."""
        self.add_all([row], [images])

    def add_all(
        self, rows: Sequence[int], images: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]]
    ) -> None:
        """`add` for several rows; in a bucket, their files are stored at the same time."""
        if self._lines is None:
            self._lines = LineLog(self.part)
        # On a local file system, the line of a row follows its files at once.
        for line in each(lambda row: self._write(*row), zip(rows, images), self.directory):
            self._lines.append(json.dumps(line, ensure_ascii=False))
        if time.monotonic() > self._stored_at + STORE_S:
            self._lines.flush()
            self._stored_at = time.monotonic()

    def _write(self, row: int, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> dict[str, Any]:
        """Writes the files of a row. Returns its line."""
        number, prompt = self.first + row, self.requests.prompt(row)
        folder = self.directory
        if len(self.requests) > FOLDER_SIZE:
            folder = folder / f"{number - number % FOLDER_SIZE:06d}"
        words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60]
        stem = f"{number:04d}_{words}"
        for image in images[:-1]:
            pictures.write_png(folder / f"{stem}_{stage_sizes.short(image.shape[:2])}.png", image)
        png, path = pictures.png_bytes(images[-1]), folder / f"{stem}.png"
        write_atomically(path, png)
        picture = {"prompt": prompt, "seed": self.requests.seed(row)}
        write_json(folder / f"{stem}.json", picture | dict(self.record))
        line = {"row": row} | picture
        line |= {"file": str(path.relative_to(self.directory))}
        return line | {"sha256": hashlib.sha256(png).hexdigest()}

    def close(self) -> None:
        """Stores the lines of the part."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def finish(self) -> AnyPath:
        """Joins the parts of all processes to the manifest and returns its path.

        Repairs a manifest with damaged or doubled lines. A whole one is not written again.

        Call it in one process, when all have written their rows. Raises ValueError, which names the
        rows, if a row is missing; the same command then draws them.
        """
        self.close()
        found = part_rows(self.directory, self.first, self.requests, self.earlier)
        rows = {row["row"]: row for row in found}
        missing = [row for row in range(len(self.requests)) if row not in rows]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.requests)} pictures of {self.directory} are missing,"
                f" row {missing[0]} first; run the same command again"
            )
        lines = [json.dumps(rows[row], ensure_ascii=False) for row in range(len(self.requests))]
        path, content = manifest(self.directory, self.first), ("\n".join(lines) + "\n").encode()
        if not exists(path) or path.read_bytes() != content:
            write_atomically(path, content)
        for part in parts(self.directory, self.first):
            line_logs.remove(part)
        return path


def part_rows(
    directory: AnyPath, first: int, requests: Requests | None = None, earlier: Sequence[Size] = ()
) -> list[dict[str, Any]]:
    """The rows of a set that are written, complete or not, and whose files are there, ascending.

    requests: of the set; rows that do not fit them are left out, and so are damaged lines. earlier:
    sizes of the pictures of earlier stages. A row that is listed twice comes once, with the
    checksum of its picture: it was drawn again.
    """
    found: dict[int, dict[str, Any]] = {}
    is_there = _presence(directory)
    for listing in [*parts(directory, first), manifest(directory, first)]:
        for row in set_rows.read(listing):
            if requests is not None and not requests.fit(row):
                continue
            path, other = directory / row["file"], found.get(row["row"], row)
            if not all(map(is_there, files_of(path, earlier))):
                continue
            if other["sha256"] == row["sha256"] or sha256_file(path) == row["sha256"]:
                found[row["row"]] = row
    return [found[number] for number in sorted(found)]


def _presence(directory: AnyPath) -> Callable[[AnyPath], bool]:
    """Whether a file below `directory` exists. A bucket is asked once for each folder."""
    if not in_bucket(directory):
        return lambda path: path.is_file()
    names = functools.lru_cache(LISTINGS)(lambda folder: frozenset(entry_names(folder)))
    return lambda path: path.name in names(path.parent)


def changed_rows(directory: AnyPath, rows: Sequence[Row]) -> list[Row]:
    """The rows whose pictures are not those that were drawn."""
    digest = lambda row: sha256_file(directory / row["file"])
    found, quiet = [], len(rows) <= MANY
    with (
        concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool,
        run_log.Progress("pictures checked", len(rows), quiet=quiet) as progress,
    ):
        for done, (row, sha256) in enumerate(zip(rows, pool.map(digest, rows)), 1):
            if sha256 != row["sha256"]:
                found.append(row)
            progress.update(done)
    return found


def files_of(picture: AnyPath, earlier: Sequence[Size]) -> list[AnyPath]:
    """The files of a row: the picture, those of earlier stages of these sizes, and the record."""
    return [picture, *_earlier(picture, earlier), picture.with_suffix(".json")]


def _earlier(picture: AnyPath, sizes: Sequence[Size]) -> list[AnyPath]:
    """The pictures of earlier stages."""
    return [picture.with_name(f"{picture.stem}_{stage_sizes.short(s)}.png") for s in sizes]


def listed_files(directory: AnyPath, first: int, earlier: Sequence[Size] = ()) -> Iterator[AnyPath]:
    """The files of the rows that the parts of a set list, whether they are visible or not."""
    for path in parts(directory, first):
        for row in set_rows.read(path):
            yield from files_of(directory / row["file"], earlier)


def count_written(
    directory: AnyPath, job: Mapping[str, Any], count: int, earlier: Sequence[Size] = ()
) -> int:
    """The number of rows of the set of a job that `reserve` would continue with all their files.

    earlier: sizes of the pictures of earlier stages.
    """
    firsts = set_reservations.sets_of(directory, job, count)[:1]
    return sum(len(part_rows(directory, first, None, earlier)) for first in firsts)


def parts(directory: AnyPath, first: int) -> list[AnyPath]:
    """The parts of a set."""
    names = fnmatch.filter(entry_names(directory), f"set_{first:04d}.part-*.jsonl")
    return [directory / name for name in names]


def part_path(directory: AnyPath, first: int, process: str) -> AnyPath:
    """The part of a process; `process` is unique among all that ever draw in the directory."""
    return directory / f"set_{first:04d}.part-{process}.jsonl"


def manifest(directory: AnyPath, first: int) -> AnyPath:
    """The manifest of a set."""
    return directory / f"set_{first:04d}.jsonl"


def chunks(path: AnyPath, size: int, count: int) -> Iterator[list[dict[str, Any]]]:
    """Up to `count` lists of up to `size` consecutive rows of a manifest.

    Raises what `set_rows.read_in_order` raises.
    """
    found = itertools.islice(set_rows.read_in_order(path), size * count)
    while rows := list(itertools.islice(found, size)):
        yield rows


class Pictures(Sequence):
    """The pictures of rows of a set, read from their files when they are used."""

    def __init__(self, directory: AnyPath, rows: Sequence[Mapping[str, Any]]):
        """directory: of the set. rows: of its manifest."""
        self._directory, self._rows = directory, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        """A picture, or a list. Raises ValueError for a file that is not the one that was drawn."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        path, row = self._directory / self._rows[index]["file"], self._rows[index]
        with bucket_errors(path):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise ValueError(f"{path} was changed since it was drawn; delete it and run it again")
        return pictures.read_png(path, content=data)


def manifest_rows(path: AnyPath) -> list[dict[str, Any]]:
    """All rows of a manifest, by row. Raises ValueError unless they are the rows 0 ... n-1."""
    return set_rows.read_sorted(path)


def write_sheets(
    manifest: AnyPath,
    sizes: Sequence[Size],
    lowres: UInt8[np.ndarray, "_ _ 3"] | None = None,
    directory: AnyPath | None = None,
) -> list[AnyPath]:
    """Writes a contact sheet for every SHEET_ROWS pictures of a set, the first SHEETS of them.

    sizes: image sizes of the stages. lowres: the input of the first stage, the same for all.
    directory: of the sheets, by default that of the manifest.

    Reads the pictures from their files; holds those of one sheet, at the sheet's size.
    """
    given = [] if lowres is None else [lowres]
    headings = [f"input {stage_sizes.short(image.shape[:2])}" for image in given]
    headings += map(stage_sizes.short, sizes)
    cell, sheets = min(256, max(64, sizes[-1][0])), []
    for rows in chunks(manifest, SHEET_ROWS, SHEETS):
        cells = []
        for row in rows:
            path = manifest.parent / row["file"]
            files = [*_earlier(path, sizes[:-1]), path]
            cells.append([*given, *(pictures.read_png(file, cell) for file in files)])
        sheet = pictures.contact_sheet([row["prompt"] for row in rows], cells, headings, cell)
        number = int(Path(rows[0]["file"]).name.partition("_")[0])
        path = (directory or manifest.parent) / f"sheet_{number:04d}.png"
        sheets.append(pictures.write_png(path, sheet))
    return sheets


def remove_all(directory: Path) -> None:
    """Deletes all sets of a local directory with their pictures, and other numbered pictures."""
    pictures.remove_numbered(directory)
    for folder in set_reservations.folders(directory):
        pictures.remove_numbered(folder)
        with contextlib.suppress(OSError):
            folder.rmdir()
    for name in entry_names(directory):
        if set_reservations.FILES.fullmatch(name):
            remove(directory / name)
