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
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8

from imagen_jax import pictures, run_log, set_rows, stage_sizes
from imagen_jax.checksums import HASH_THREADS, sha256_file
from imagen_jax.locks import try_lock
from imagen_jax.set_rows import Requests, Row
from imagen_jax.stage_sizes import Size
from imagen_jax.storage import read_object, write_atomically, write_json

FOLDER_SIZE = 1000  # pictures; a larger set is divided into folders
SET = re.compile(r"set_(\d+)\.json")
FILES = re.compile(r"set_(\d+)\.(?:json|jsonl|part-.*\.jsonl)")
FOLDER = re.compile(r"\d{6,}")
SET_FIELDS = {"count": int, "sha256": str, "job": dict}
SHEET_ROWS, SHEETS = 100, 10  # pictures on one contact sheet, and contact sheets of one set
MANY = 1000  # pictures; checking more of them shows the progress
PATIENCE_S = 10.0  # for a set file that another process is writing
_damaged: set[tuple[Path, int]] = set()  # (file of a set, time of its change) that was warned of
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """The part of a set that this process writes.

    first: number of row 0. part: file of the rows that this process has written. earlier: sizes of
    the pictures of earlier stages, which are written beside the last stage's.
    """

    directory: Path
    requests: Requests
    record: Mapping[str, Any]
    first: int
    part: Path
    earlier: Sequence[Size] = ()

    def add(self, row: int, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> None:
        """Writes the images of all stages of a row, its record, and then its line of the part."""
        number, prompt = self.first + row, self.requests.prompt(row)
        folder = self.directory
        if len(self.requests) > FOLDER_SIZE:
            folder = folder / f"{number - number % FOLDER_SIZE:06d}"
            folder.mkdir(exist_ok=True)
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
        line |= {"sha256": hashlib.sha256(png).hexdigest()}
        with open(self.part, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def finish(self) -> Path:
        """Joins the parts of all processes to the manifest and returns its path.

        Repairs a manifest with damaged or doubled lines. A whole one is not written again.

        Call it in one process, when all have written their rows. Raises ValueError, which names the
        rows, if a row is missing; the same command then draws them.
        """
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
        if not path.exists() or path.read_bytes() != content:
            write_atomically(path, content)
        for part in parts(self.directory, self.first):
            part.unlink()
        return path


@contextlib.contextmanager
def reserve(directory: Path, job: Mapping[str, Any], count: int) -> Iterator[int]:
    """The number of row 0 of the set of this job: an incomplete one, or a new one.

    Another process cannot reserve the set inside the context. A complete set is not continued but
    returned as well, so that its rows count as done.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for first in _sets_of(directory, job, count):
        with open(_file(directory, first)) as file:
            if try_lock(file, fcntl.LOCK_EX):
                yield first
                return
    content = {"count": count, "sha256": _digest(job), "job": dict(job)}
    first, file = _new_file(directory, json.dumps(content, indent=1).encode())
    with file:
        yield first


def _new_file(directory: Path, content: bytes) -> tuple[int, BinaryIO]:
    """The number of row 0 of a new set, and the set's file, open and locked."""
    while True:
        first = free_number(directory)
        with contextlib.suppress(FileExistsError):  # another process was faster
            return first, _create(_file(directory, first), content)


def _create(path: Path, content: bytes) -> BinaryIO:
    """A new file, open and locked. Its name appears with all of its content.

    Raises FileExistsError if the file exists. On a file system without hard links, the name appears
    first.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    file = _create_in_place(temporary, content)
    try:
        os.link(temporary, path)  # unlike a rename, it never replaces a file
    except OSError as error:
        file.close()
        if isinstance(error, FileExistsError):
            raise
        return _create_in_place(path, content)
    finally:
        temporary.unlink()
    return file


def _create_in_place(path: Path, content: bytes) -> BinaryIO:
    """`_create` under the final name. Nothing is left of a file that cannot be written."""
    file = open(path, "xb")
    try:
        try_lock(file, fcntl.LOCK_EX)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        path.unlink()
        with contextlib.suppress(OSError):
            file.close()
        error.filename = error.filename or os.fspath(path)  # a failed write does not name its file
        raise
    return file


def _digest(job: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def _sets_of(directory: Path, job: Mapping[str, Any], count: int) -> list[int]:
    """The numbers of row 0 of the sets of a job, ascending."""
    wanted = _digest(job), count
    found = sorted(sets(directory).items())
    return [first for first, content in found if (content["sha256"], content["count"]) == wanted]


def free_number(directory: Path) -> int:
    """The number after all pictures and sets of a directory.

    A set whose file is damaged or gone ends after the last row that its other files list.
    """
    ends = [0]
    for path in [directory, *_folders(directory)]:
        ends += [number + 1 for number in pictures.numbers(path)]
    files = list(directory.iterdir()) if directory.is_dir() else []
    # Read last: a set may begin meanwhile, and some of its files are not all of it.
    known = sets(directory)
    ends += [first + content["count"] for first, content in known.items()]
    for path in files:
        match = FILES.fullmatch(path.name)
        if match and int(match[1]) not in known:
            rows = (row["row"] for row in set_rows.read(path))
            ends.append(int(match[1]) + max(rows, default=0) + 1)
    return max(ends)


def _folders(directory: Path) -> list[Path]:
    """The folders of large sets."""
    entries = directory.iterdir() if directory.is_dir() else ()
    return [path for path in entries if FOLDER.fullmatch(path.name) and path.is_dir()]


def sets(directory: Path) -> dict[int, dict[str, Any]]:
    """{number of row 0: content of its file} of the sets of a directory, without damaged files."""
    found = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        match = SET.fullmatch(path.name)
        if match and (content := _read_set(path)):
            found[int(match[1])] = content
    return found


def _read_set(path: Path) -> dict[str, Any] | None:
    """The content of a set's file; None, with a warning, if it is damaged.

    Waits while another process writes it.
    """
    version = path, path.stat().st_mtime_ns
    end, unlocked = time.monotonic() + PATIENCE_S, 0
    while True:
        with contextlib.suppress(ValueError):
            return read_object(path, SET_FIELDS)
        if version in _damaged:
            return None
        # Its writer may lock a new file between two readings.
        unlocked += not _is_locked(path)
        if unlocked > 1 or time.monotonic() > end:
            break
        time.sleep(0.05)
    _damaged.add(version)
    log.warning("%s is damaged; its pictures are kept but not continued", path)
    return None


def _is_locked(path: Path) -> bool:
    with open(path) as file:
        return not try_lock(file, fcntl.LOCK_SH)


def part_rows(
    directory: Path, first: int, requests: Requests | None = None, earlier: Sequence[Size] = ()
) -> list[dict[str, Any]]:
    """The rows of a set that are written, complete or not, and whose files are there, ascending.

    requests: of the set; rows that do not fit them are left out, and so are damaged lines. earlier:
    sizes of the pictures of earlier stages. A row that is listed twice comes once, with the
    checksum of its picture: it was drawn again.
    """
    found: dict[int, dict[str, Any]] = {}
    for listing in [*parts(directory, first), manifest(directory, first)]:
        for row in set_rows.read(listing):
            if requests is not None and not requests.fit(row):
                continue
            path, other = directory / row["file"], found.get(row["row"], row)
            if not all(file.is_file() for file in files_of(path, earlier)):
                continue
            if other["sha256"] == row["sha256"] or sha256_file(path) == row["sha256"]:
                found[row["row"]] = row
    return [found[number] for number in sorted(found)]


def changed_rows(directory: Path, rows: Sequence[Row]) -> list[Row]:
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


def files_of(picture: Path, earlier: Sequence[Size]) -> list[Path]:
    """The files of a row: the picture, those of earlier stages of these sizes, and the record."""
    return [picture, *_earlier(picture, earlier), picture.with_suffix(".json")]


def _earlier(picture: Path, sizes: Sequence[Size]) -> list[Path]:
    """The pictures of earlier stages."""
    return [picture.with_name(f"{picture.stem}_{stage_sizes.short(s)}.png") for s in sizes]


def listed_files(directory: Path, first: int, earlier: Sequence[Size] = ()) -> Iterator[Path]:
    """The files of the rows that the parts of a set list, whether they are visible or not."""
    for path in parts(directory, first):
        for row in set_rows.read(path):
            yield from files_of(directory / row["file"], earlier)


def count_written(
    directory: Path, job: Mapping[str, Any], count: int, earlier: Sequence[Size] = ()
) -> int:
    """The number of rows of the set of a job that `reserve` would continue with all their files.

    earlier: sizes of the pictures of earlier stages.
    """
    firsts = _sets_of(directory, job, count)[:1]
    return sum(len(part_rows(directory, first, None, earlier)) for first in firsts)


def parts(directory: Path, first: int) -> list[Path]:
    """The parts of a set."""
    return sorted(directory.glob(f"set_{first:04d}.part-*.jsonl"))


def part_path(directory: Path, first: int, process: str) -> Path:
    """The part of a process; `process` is unique among all that ever draw in the directory."""
    return directory / f"set_{first:04d}.part-{process}.jsonl"


def manifest(directory: Path, first: int) -> Path:
    """The manifest of a set."""
    return directory / f"set_{first:04d}.jsonl"


def chunks(path: Path, size: int, count: int) -> Iterator[list[dict[str, Any]]]:
    """Up to `count` lists of up to `size` consecutive rows of a manifest.

    Raises what `set_rows.read_in_order` raises.
    """
    found = itertools.islice(set_rows.read_in_order(path), size * count)
    while rows := list(itertools.islice(found, size)):
        yield rows


class Pictures(Sequence):
    """The pictures of rows of a set, read from their files when they are used."""

    def __init__(self, directory: Path, rows: Sequence[Mapping[str, Any]]):
        """directory: of the set. rows: of its manifest."""
        self._directory, self._rows = directory, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        """A picture, or a list. Raises ValueError for a file that is not the one that was drawn."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        path, row = self._directory / self._rows[index]["file"], self._rows[index]
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise ValueError(f"{path} was changed since it was drawn; delete it and run it again")
        return pictures.read_png(path, content=data)


def manifest_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a manifest, by row. Raises ValueError unless they are the rows 0 ... n-1."""
    return set_rows.read_sorted(path)


def write_sheets(
    manifest: Path,
    sizes: Sequence[Size],
    lowres: UInt8[np.ndarray, "_ _ 3"] | None = None,
    directory: Path | None = None,
) -> list[Path]:
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


def _file(directory: Path, first: int) -> Path:
    return directory / f"set_{first:04d}.json"


def remove(directory: Path) -> None:
    """Deletes all sets of a directory with their pictures, and other numbered pictures."""
    pictures.remove_numbered(directory)
    for folder in _folders(directory):
        pictures.remove_numbered(folder)
        with contextlib.suppress(OSError):
            folder.rmdir()
    for path in list(directory.iterdir()) if directory.is_dir() else ():
        if FILES.fullmatch(path.name):
            path.unlink()
