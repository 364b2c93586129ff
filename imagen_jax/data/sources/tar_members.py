"""Finds the members of a tar file, of a damaged one too, without reading their content.

The `tarfile` module parses each header. Its own iteration ends without an error at the first
damaged header, so the walk over the headers is here: it reports damage and continues at the next
header. It also continues after an end mark, as `tar --ignore-zeros` does, for tars that were joined
with `cat`.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from imagen_jax.data.sources.source import Fault

TRUNCATED, DAMAGED, UNREADABLE = "truncated_shard", "damaged_shard", "unreadable_shard"
_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_CHUNK = 2**20  # bytes of one read while searching for a header
_MAGIC, _MAGIC_AT = b"ustar", 257
_EXTENDED = (b"x", b"X", b"L", b"K", b"g")  # types of headers that describe other headers
_MAX_EXTENDED = 2**20  # bytes of an extended header; longer ones are damage
_KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.GNUTYPE_SPARSE: "sparse file",
    tarfile.DIRTYPE: "directory",
    tarfile.LNKTYPE: "link",
    tarfile.SYMTYPE: "link",
    tarfile.CHRTYPE: "special file",
    tarfile.BLKTYPE: "special file",
    tarfile.FIFOTYPE: "special file",
}
_EMPTY = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)  # and directories and links
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
}


class Member(NamedTuple):
    """One member. offset, size: where its content is, in bytes. kind: "file" if it has content."""

    name: str
    offset: int
    size: int
    kind: str


def read_members(file: BinaryIO) -> tuple[list[Member], list[Fault]]:
    """Returns the complete members in their order, and what is wrong with the tar."""
    file.seek(0)
    start = file.read(_BLOCK)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            return [], [Fault(UNREADABLE, f"is compressed with {name}: decompress it first")]
    walk = _Walk(file)
    members = list(walk)
    if not walk.headers and walk.faults:
        return [], [Fault(UNREADABLE, "is not a tar file: download it again or change the pattern")]
    return members, walk.faults


class _Header(NamedTuple):
    """The fields of a header that matter here."""

    name: str
    size: int
    type: bytes


class _Extended(NamedTuple):
    """What extended headers say of the member after them. damaged: its name is unknown."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False
    damaged: bool = False


