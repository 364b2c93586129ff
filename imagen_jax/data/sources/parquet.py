"""Parquet files with a column of images and columns of captions."""

import dataclasses
import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from imagen_jax.data.sources import parquet_rows
from imagen_jax.data.sources.folder import raise_unless_of_the_file, read_image
from imagen_jax.data.sources.parquet_rows import BINARY, TEXT, Column, RowGroupError, Rows
from imagen_jax.data.sources.shard_index import ShardIndex, Summary
from imagen_jax.data.sources.sharded import ShardedSource
from imagen_jax.data.sources.source import Fault, SourceItem, hashed_split
from imagen_jax.data.sources.walk import escaped
from imagen_jax.data.sources.where import UNDECIDED, Where
from imagen_jax.object_storage import SCHEME, AnyPath, file_state, in_bucket
from imagen_jax.storage import as_path, check_local

USAGE = "parquet:FILES (a pattern such as DIR/*.parquet or DIR/{000..012}.parquet)"
HAS_METADATA = HAS_SHARDS = True
_KEY_TYPES = TEXT | BINARY | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_NAMES = 500  # characters of the names of columns in a message
_IMAGE_NEEDS = "binary, a struct of bytes and path, or text with paths"
_TEXT_NEEDS = "text or lists of text"
_KEY_NEEDS = "text or integers"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that choose columns."""
    define = partial(flags.DEFINE_string, flag_values=values)
    nested = "a dotted name is a field of a struct"
    define(
        "parquet_image",
        "image",
        f"for parquet: column of images: {_IMAGE_NEEDS}; {nested}",
    )
    define(
        "parquet_caption",
        "caption",
        f"for parquet: columns of captions, comma-separated: {_TEXT_NEEDS}; {nested}",
    )
    define("parquet_key", None, "for parquet: column of ids; default: the number of the row")
    define(
        "parquet_images",
        None,
        "for parquet: folder that paths of images are relative to; default: that of the shard",
    )


def open_source(
    name: str, args: flags.FlagValues, index: ShardIndex | None = None
) -> "ParquetSource":
    """Opens the parquet files of a pattern."""
    options = Options(
        args.parquet_image.strip(),
        tuple(part.strip() for part in args.parquet_caption.split(",") if part.strip()),
        args.parquet_key or None,
        args.parquet_images or None,
        args.heldout,
        Where(args.where) if args.where else None,
    )
    return ParquetSource(name, options, index)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is read.

    image, captions, key: names of columns, see `parquet_rows.find`; no key: row numbers. images:
    the folder of image paths; None: that of the shard. heldout: fraction for the held-out split.
    where: the condition on columns of metadata.
    """

    image: str = "image"
    captions: tuple[str, ...] = ("caption",)
    key: str | None = None
    images: str | None = None
    heldout: float = 0.0
    where: Where | None = None

    def __post_init__(self):
        if not self.image or not self.captions:
            raise ValueError("--parquet_image or --parquet_caption is empty: name a column")
        if self.images is not None:
            check_local("--parquet_images", self.images)
            if not Path(self.images).is_dir():
                raise ValueError(f"--parquet_images {self.images} is not a directory")

    def describe(self) -> dict[str, Any]:
        """JSON for the manifest."""
        told: dict[str, Any] = {"image": self.image, "captions": list(self.captions)}
        if self.key is not None:
            told["key"] = self.key
        if self.images is not None:
            told["images"] = Path(self.images).resolve().name
        if self.where is not None:
            told["where"] = self.where.text
        return told | {"heldout": self.heldout}


class ParquetSource(ShardedSource):
    """The rows of parquet files; `parquet_rows.Rows` says how much of them is in memory.

    A row's image is binary, or a path in the folder of the shard or in --parquet_images. In a
    struct, as on the Hugging Face hub, the path is used if `bytes` is null.
    """

    kind = "parquet"

    def __init__(self, pattern: str, options: Options, index: ShardIndex | None = None):
        self._chosen = options
        super().__init__(pattern, options.describe(), index)
        names = options.where.names if options.where else ()
        if missing := [name for name in names if name not in self._columns]:
            raise ValueError(
                f"--where: no shard has the column {', '.join(missing)}: use columns of"
                f" {', '.join(sorted(self._columns))}"
            )

    def summarize(self, path: AnyPath) -> Summary:
        try:
            with parquet_rows.open_file(path) as file:
                return self._summarize(path, file)
        except Exception as error:
            raise_unless_of_the_file(error)
            return self._unread(path, "unreadable_shard", _cause(error))

    def _summarize(self, path: AnyPath, file: Any) -> Summary:
        rows = sum(parquet_rows.row_counts(file))
        if not rows:
            return self._unread(path, "empty_shard", "has no rows")
        columns = _Columns(file.schema_arrow, self._chosen)
        if columns.fault:
            return self._unread(path, *columns.fault, rows, columns.names)
        content = hashlib.sha256(str(file_state(path).size).encode())
        content.update(parquet_rows.footer(path))
        notes = _keys(file, columns.key)[1] if columns.key else {}
        told = [self.note(path, reason, told) | {"count": n} for reason, (n, told) in notes.items()]
        return Summary(rows, content.hexdigest(), told, columns.names)

    def summary_options(self) -> dict[str, Any]:
        chosen = self._chosen
        return {"image": chosen.image, "captions": list(chosen.captions), "key": chosen.key}

    def _unread(
        self, path: AnyPath, reason: str, detail: str, rows: int = 0, columns: Sequence[str] = ()
    ) -> Summary:
        """A shard that is left out; the note counts its rows if they are known."""
        note = self.note(path, reason, detail)
        return Summary(0, "", [note | ({"count": rows} if rows else {})], columns)

    def open_shard(self, path: AnyPath) -> "ParquetShard":
        try:
            return ParquetShard(path, self.label(path), self._chosen)
        except (ValueError, OSError) as error:
            raise_unless_of_the_file(error)
            raise ValueError(
                f"{path} changed while it was being read ({_cause(error)}): start again when its"
                " copy or download is complete"
            ) from error


