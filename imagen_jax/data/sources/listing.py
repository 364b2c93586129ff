"""Reads the files that give captions to images: captions.jsonl and captions.csv."""

import csv
import io
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.caption_text import MARK, is_text, lines, read_text
from imagen_jax.data.sources.walk import Note

Listed = tuple[str, list[str], str]  # file, captions, split or ""
_SPLITS = ("train", "heldout")
_COLUMNS = ("file", "caption", "split")
_KEYS = (*_COLUMNS, "captions")
_QUOTES = "close every quote, and write a quote inside a quoted caption twice"


def read_jsonl(path: Path, notes: list[Note]) -> list[Listed]:
    """Returns the rows of captions.jsonl, one JSON object a line.

    null and NaN, which tables write for a missing caption, give "". A line that is not an object
    with a file and its captions is left out and added to `notes`.

    Raises:
      ValueError: the file is not UTF-8, a split is unknown, or half of the lines are not such
        objects; the message names the file and the line.
    """
    rows, faults = [], {}
    for number, line in enumerate(lines(read_text(path)), 1):
        line = line.lstrip(MARK)
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            faults[number] = f"is not an object with file and caption(s): {error}"
        else:
            _check_split(row, f"{path}:{number}")
            rows.append(row)
    note_faults(path, len(rows), faults, notes)
    return rows


def _parse(line: str) -> Listed:
    row = json.loads(line, parse_constant=lambda _: None, object_pairs_hook=_unique)
    captions = row["captions"] if "captions" in row else [row["caption"]]
    if captions is None:
        captions = [None]
    if isinstance(captions, list):
        captions = ["" if caption is None else caption for caption in captions]
        if row.get("caption") and row["caption"] not in captions:
            raise ValueError("caption is not one of captions")
    return _checked(row["file"], captions, str(row.get("split") or ""))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object; JSON's parser alone would keep only the last of two captions."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next((name for name in _KEYS if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"{twice} occurs twice")
    return row


def read_csv(path: Path, notes: list[Note], files: Collection[str] = ()) -> list[Listed]:
    """Returns the rows of captions.csv, whose first line names its columns.

    A row with an impossible file name is left out and added to `notes`.

    files: names of files in the folder, by which a row inside a caption is recognised.

    Raises:
      ValueError: the file is not such a table. A row with text outside the named columns is an
        error too: its caption has commas outside quotes, and only a part of it would be read.
    """
    table = csv_rows(path, files)
    _, header = next(table, (1, []))
    _check_header(path, header)
    unnamed = {at for at, name in enumerate(header) if not name.strip()}
    rows, faults, long = [], {}, []
    for line, row in table:
        if any(row[len(header) :]) or any(row[at].strip() for at in unnamed if at < len(row)):
            long.append(line)
            continue
        fields = dict(zip(header, row))
        if not {"file", "caption"} <= fields.keys():
            columns = f"{len(row)} columns, but the first line names {len(header)}"
            raise ValueError(f"{path}:{line}: {columns}")
        try:
            row = _checked(fields["file"], [fields["caption"]], fields.get("split", ""))
        except ValueError as error:
            faults[line] = f"cannot be used: {error}"
        else:
            _check_split(row, f"{path}:{line}")
            rows.append(row)
    if long:
        raise ValueError(
            f"{path}:{long[0]} has more columns than the first line names (rows with too many:"
            f" {len(long)}): put captions with commas in double quotes"
        )
    note_faults(path, len(rows), faults, notes)
    return rows


def csv_rows(
    path: Path, files: Collection[str] = (), separator: str = ","
) -> Iterator[tuple[int, list[str]]]:
    """Yields each row that is not blank, with the number of its first line.

    files: names of files, by which a row inside a caption is recognised. separator: of columns;
    with tabs, a row inside a caption is recognised by its tab.
    """
    csv.field_size_limit(sys.maxsize)  # a caption may be a whole page
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True, delimiter=separator)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}:{line} cannot be read ({error}): {_QUOTES}") from error
        if any(_holds_row(field, files, separator) for field in row):
            raise ValueError(f"{path}:{line}: a quote takes in the rows after it: {_QUOTES}")
        if any(row):
            yield line, row


def _holds_row(field: str, files: Collection[str], separator: str) -> bool:
    """Whether a field holds another row: its quote was never closed.

    A later line of the field has tabs between columns, or commas and the name of a file.
    """
    later = re.split(r"[\r\n]+", field)[1:]
    if separator == "\t":
        return any("\t" in line for line in later)
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


def _checked(file: Any, captions: Any, split: str) -> Listed:
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
    return file, captions, split


def _check_split(row: Listed, where: str) -> None:
    if row[2] not in ("", *_SPLITS):
        raise ValueError(f"{where}: split {row[2]!r} is neither train nor heldout")


def note_faults(path: Path, rows: int, faults: Mapping[int | str, str], notes: list[Note]) -> None:
    """Notes the damaged rows, by line; raises if as many rows are damaged as sound."""
    if faults and len(faults) >= rows:
        line, fault = next(iter(faults.items()))
        raise ValueError(f"{path}:{line} {fault}")
    notes += [
        {"id": f"{path.name}:{line}", "reason": "unreadable_row", "detail": fault}
        for line, fault in faults.items()
    ]