class _Walk:
    """The walk over the headers of one tar. headers: their number. faults: damage so far."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._end = file.seek(0, os.SEEK_END)
        self._at = 0
        self._extended = _Extended()
        self.headers, self.faults = 0, []

    def __iter__(self) -> Iterator[Member]:
        ended = False
        while self._at < self._end:
            block = self._read(self._at, _BLOCK)
            if block == _ZEROS[: len(block)]:
                ended = True
                self._skip_zeros()
            elif len(block) < _BLOCK:
                self._cut("the last header is incomplete")
                return
            else:
                ended = False
                if member := self._member(block):
                    yield member
        if self.headers and not ended and not self.faults:
            self._cut("the end mark is missing: the last members may be missing too")

    def _member(self, block: bytes) -> Member | None:
        """Reads the header `block` and moves to the next one. None if it is no member."""
        header = _parse(block)
        if header is None:
            self._find_header()
            return None
        self.headers += 1
        start = self._at + _BLOCK
        if header.type in _EXTENDED:
            self._at = start + _padded(header.size)
            self._read_extended(header, start)
            return None
        extended, self._extended = self._extended, _Extended()
        if header.type == tarfile.GNUTYPE_SPARSE:
            start += self._sparse_blocks(block, start)
        name = header.name if extended.name is None else extended.name
        kind = "sparse file" if extended.sparse else _KINDS.get(header.type, "special file")
        has_content = kind.endswith("file") and header.type not in _EMPTY
        size = (header.size if extended.size is None else extended.size) if has_content else 0
        self._at = start + _padded(size)
        if start + size > self._end:
            self._cut(f"{name} has {max(self._end - start, 0):,} of its {size:,} bytes")
            return None
        return None if extended.damaged else Member(name, start, size, kind)

    def _read_extended(self, header: _Header, start: int) -> None:
        """Reads an extended header: records of PAX, or a long name of GNU tar."""
        if start + header.size > self._end:
            self._cut("the last header is incomplete")
            return
        if header.type in (b"K", b"g"):  # targets of links, and records about the whole tar
            return
        try:
            if header.size > _MAX_EXTENDED:
                raise ValueError(f"it has {header.size:,} bytes")
            data = self._read(start, header.size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
                self._extended = self._extended._replace(name=name)
            else:
                self._extended = _parse_records(data, self._extended)
        except ValueError as error:
            self._extended = _Extended(damaged=True)
            detail = f"invalid extended header at byte {start - _BLOCK:,}: {error}"
            self.faults.append(Fault(DAMAGED, f"{detail}; its member is not read"))

    def _sparse_blocks(self, block: bytes, start: int) -> int:
        """Bytes of the blocks that continue the list of parts of a GNU sparse file."""
        size, more = 0, block[482]
        while more and start + size < self._end:
            following = self._read(start + size, _BLOCK)
            more = following[504] if len(following) == _BLOCK else 0
            size += _BLOCK
        return size

    def _find_header(self) -> None:
        """Moves to the next header after a damaged one, or to the end."""
        damaged, self._extended = self._at, _Extended()
        self._at = next(self._headers_after(damaged), self._end)
        found = f"continued at byte {self._at:,}" if self._at < self._end else "no more after it"
        self.faults.append(Fault(DAMAGED, f"invalid header at byte {damaged:,}, {found}"))

    def _headers_after(self, start: int) -> Iterator[int]:
        for chunk_at in range(start + _BLOCK, self._end, _CHUNK):
            chunk = self._read(chunk_at, _CHUNK)
            found = chunk.find(_MAGIC)
            while found >= 0:
                at = found - _MAGIC_AT
                if at >= 0 and at % _BLOCK == 0 and _parse(chunk[at : at + _BLOCK]):
                    yield chunk_at + at
                found = chunk.find(_MAGIC, found + 1)

    def _skip_zeros(self) -> None:
        """Moves over blocks of zeros."""
        while self._at < self._end:
            chunk = self._read(self._at, _CHUNK)
            zeros = len(chunk) - len(chunk.lstrip(b"\0"))
            self._at += zeros - zeros % _BLOCK if zeros < len(chunk) else zeros
            if zeros < len(chunk):
                return

    def _cut(self, detail: str) -> None:
        self._at = self._end
        self.faults.append(Fault(TRUNCATED, detail))

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _parse(block: bytes) -> _Header | None:
    """Parses a header. None if it is none."""
    if header := _parse_plain(block):
        return header
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return _Header(header.name, header.size, header.type) if header.size >= 0 else None


def _parse_plain(block: bytes) -> _Header | None:
    """Parses the header of a file with a short name, or of PAX records; None for all others.

    It is four times as fast as TarInfo.frombuf, which matters for millions of members.
    """
    kind = block[156:157]
    if kind not in (tarfile.REGTYPE, tarfile.XHDTYPE) or block[345:346] != b"\0":
        return None
    checksum, size = block[148:156].strip(b"\0 "), block[124:136].strip(b"\0 ")
    if not (checksum.isdigit() and size.isdigit()):
        return None
    try:
        if int(checksum, 8) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            return None
        name = block[: block.index(b"\0")] if b"\0" in block[:100] else block[:100]
        return _Header(name.decode("utf-8", "surrogateescape"), int(size, 8), kind)
    except ValueError:  # digits that are not octal
        return None


def _parse_records(data: bytes, extended: _Extended) -> _Extended:
    """Reads PAX records, "LENGTH KEY=VALUE" and a line feed. Raises ValueError for others."""
    at = 0
    while at < len(data) and data[at]:
        length_text = data[at : data.find(b" ", at)]
        length = int(length_text)
        record = data[at + len(length_text) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if length < 5 or at + length > len(data) or not equals or value[-1:] != b"\n":
            raise ValueError(f"invalid record {record[:20]!r}")
        if key == b"path":
            extended = extended._replace(name=value[:-1].decode("utf-8", "surrogateescape"))
        elif key == b"size":
            extended = extended._replace(size=_size(value[:-1]))
        elif key.startswith(b"GNU.sparse."):
            extended = extended._replace(sparse=True)
        at += length
    return extended


def _size(value: bytes) -> int:
    size = int(value)
    if size < 0:
        raise ValueError(f"invalid size {size}")
    return size