class ParquetShard:
    """The rows of one file. A row that cannot be read has a fault."""

    def __init__(self, path: AnyPath, label: str, options: Options):
        self._label, self._options = label, options
        self._folder = Path(options.images) if options.images is not None else path.parent
        self._file = parquet_rows.open_file(path)
        self._columns = _Columns(self._file.schema_arrow, options)
        if self._columns.fault:
            raise ValueError(self._columns.fault.detail)
        self._rows = Rows(self._file, self._columns.all)
        key = self._columns.key
        self._keys = _keys(self._file, key)[0] if key else []

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def __getitem__(self, row: int) -> SourceItem:
        key = self._keys[row] if self._keys else _row_key(row)
        item_id = f"{self._label}/{key}"
        split = hashed_split(item_id, self._options.heldout)
        try:
            image, captions, fault = self._read(row)
        except RowGroupError as error:
            image, captions, fault = None, [], Fault("unreadable_row_group", str(error))
        except Exception as error:  # whatever one row holds costs that row only
            raise_unless_of_the_file(error)
            image, captions, fault = None, [], Fault("unreadable_row", _cause(error))
        return SourceItem(item_id, image, captions, split, fault)

    def close(self) -> None:
        self._file.close(force=True)

    def _read(self, row: int) -> tuple[bytes | None, list[str], Fault | None]:
        batch, position = self._rows[row]
        if fault := self._filtered(batch, position):
            return None, [], fault
        captions = [
            parquet_rows.text(scalar)
            for column in self._columns.captions
            for scalar in parquet_rows.values(batch, position, column)
        ]
        images = parquet_rows.values(batch, position, self._columns.image)
        if not images:
            return None, captions, Fault("missing_image", "null")
        return self._image(images[0], captions)

    def _filtered(self, batch: Any, position: int) -> Fault | None:
        if self._options.where is None:
            return None
        metadata = {}
        for name, column in self._columns.where.items():
            try:
                found = parquet_rows.values(batch, position, column)
                found = [parquet_rows.plain(scalar) for scalar in found]
            except Exception as error:  # such as a date that Python does not have
                return Fault(UNDECIDED, f"{name}: {_cause(error)}")
            metadata[name] = found if column.is_listed else next(iter(found), None)
        return self._options.where.fault(metadata)

    def _image(
        self, scalar: Any, captions: list[str]
    ) -> tuple[bytes | None, list[str], Fault | None]:
        content = path = None
        if parquet_rows.inner_fields(scalar.type):
            content = parquet_rows.field(scalar, "bytes")
            path = parquet_rows.field(scalar, "path")
        elif str(scalar.type) in TEXT:
            path = parquet_rows.content(scalar)
        else:
            content = parquet_rows.content(scalar)
        if content is not None:
            return content, captions, None if content else Fault("broken_image", "0 bytes")
        image, fault = self._load(os.fsdecode(path)) if path else (None, None)
        return image, captions, fault or (None if path else Fault("missing_image", "null"))

    def _load(self, path: str) -> tuple[bytes | None, Fault | None]:
        """Reads an image file of the folder. Absolute paths must be inside it as well."""
        shown = escaped(path)[:200]
        if "://" in path:
            return None, Fault("missing_image", f"{shown} is a URL: download the images first")
        root = f"{SCHEME}:/" if in_bucket(self._folder) else ""
        folder = os.path.abspath(os.fspath(self._folder).removeprefix(root))
        file = posixpath.normpath(posixpath.join(folder, path))
        if not file.startswith(f"{folder.rstrip('/')}/"):
            return None, Fault("path_outside_folder", shown)
        image, fault = read_image(as_path("image", f"{root}{file}"))
        if image is None:
            return None, fault or Fault("missing_image", f"no file {shown}")
        return image, None


