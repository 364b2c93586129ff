"""The base of sources whose items lie in shard files, such as tar or parquet.

An item's index is its position in the sequence of all shards. Each process keeps the last
OPEN_SHARDS shards open, so reading in order opens every shard once. Memory grows with the number of
shards and with the items of one shard, not with the number of items.
"""

import bisect
import glob
import hashlib
import itertools
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from imagen_jax.data.sources.folder import raise_unless_of_the_file
from imagen_jax.data.sources.shard_index import ShardIndex, Summary, key_of
from imagen_jax.data.sources.source import SourceItem
from imagen_jax.data.sources.summaries import summaries
from imagen_jax.data.sources.walk import Note, escaped
from imagen_jax.object_storage import AnyPath, check_bucket, file_state, in_bucket, matching
from imagen_jax.storage import as_path, entry_names, exists

OPEN_SHARDS = 2
MISSING = "missing_shard"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
log = logging.getLogger(__name__)


@runtime_checkable
class Shard(Protocol):
    """An open shard: its items in order. A damaged item has a fault and raises nothing."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> SourceItem: ...

    def close(self) -> None: ...


class ShardedSource:
    """A source over shard files. Subclasses define `summarize` and `open_shard`."""

    kind = ""

    def __init__(self, pattern: str, options: dict[str, Any], index: ShardIndex | None = None):
        """pattern: see `expand`. options: JSON for the manifest that items depend on.

        index: holds the summaries of shards that an earlier opening has looked at.
        """
        self._paths = expand(self.kind, pattern)
        self._labels = labels(self._paths)
        self._options = options
        self._open: OrderedDict[int, Shard] = OrderedDict()
        found = summaries(self, self._paths, index)
        self._columns = {name for summary in found for name in summary.columns}
        self._notes = [dict(note) for summary in found for note in summary.notes]
        self._warn_of_missing()
        self._ends = list(itertools.accumulate(summary.items for summary in found))
        rows = zip(self._paths, found)
        listing = "".join(f"{self.label(path)} {summary.digest}\n" for path, summary in rows)
        self._digest = hashlib.sha256(listing.encode()).hexdigest()
        if not len(self):
            raise ValueError(f"{self.kind}:{pattern} has no items{self._examples()}")

    def summarize(self, path: AnyPath) -> Summary:
        """Looks at a shard without decoding images. A damaged shard has a note."""
        raise NotImplementedError

    def summary_options(self) -> dict[str, Any]:
        """The options that `summarize` depends on, as JSON: all, unless a subclass knows better."""
        return self._options

    def open_shard(self, path: AnyPath) -> Shard:
        """Opens a shard; it has as many items as its summary says."""
        raise NotImplementedError

    def label(self, path: AnyPath) -> str:
        """The name of a shard in the ids of its items, see `labels`."""
        return self._labels[path]

    def note(self, path: AnyPath, reason: str, detail: str) -> Note:
        """A note on a shard."""
        name = f"{self.label(path)}{escaped(path.suffix)}"
        return {"id": name, "reason": reason, "detail": escaped(detail)}

    def summary_key(self, path: AnyPath) -> str:
        """The key of the shard's line in an index; its notes depend on its name."""
        return key_of(self.kind, self.summary_options(), self.label(path))

    def summary(self, path: AnyPath) -> Summary:
        """Summarizes a shard, unless there is no such file; opening a pipe would wait forever."""
        try:
            state = file_state(path)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                raise_unless_of_the_file(error)
            return Summary(0, "", [self.note(path, MISSING, error.strerror or str(error))])
        if not state.is_regular:
            return Summary(
                0,
                "",
                [
                    self.note(
                        path, MISSING, "is a directory or a device; for its files, give {path}/*"
                    )
                ],
            )
        return self.summarize(path)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def shard_ends(self) -> Sequence[int]:
        """For each shard the index after its last item."""
        return self._ends

    def __getitem__(self, index: int) -> SourceItem:
        number = bisect.bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        if number not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            shard = self._open[number] = self.open_shard(self._paths[number])
            if len(shard) != self._ends[number] - start:
                raise ValueError(
                    f"{self._paths[number]} changed while it was being read: start again when its"
                    " copy or download is complete; if it is, remove index.jsonl in OUTPUT/partial"
                )
        self._open.move_to_end(number)
        return self._open[number][index - start]

    def describe(self) -> dict[str, Any]:
        counts = {"shards": len(self._paths), "items": len(self)}
        return {"kind": self.kind} | counts | self._options | {"listing_sha256": self._digest}

    def notes(self) -> list[Note]:
        return list(self._notes)

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes open shards of their own."""
        return self.__dict__ | {"_open": OrderedDict()}

    def _warn_of_missing(self) -> None:
        missing = [note["id"] for note in self._notes if note["reason"] == MISSING]
        if missing:
            said = "%s: %d of %d shards do not exist, such as %s; skipped.jsonl lists them"
            log.warning(said, self.kind, len(missing), len(self._paths), missing[0])

    def _examples(self) -> str:
        told = (f"{n['id']} {n['reason']} ({n.get('detail', n.get('count'))})" for n in self._notes)
        examples = ", ".join(itertools.islice(told, 3))
        return f": {examples}" if examples else ""


def expand(kind: str, pattern: str) -> list[AnyPath]:
    """The files of a pattern: comma-separated paths with braces ({00..12}, {a,b}) and globs.

    Files of a glob are in the order of their names; the order of all else is kept. A path from
    braces is returned even if there is no such file, unless none of its part exists. Paths may be
    in a bucket.

    Raises ValueError for a part without a file, a URL of another scheme, a bucket that does not
    exist, or a file that is given twice.
    """
    label = f"--source {kind}"
    paths: list[AnyPath] = []
    for part in _split(pattern):
        texts = list(braces(part))
        check_bucket(label, as_path(label, texts[0]))
        found = [path for text in texts for path in _glob(label, text)]
        if not _some_exist(found):
            raise ValueError(f"--source {kind}: no file matches {part}: check the path")
        paths += found
    repeated = [path for path, count in _counts(paths).items() if count > 1]
    if repeated:
        raise ValueError(f"--source {kind}: {repeated[0]} is given twice")
    return paths


def _split(pattern: str) -> list[str]:
    """Splits at commas outside braces."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(pattern):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append(pattern[start:i])
            start = i + 1
    return [part for part in [*parts, pattern[start:]] if part]


