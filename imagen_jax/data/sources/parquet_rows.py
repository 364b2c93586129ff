"""Reads named columns of a parquet file, row by row, with one batch of rows in memory."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from imagen_jax.data.sources.folder import raise_unless_of_the_file
from imagen_jax.object_storage import AnyPath, in_bucket, open_to_read
from imagen_jax.storage import COPY_AGAIN, LFS_POINTER, content_fault

TEXT = {"string", "large_string", "string_view"}
BINARY = {"binary", "large_binary", "binary_view"}
BATCH_ROWS, BATCH_BYTES = 256, 32 * 2**20
_READ_BYTES = 2**20  # of a column, in one request to the file system
_MAGIC = b"PAR1"


class Column(NamedTuple):
    """A column, or a field inside it.

    path: the names of the column and of the fields inside. type: of its values, without lists,
    dictionaries and extensions around it. read: the name that selects it in the file. is_listed: a
    row has a list of values.
    """

    path: tuple[str, ...]
    type: Any
    read: str
    is_listed: bool


class RowGroupError(ValueError):
    """The row cannot be decoded, nor can the rows after it in its row group."""


def open_file(path: AnyPath) -> Any:
    """Opens a file; checksums of its pages, if it has some, are verified.

    Raises:
      ValueError: it is not a complete parquet file; the message says why.
      OSError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = open_to_read(path)
    fault = content_fault(file.read(len(LFS_POINTER)))
    if fault or not in_bucket(path):
        file.close()
    if fault:
        raise ValueError(fault)
    source = file if in_bucket(path) else path  # pyarrow's own files are faster
    try:
        return pq.ParquetFile(
            source, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) or isinstance(error, MemoryError):
            raise
        raise ValueError(_why(path, error)) from error


def _why(path: AnyPath, error: Exception) -> str:
    with open_to_read(path) as file:
        start = file.read(4)
        size = file.seek(0, 2)
        file.seek(max(size - 4, 0))
        end = file.read()
    if b"PARE" in (start, end):
        return "is encrypted; decrypt it"
    if start != _MAGIC:
        return "is not a parquet file"
    if end != _MAGIC:
        return f"is truncated: its footer is missing; {COPY_AGAIN}"
    return f"has a damaged footer ({first_line(error)}); {COPY_AGAIN}"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type; damaged bytes in it become "?"."""
    line = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def footer(path: AnyPath) -> bytes:
    """The file's footer: schema, positions, sizes and statistics of all columns."""
    with open_to_read(path) as file:
        size = file.seek(0, 2)
        file.seek(max(size - 8, 0))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(size - 8 - length, 0))
        return file.read()


def row_counts(file: Any) -> list[int]:
    """The number of rows of each row group.

    Raises:
      ValueError: the footer contradicts itself, so a number may be anything.
    """
    metadata = file.metadata
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        raise ValueError(f"has a damaged footer (numbers of rows differ); {COPY_AGAIN}")
    return counts


def find(schema: Any, name: str) -> Column | None:
    """The column of this name, or the field of a struct: image.bytes, sentences.text.

    Lists of structs may be on the way. A column whose own name has dots is found first.
    """
    found = _find(list(schema), name)
    if found is None:
        return None
    path, kind, lists = found
    inner, is_listed = _value_type(kind)
    # Names in the file also have the levels of a list, so a column with lists is read whole.
    read = path[0] if lists else ".".join(path)
    return Column(path, inner, read, lists or is_listed)


def _find(fields: Sequence[Any], name: str) -> tuple[tuple[str, ...], Any, bool] | None:
    for field in fields:
        if field.name == name:
            return (name,), field.type, False
    for field in fields:
        if name.startswith(f"{field.name}."):
            inner, is_listed = _value_type(field.type)
            if inner_fields(inner):
                inside = _find(inner_fields(inner), name[len(field.name) + 1 :])
                if inside:
                    return (field.name, *inside[0]), inside[1], is_listed or inside[2]
    return None


def inner_fields(kind: Any) -> list[Any]:
    """The fields of a struct; [] for other types."""
    is_struct = str(kind).startswith("struct<")
    return [kind.field(i) for i in range(kind.num_fields)] if is_struct else []


def _value_type(kind: Any) -> tuple[Any, bool]:
    """The type inside lists, dictionaries and extensions, and whether there are lists."""
    is_listed = False
    while True:
        if hasattr(kind, "storage_type"):
            kind = kind.storage_type
        elif hasattr(kind, "value_field"):
            kind, is_listed = kind.value_field.type, True
        elif hasattr(kind, "value_type"):
            kind = kind.value_type
        else:
            return kind, is_listed


