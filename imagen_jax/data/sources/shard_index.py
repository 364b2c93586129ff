"""The index of shard files: what is known of each shard, kept on disk between openings.

    {"key": "...", "path": "tars/00000.tar", "size": 1, "mtime_ns": 2, "items": 3, "digest": "...",
     "notes": [], "columns": []}

A line counts for a shard whose size and modification time (in a bucket, generation) are those of
the line. `key` identifies
the format of the line, the options that it depends on and the name of the shard in ids. A line that
is damaged or of another key is ignored. Several processes may append to one index, and read it at
the same time. On a network file system, which may mix or lose lines of different hosts, that costs
only another look at their shards.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagen_jax.data.sources.walk import Note
from imagen_jax.object_storage import AnyPath, FileState
from imagen_jax.storage import check_object

FORMAT_VERSION = 1  # of the lines and of the digests in them
REFRESH_S = 5.0  # between two looks at what other processes have appended
_FIELDS = dict.fromkeys(("key", "path", "digest"), str) | dict.fromkeys(("notes", "columns"), list)
_FIELDS |= dict.fromkeys(("size", "mtime_ns", "items"), int)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is known of a shard without its images.

    items: their number. digest: equal for equal items. notes: lines for skipped.jsonl, such as a
    truncated end. columns: their names, in a shard that has some.
    """

    items: int
    digest: str
    notes: Sequence[Note] = ()
    columns: Sequence[str] = ()


def key_of(*parts: Any) -> str:
    """The `key` of a line that depends on these values, which JSON can hold."""
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *parts]).encode()).hexdigest()[:32]


class ShardIndex:
    """The lines of one index file, which may be missing.

    read_only: `add` does nothing.
    """

    def __init__(self, path: Path, read_only: bool = False):
        self._path, self._read_only = Path(path), read_only
        self._lines: dict[tuple[str, str], tuple[int, int, Summary]] = {}
        self._end = 0  # of what has been read, in bytes
        self._looked = 0.0
        self._has_appended = False
        self._read()

    def find(self, path: AnyPath, key: str, state: FileState) -> Summary | None:
        """The summary of a shard with this size and time; None if the index has none."""
        if time.monotonic() - self._looked > REFRESH_S:
            self._read()
        size, mtime_ns, summary = self._lines.get((str(path), key), (None, None, None))
        return summary if (size, mtime_ns) == (state.size, state.version) else None

    def add(self, path: AnyPath, key: str, state: FileState, summary: Summary) -> None:
        """Appends a line.

        state: of before the shard was read. A shard without items has no line: whatever was in the
        way, such as its permissions, may change without a change of size or time.

        Raises OSError if the file cannot be written.
        """
        if self._read_only or not summary.items:
            return
        line = {"key": key, "path": str(path), "size": state.size, "mtime_ns": state.version}
        data = json.dumps(line | dataclasses.asdict(summary)).encode() + b"\n"
        if not self._has_appended:  # the last line may be that of a process that was killed
            self._path.parent.mkdir(parents=True, exist_ok=True)
            data = b"\n" + data
        with open(
            self._path, "ab", buffering=0
        ) as file:  # one write, which is whole on a local disk
            file.write(data)
        self._has_appended = True

    def _read(self) -> None:
        """Reads the complete lines that were appended since the last call."""
        self._looked = time.monotonic()
        try:
            with open(self._path, "rb") as file:
                file.seek(self._end)
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return
        complete = data[: data.rfind(b"\n") + 1]
        self._end += len(complete)
        for line in complete.splitlines():
            if entry := _parse(line):
                self._lines[entry["path"], entry["key"]] = (
                    entry["size"],
                    entry["mtime_ns"],
                    Summary(*(entry[field.name] for field in dataclasses.fields(Summary))),
                )


def _parse(line: bytes) -> dict[str, Any] | None:
    """The content of a line; None if it is blank, damaged or something else."""
    try:
        entry = json.loads(line)
        check_object("", entry, _FIELDS, "")
        for note in entry["notes"]:
            check_object("", note, {"id": str, "reason": str}, "")
    except (ValueError, RecursionError):
        return None
    right = entry["items"] > 0 and all(isinstance(name, str) for name in entry["columns"])
    return entry if right else None