def braces(text: str) -> Iterator[str]:
    """Expands braces as a shell does: {00..12} counts with leading zeros, {a,b} lists."""
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    for choice in _choices(match[1]):
        yield from braces(f"{text[: match.start()]}{choice}{text[match.end() :]}")


def _choices(inside: str) -> list[str]:
    if match := _RANGE.fullmatch(inside):
        first, last = (int(number) for number in match.groups())
        width = len(match[1]) if match[1].startswith("0") else 0
        step = 1 if last >= first else -1
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    return inside.split(",")


def _some_exist(paths: Sequence[AnyPath]) -> bool:
    """Whether one of the paths exists; one listing for each directory of a bucket."""
    if not any(map(in_bucket, paths)):
        return any(path.exists() for path in paths)
    names = {folder: set(entry_names(folder)) for folder in {path.parent for path in paths}}
    return any(path.name in names[path.parent] for path in paths)


def _glob(label: str, text: str) -> list[AnyPath]:
    path = as_path(label, text)
    if in_bucket(path):
        return matching(path) if glob.has_magic(text) and not exists(path) else [path]
    if glob.has_magic(text) and not Path(text).is_file():
        return [Path(path) for path in sorted(glob.glob(text, recursive=True))]
    return [Path(text)]


def labels(paths: Sequence[AnyPath]) -> dict[AnyPath, str]:
    """A different name for each shard, without its suffix.

    It is the stem of the file. If several have the same stem, it is the path below the directory
    that holds all shards, so a copy of the directory has the same names.
    """
    absolute = [os.path.abspath(path) for path in paths]
    top = os.path.commonpath([os.path.dirname(path) for path in absolute])
    below = [Path(path).relative_to(top) for path in absolute]
    forms = [
        [path.stem for path in paths],
        [path.with_suffix("").as_posix() for path in below],
        [path.as_posix() for path in below],
    ]
    names = next((form for form in forms if len(set(form)) == len(form)), forms[-1])
    return {path: escaped(name) for path, name in zip(paths, names)}


def _counts(paths: Sequence[AnyPath]) -> dict[AnyPath, int]:
    counts: dict[AnyPath, int] = {}
    for path in paths:
        real = path if in_bucket(path) else path.resolve()
        counts[real] = counts.get(real, 0) + 1
    return counts
