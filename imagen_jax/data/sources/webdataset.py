"""Tar files in the WebDataset layout, such as those of img2dataset and GPIC.

Members whose names are equal up to the first dot are one item: `a/7.jpg`, `a/7.txt` and `a/7.json`
are the item a/7. They may be in any order and apart from each other.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO, NamedTuple

from absl import flags

from imagen_jax.caption_text import MARK
from imagen_jax.data.sources.folder import IMAGE_SUFFIXES, raise_unless_of_the_file
from imagen_jax.data.sources.shard_index import ShardIndex, Summary
from imagen_jax.data.sources.sharded import ShardedSource
from imagen_jax.data.sources.source import Fault, SourceItem, hashed_split
from imagen_jax.data.sources.tar_members import UNREADABLE, Member, read_members
from imagen_jax.data.sources.walk import Note, escaped
from imagen_jax.data.sources.where import Where
from imagen_jax.object_storage import AnyPath, open_to_read
from imagen_jax.storage import LFS_POINTER, content_fault

USAGE = "webdataset:TARS (such as webdataset:DIR/{00000..00099}.tar, also gs://BUCKET/...)"
HAS_METADATA = HAS_SHARDS = True
TEXT = "txt"
_JSON = "json"
_BUFFER = 2**13  # bytes; the default of a network file system can be larger than a member
_EXAMPLES = 3


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flag that chooses the captions."""
    flags.DEFINE_string(
        "webdataset_captions",
        TEXT,
        "for webdataset: captions, comma-separated: txt is the .txt member, other names are fields"
        " of the .json member; a dotted name is a field of a field",
        flag_values=values,
    )


def open_source(
    name: str, args: flags.FlagValues, index: ShardIndex | None = None
) -> "WebDatasetSource":
    """Opens the tar files of the pattern `name`."""
    where = getattr(args, "where", "")
    return WebDatasetSource(name, args.heldout, args.webdataset_captions, where, index)


class Entry(NamedTuple):
    """An item of a tar. image, text, metadata: its members. others: suffixes that are not read."""

    key: str
    image: Member | None
    text: Member | None
    metadata: Member | None
    others: tuple[str, ...]


class WebDatasetSource(ShardedSource):
    """The items of tar files. `expand` of `sharded` describes the pattern."""

    kind = "webdataset"

    def __init__(
        self,
        pattern: str,
        heldout: float,
        caption_fields: str = TEXT,
        where: str = "",
        index: ShardIndex | None = None,
    ):
        names = (name.strip() for name in caption_fields.split(","))
        self._fields = tuple(dict.fromkeys(name for name in names if name))
        if not self._fields:
            raise ValueError(
                "--webdataset_captions is empty: name txt or fields of the .json members"
            )
        self._where = Where(where) if where else None
        self._heldout = heldout
        options: dict[str, Any] = {"webdataset_captions": list(self._fields), "heldout": heldout}
        super().__init__(pattern, options | ({"where": where} if where else {}), index)

    def summary_options(self) -> dict[str, Any]:
        return {}  # captions and metadata are not read

    def summarize(self, path: AnyPath) -> Summary:
        try:
            with open_to_read(path, _BUFFER) as file:
                if reason := content_fault(file.read(len(LFS_POINTER))):
                    return Summary(0, "", [self.note(path, UNREADABLE, reason)])
                members, faults = read_members(file)
        except Exception as error:
            raise_unless_of_the_file(error)
            detail = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            return Summary(0, "", [self.note(path, UNREADABLE, detail)])
        entries, notes = self._grouped(path, members)
        notes = [self.note(path, *fault) for fault in faults] + notes
        if not members and not faults:
            notes.append(self.note(path, "empty_shard", "the tar has no members"))
        return Summary(len(entries), _digest(entries), notes)

    def open_shard(self, path: AnyPath) -> "WebDatasetShard":
        file = open_to_read(path, _BUFFER)
        entries, _ = self._grouped(path, read_members(file)[0])
        return WebDatasetShard(
            file, self.label(path), entries, self._fields, self._where, self._heldout
        )

    def _grouped(self, path: AnyPath, members: Sequence[Member]) -> tuple[list[Entry], list[Note]]:
        """Returns the items in the order of their first members, and notes on ignored members."""
        items: dict[str, dict[str, Member]] = {}
        ignored: dict[str, list[str]] = {}
        repeated: list[tuple[str, str, str]] = []
        for member in members:
            key, suffix = _split_name(member.name)
            if member.kind != "file" or not key:
                kind = member.kind if member.kind != "file" else "file without key or suffix"
                ignored.setdefault(kind, []).append(member.name)
            elif suffix in (parts := items.setdefault(key, {})):
                repeated.append((key, member.name, "an earlier member of that name"))
            else:
                parts[suffix] = member
        entries = []
        for key, parts in items.items():
            entry, images = _entry(key, parts)
            entries.append(entry)
            repeated += ((key, image.name, entry.image.name) for image in images)
            for suffix in entry.others:
                ignored.setdefault(f"*.{suffix}", []).append(parts[suffix].name)
        return entries, [*self._ignored(path, ignored), *self._repeated(path, repeated)]

    def _ignored(self, path: AnyPath, kinds: dict[str, list[str]]) -> Iterable[Note]:
        """One note for each kind of member that is not read: their number, examples."""
        for kind, names in kinds.items():
            examples = [escaped(name) for name in names[:_EXAMPLES]]
            note = self.note(path, "ignored_member", kind)
            yield note | {"count": len(names), "files": examples}

    def _repeated(self, path: AnyPath, members: Sequence[tuple[str, str, str]]) -> Iterable[Note]:
        for key, name, used in members:
            detail = escaped(f"{name} is not read, but {used}")
            item_id = escaped(f"{self.label(path)}/{key}")
            yield {"id": item_id, "reason": "repeated_member", "detail": detail}