class _Columns:
    """The columns of a shard that are read. fault: why the shard cannot be read."""

    def __init__(self, schema: Any, options: Options):
        self.names = list(schema.names)
        self.fault: Fault | None = None
        find = partial(self._find, schema)
        self.image = find("image", options.image, _is_image, _IMAGE_NEEDS)
        self.captions = [find("caption", name, _is_text, _TEXT_NEEDS) for name in options.captions]
        self.key = find("key", options.key, _is_key, _KEY_NEEDS) if options.key else None
        wanted = options.where.names if options.where else ()
        self.where = {
            name: parquet_rows.find(schema, name) for name in wanted if name in schema.names
        }

    @property
    def all(self) -> list[Column]:
        """Those that are read for every item; keys are read once."""
        image = self.image
        if parquet_rows.inner_fields(image.type):
            inside = {field.name for field in parquet_rows.inner_fields(image.type)}
            parts = [name for name in ("bytes", "path") if name in inside]
            images = [image._replace(read=f"{image.read}.{name}") for name in parts]
        else:
            images = [image]
        return [*images, *self.captions, *self.where.values()]

    def _find(
        self,
        schema: Any,
        flag: str,
        name: str,
        is_right: Callable[[Column], bool],
        needs: str,
    ) -> Column | None:
        """The column; sets `fault` if it is missing or of another type."""
        column = parquet_rows.find(schema, name)
        remedy = f"name another with --parquet_{flag}"
        if column is None:
            known = ", ".join(self.names)[:_NAMES]
            detail = f"has no column {name!r} (it has {known}): {remedy}"
            self.fault = self.fault or Fault("missing_column", detail)
        elif not is_right(column):
            kind = f"lists of {column.type}" if column.is_listed else column.type
            detail = f"has {kind} in column {name!r}, not {needs}: {remedy}"
            self.fault = self.fault or Fault("wrong_column_type", detail)
        return column


def _is_image(column: Column) -> bool:
    inside = {field.name: str(field.type) for field in parquet_rows.inner_fields(column.type)}
    if inside:
        right = {"bytes": BINARY | {"null"}, "path": TEXT | {"null"}}
        named = [name for name in right if name in inside]
        is_right = bool(named) and all(inside[name] in right[name] for name in named)
        return is_right and not column.is_listed
    return not column.is_listed and str(column.type) in TEXT | BINARY | {"null"}


def _is_text(column: Column) -> bool:
    return str(column.type) in TEXT | BINARY | {"null"}


def _is_key(column: Column) -> bool:
    kind = str(column.type)
    is_known = kind in _KEY_TYPES | {"null"} or kind.startswith("fixed_size_binary")
    return is_known and not column.is_listed


def _keys(file: Any, column: Column) -> tuple[list[str], dict[str, tuple[int, str]]]:
    """The key of each row, see `distinct`. Rows without a key have their number."""
    found: list[str] = []
    for group, rows in enumerate(parquet_rows.row_counts(file)):
        try:
            batches = file.iter_batches(
                row_groups=[group], columns=[column.read], use_threads=False
            )
            keys = [_key(batch, i, column) for batch in batches for i in range(batch.num_rows)]
        except Exception as error:  # the rows of such a group have row numbers
            raise_unless_of_the_file(error)
            keys = []
        found += (keys + [""] * rows)[:rows]
    return distinct(found)


def _key(batch: Any, position: int, column: Column) -> str:
    found = parquet_rows.values(batch, position, column)
    if not found:
        return ""
    value = found[0]
    kind = str(value.type)
    if kind.startswith("fixed_size_binary"):
        return parquet_rows.content(value).hex()
    if kind in TEXT | BINARY:
        return parquet_rows.content(value).decode(errors="backslashreplace")
    return str(value.as_py())


def _row_key(row: int) -> str:
    return f"{row:09d}"


def distinct(keys: Sequence[str]) -> tuple[list[str], dict[str, tuple[int, str]]]:
    """Gives each row its own key: a repeated one gets the suffix #2, #3, ..., an empty one the
    number of its row. Returns the keys, and {reason: (count, detail)} for notes.
    """
    given, used, numbers = set(keys), set(), Counter()
    names, repeated = [], []
    for row, key in enumerate(keys):
        stem = name = key or _row_key(row)
        while name in used or (name != key and name in given):
            numbers[stem] += 1
            name = f"{stem}#{numbers[stem] + 1}"
        if key and name != key:
            repeated.append(name)
        used.add(name)
        names.append(name)
    notes = {}
    if repeated:
        detail = f"repeated keys have numbers, such as {repeated[0]}"
        notes["repeated_key"] = (len(repeated), detail)
    if missing := sum(not key for key in keys):
        notes["missing_key"] = (missing, "rows without a key have the number of the row")
    return names, notes


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return f"has the name of a column that is not UTF-8 ({error.reason})"
    if isinstance(error, ValueError):
        return parquet_rows.first_line(error)
    return f"{type(error).__name__}: {parquet_rows.first_line(error)}"