def values(batch: Any, position: int, column: Column) -> list[Any]:
    """The values of a column in one row; nulls are left out."""
    array = batch.column(batch.schema.names.index(column.path[0]))
    return list(_values(array[position], column.path[1:]))


def _values(scalar: Any, path: tuple[str, ...]) -> Iterator[Any]:
    import pyarrow as pa

    while isinstance(scalar, pa.DictionaryScalar | pa.ExtensionScalar) and scalar.is_valid:
        scalar = scalar.value
    if not scalar.is_valid:
        return
    if isinstance(scalar, pa.ListScalar):
        for each in scalar.values:
            yield from _values(each, path)
    elif path:
        yield from _values(scalar[path[0]], path[1:])
    else:
        yield scalar


def field(scalar: Any, name: str) -> bytes | None:
    """Text or binary of a struct's field; None if it is null or absent."""
    if name not in [inside.name for inside in inner_fields(scalar.type)]:
        return None
    found = list(_values(scalar, (name,)))
    return content(found[0]) if found else None


def content(scalar: Any) -> bytes:
    """The bytes of text or binary, which may be invalid UTF-8."""
    return scalar.as_buffer().to_pybytes()


def text(scalar: Any) -> str:
    """Text; bytes that are not UTF-8 become lone surrogates, which `is_text` refuses."""
    return content(scalar).decode(errors="surrogateescape")


def plain(scalar: Any) -> Any:
    """A Python value that can be compared with numbers and text of an expression."""
    import pyarrow as pa

    if str(scalar.type) in TEXT | BINARY:
        return text(scalar)
    return float(scalar.as_py()) if pa.types.is_decimal(scalar.type) else scalar.as_py()


class Rows:
    """The rows of a file by number, read in batches of a row group.

    A batch has at most BATCH_ROWS rows and about BATCH_BYTES of the columns, so large row groups
    are not held whole. Batches are read in order, and the next row is usually in the same batch; an
    earlier row starts its row group again. Which rows are lost to damage does not depend on the
    order of reading.
    """

    def __init__(self, file: Any, columns: Sequence[Column]):
        self._file = file
        self._names = sorted({column.read for column in columns})
        self._ends = list(itertools.accumulate(row_counts(file)))
        self._failed: dict[int, tuple[int, str]] = {}  # row group -> first lost row, why
        self._group, self._first = -1, 0
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None

    def __getitem__(self, row: int) -> tuple[Any, int]:
        """The batch that holds the row, and the row's position there.

        Raises:
          RowGroupError: the row cannot be decoded.
          OSError, MemoryError: another attempt may not meet the error.
        """
        group = bisect.bisect_right(self._ends, row)
        lost, why = self._failed.get(group, (row + 1, ""))
        if row >= lost:
            raise RowGroupError(why)
        if group != self._group or row < self._first:
            self._start(group)
        while self._batch is None or row >= self._first + self._batch.num_rows:
            self._next()
        return self._batch, row - self._first

    def _start(self, group: int) -> None:
        self._group, self._batch = group, None
        self._first = self._ends[group - 1] if group else 0
        rows = self._batch_rows(group)
        self._batches = self._file.iter_batches(
            rows, row_groups=[group], columns=self._names, use_threads=False
        )

    def _next(self) -> None:
        """Decodes the next batch of the row group."""
        if self._batch is not None:
            self._first += self._batch.num_rows
        self._batch = None  # before the next one is made
        try:
            self._batch = next(self._batches)
        except Exception as error:  # Arrow raises those of its decoders, whatever the damage is
            group, self._group = self._group, -1
            raise_unless_of_the_file(error)
            is_short = isinstance(error, StopIteration)
            why = "it has fewer rows than its footer says" if is_short else first_line(error)
            self._failed[group] = (self._first, f"row group {group}: {why}")
            raise RowGroupError(self._failed[group][1]) from error

    def _batch_rows(self, group: int) -> int:
        """Rows in a batch.

        The size is that of all columns: to ask for one column's ends the process if its metadata
        are damaged (pyarrow 26).
        """
        metadata = self._file.metadata.row_group(group)
        size = max(metadata.total_byte_size, 1)
        return max(1, min(BATCH_ROWS, metadata.num_rows * BATCH_BYTES // size))