class WebDatasetShard:
    """An open tar."""

    def __init__(
        self,
        file: BinaryIO,
        label: str,
        entries: Sequence[Entry],
        fields: Sequence[str],
        where: Where | None,
        heldout: float,
    ):
        self._file, self._label, self._entries = file, label, entries
        self._fields, self._where, self._heldout = fields, where, heldout

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, position: int) -> SourceItem:
        entry = self._entries[position]
        item_id = escaped(f"{self._label}/{entry.key}")
        image, captions, fault = None, [], None
        try:
            image, captions = self._read(entry)
        except _Unusable as unusable:
            fault = unusable.fault
        except OSError as error:
            raise_unless_of_the_file(error)
            fault = Fault("unreadable_image", error.strerror or str(error))
        except Exception as error:
            raise_unless_of_the_file(error)
            fault = Fault("unreadable_item", escaped(f"{type(error).__name__}: {error}"[:200]))
        return SourceItem(item_id, image, captions, hashed_split(item_id, self._heldout), fault)

    def close(self) -> None:
        self._file.close()

    def _read(self, entry: Entry) -> tuple[bytes, list[str]]:
        """The image and the captions. Raises _Unusable if there is a reason to leave it out."""
        if entry.image is None:
            raise _Unusable(*self._why_no_image(entry))
        needs_metadata = self._where or any(field != TEXT for field in self._fields)
        metadata = self._metadata(entry) if needs_metadata else {}
        if self._where and (fault := self._where.fault(metadata)):
            raise _Unusable(*fault)
        captions = [text for field in self._fields for text in self._texts(entry, metadata, field)]
        return self._content(entry.image), captions

    def _why_no_image(self, entry: Entry) -> tuple[str, str]:
        """img2dataset writes `status` and `error_message` for an image that it did not get."""
        try:
            metadata = self._metadata(entry)
        except _Unusable:
            metadata = {}
        status = metadata.get("status")
        if isinstance(status, str) and status != "success":
            cause = metadata.get("error_message") or status
            return "failed_download", escaped(f"{cause!s:.200}")
        parts = {TEXT: entry.text, _JSON: entry.metadata}
        found = [name for name, member in parts.items() if member] + list(entry.others)
        listed = ", ".join(f".{name}" for name in found[: 2 * _EXAMPLES])
        return "missing_image", escaped(f"its members are {listed}")

    def _metadata(self, entry: Entry) -> dict[str, Any]:
        """The .json object, {} if there is no such member."""
        if entry.metadata is None:
            return {}
        data = self._content(entry.metadata)
        try:
            metadata = json.loads(data)
        except (ValueError, RecursionError) as error:
            detail = (
                f"the .json member is not valid JSON ({error})"
                if data
                else "the .json member is empty"
            )
            raise _Unusable("broken_metadata", escaped(detail[:200])) from error
        if not isinstance(metadata, dict):
            raise _Unusable("broken_metadata", "the .json member is not an object")
        return metadata

    def _texts(self, entry: Entry, metadata: dict[str, Any], field: str) -> list[str]:
        if field != TEXT:
            return _texts_of(metadata, field)
        if entry.text is None:
            return []
        try:
            return [self._content(entry.text).decode().removeprefix(MARK)]
        except UnicodeDecodeError as error:
            detail = f"the .txt member is not UTF-8 text ({error.reason})"
            raise _Unusable("unreadable_captions", detail) from error

    def _content(self, member: Member) -> bytes:
        self._file.seek(member.offset)
        data = self._file.read(member.size)
        if len(data) < member.size:
            raise _Unusable("unreadable_image", "the tar has become shorter while it was read")
        return data


class _Unusable(Exception):
    """An item is left out."""

    def __init__(self, reason: str, detail: str):
        self.fault = Fault(reason, detail)
        super().__init__(reason, detail)


def _split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member; "" for a name without them, such as README or ._a.jpg.

    Names are never paths to write to, so absolute ones and those with .. are keys like others.
    """
    name = name.lstrip("/")
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}", suffix.lower()) if stem and suffix else ("", "")


def _entry(key: str, parts: dict[str, Member]) -> tuple[Entry, list[Member]]:
    """The item of the members {suffix: member}, and its images that are not read."""
    images = [parts[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in parts]
    known = {TEXT, _JSON, *(suffix[1:] for suffix in IMAGE_SUFFIXES)}
    others = tuple(suffix for suffix in parts if suffix not in known)
    image = images[0] if images else None
    return Entry(key, image, parts.get(TEXT), parts.get(_JSON), others), images[1:]


def _texts_of(metadata: dict[str, Any], field: str) -> list[str]:
    """The texts of a field: a text or a list of texts. null and NaN are left out."""
    value = metadata.get(field)
    if field not in metadata:
        value = metadata
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if not _is_missing(text)]
    for text in texts:
        if not isinstance(text, str):
            detail = f"{field} has a value of type {type(text).__name__} instead of text"
            raise _Unusable("unreadable_captions", escaped(detail))
    return texts


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _digest(entries: Sequence[Entry]) -> str:
    """Equal for tars whose items have the same names and sizes."""
    rows = [
        (entry.key, *(m and (m.name, m.size) for m in (entry.image, entry.text, entry.metadata)))
        for entry in entries
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
