"""The rows of a set of pictures: those that are requested, and those that its files list.

A part and a manifest have one JSON object per line. Lines may be damaged, and rows may be those of
other requests, because people can edit and copy the files.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from imagen_jax import line_logs
from imagen_jax.field import within
from imagen_jax.object_storage import AnyPath, bucket_errors
from imagen_jax.schema import SEEDS
from imagen_jax.storage import check_object

Row = Mapping[str, Any]
ROW_FIELDS = {"row": int, "prompt": str, "seed": int, "file": str, "sha256": str}
REPAIR = "run the command that drew the pictures again to repair it"


@dataclasses.dataclass(frozen=True)
class Requests:
    """The rows of a set: every prompt `per_prompt` times; each row has the next seed.

    Raises ValueError for a row without a valid seed.
    """

    prompts: Sequence[str]
    per_prompt: int
    first_seed: int

    def __post_init__(self) -> None:
        last = self.first_seed + max(len(self), 1) - 1
        if not (within(self.first_seed, SEEDS) and within(last, SEEDS)):
            raise ValueError(
                f"{len(self):,} pictures from --seed {self.first_seed} on need seeds up to {last},"
                f" but seeds are in {SEEDS}: give a smaller --seed"
            )

    def __len__(self) -> int:
        return len(self.prompts) * self.per_prompt

    def prompt(self, row: int) -> str:
        return self.prompts[row // self.per_prompt]

    def seed(self, row: int) -> int:
        return self.first_seed + row

    def fit(self, row: Row) -> bool:
        """Whether a listed row is one of these."""
        number = row["row"]
        return number < len(self) and (row["prompt"], row["seed"]) == (
            self.prompt(number),
            self.seed(number),
        )

    @property
    def job(self) -> dict[str, Any]:
        """The identity of the rows, as JSON."""
        lines = "\n".join(self.prompts).encode()
        return {
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256(lines).hexdigest(),
            "per_prompt": self.per_prompt,
            "first_seed": self.first_seed,
        }


def read(path: AnyPath) -> Iterator[dict[str, Any]]:
    """The rows of a file, in its order; damaged lines are left out. No rows without a file."""
    for line in line_logs.read_lines(path):
        with contextlib.suppress(ValueError):  # such as a line that a killed process cut off
            yield _parse(line, str(path))


def read_in_order(path: AnyPath) -> Iterator[dict[str, Any]]:
    """The rows 0, 1 ... of a manifest. Raises ValueError if the next line is not the next row."""
    with bucket_errors(path), path.open("rb") as file:
        for number, line in enumerate(file):
            row = _parse(line, f"{path}, line {number + 1},")
            check_number(path, number, row)
            yield row


def read_sorted(path: AnyPath) -> list[dict[str, Any]]:
    """All rows of a manifest, by row. Raises ValueError unless they are the rows 0 ... n-1."""
    with bucket_errors(path):
        lines = enumerate(path.read_bytes().splitlines(), 1)
    rows = [_parse(line, f"{path}, line {number},") for number, line in lines]
    rows.sort(key=lambda row: row["row"])
    for number, row in enumerate(rows):
        check_number(path, number, row)
    return rows


def check_number(path: AnyPath, number: int, row: Row) -> None:
    """Raises ValueError unless the row has this number."""
    if row["row"] != number:
        raise ValueError(f"{path} lists row {row['row']} in place of row {number}; {REPAIR}")


def _parse(line: bytes, label: str) -> dict[str, Any]:
    """A row. Raises ValueError for a damaged line, or a file outside of the set's directory.

    label: what the message calls the line.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{label} is damaged ({error}); {REPAIR}") from error
    check_object(label, row, ROW_FIELDS, REPAIR)
    file = PurePosixPath(row["file"])
    if row["row"] < 0 or file.is_absolute() or ".." in file.parts:
        raise ValueError(f"{label} is damaged (row {row['row']} is the file {file}); {REPAIR}")
    return row
