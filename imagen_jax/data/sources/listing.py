"""Reads the files that give captions to images: captions.jsonl and captions.csv."""

import csv
import io
import json
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.caption_text import MARK, is_text, lines, read_text

Listed = tuple[str, list[str], str]  # file, captions, split or ""
_SPLITS = ("train", "heldout")
_COLUMNS = ("file", "caption", "split")
_QUOTES = "close every quote, and write a quote inside a quoted caption twice"


def read_jsonl(path: Path) -> Iterator[Listed]:
    """Yields the rows of captions.jsonl, one JSON object a line.

    null and NaN, which tables write for a missing caption, give "".

    Raises:
      ValueError: a line is not an object with a file and its captions; names file and line.
    """
    for number, line in enumerate(lines(read_text(path)), 1):
        line = line.lstrip(MARK)
        if not line.strip():
            continue
        try:
            yield _parse(json.loads(line, parse_constant=lambda _: None))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number} is not an object with file and caption(s): {error}"
            ) from error


def _parse(row: Any) -> Listed:
    captions = row["captions"] if "captions" in row else [row["caption"]]
    if captions is None:
        captions = [None]
    if isinstance(captions, list):
        captions = ["" if caption is None else caption for caption in captions]
    return _checked(row["file"], captions, row.get("split") or "")


def read_csv(path: Path, files: Collection[str] = ()) -> Iterator[Listed]:
    """Yields the rows of captions.csv, whose first line names its columns.

    files: names of files in the folder, by which a row inside a caption is recognised.

    Raises:
      ValueError: the file is not such a table. A row with more columns than the first line is an
        error too: its caption has commas outside quotes, and only a part of it would be read.
    """
    rows = _rows(path, files)
    _, header = next(rows, (1, []))
    _check_header(path, header)
    long: list[int] = []
    for line, row in rows:
        if any(row[len(header) :]):
            long.append(line)
            continue
        fields = dict(zip(header, row))
        try:
            if not {"file", "caption"} <= fields.keys():
                raise ValueError(f"{len(row)} columns, but the first line names {len(header)}")
            yield _checked(fields["file"], [fields["caption"]], fields.get("split", ""))
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
    if long:
        raise ValueError(
            f"{path}:{long[0]} has more columns than the first line names (rows with too many:"
            f" {len(long)}): put captions with commas in double quotes"
        )


def _rows(path: Path, files: Collection[str]) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, with the number of its first line."""
    csv.field_size_limit(sys.maxsize)  # a caption may be a whole page
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}:{line} cannot be read ({error}): {_QUOTES}") from error
        if any(_holds_row(field, files) for field in row):
            raise ValueError(f"{path}:{line}: a quote takes in the rows after it: {_QUOTES}")
        if any(row):
            yield line, row


def _holds_row(field: str, files: Collection[str]) -> bool:
    """Whether a later line of a field has commas and names a file: its quote was never closed."""
    later = re.split(r"[\r\n]+", field)[1:]
    cells = (line.split(",") for line in later if "," in line)
    return any(cell.strip(' "') in files for row in cells for cell in row)


def _check_header(path: Path, header: Sequence[str]) -> None:
    if not {"file", "caption"} <= set(header):
        raise ValueError(
            f"{path}: the first line must name the columns file and caption, with commas between;"
            f" it is {','.join(header)[:80]!r}"
        )
    for name in _COLUMNS:
        if header.count(name) > 1:
            raise ValueError(f"{path}: the first line names the column {name} twice")


def _checked(file: Any, captions: Any, split: Any) -> Listed:
    if (
        not isinstance(file, str)
        or not isinstance(captions, list)
        or not all(isinstance(caption, str) for caption in captions)
    ):
        raise ValueError("file and captions must be text")
    file = file.lstrip(MARK)  # of files that were joined
    if not file or not is_text(file):
        raise ValueError(f"{file!r} is not the name of a file")
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"{file} is not in the directory of the captions file")
    if split not in ("", *_SPLITS):
        raise ValueError(f"split {split!r} is neither train nor heldout")
    return file, captions, split
