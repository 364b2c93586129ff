"""Files of lines that grow while a command runs; in a bucket, in numbered parts.

Objects of a bucket cannot be appended to. There, `metrics.jsonl` is the first part of a log, and
`metrics.jsonl.0001`, `metrics.jsonl.0002` ... follow when it has reached PART_BYTES. The newest
part is stored again with every `flush`.
"""

import contextlib
import io
import os
import re
from collections.abc import Callable

from imagen_jax import storage
from imagen_jax.object_storage import AnyPath, bucket_errors, in_bucket
from imagen_jax.storage import entry_names, write_atomically

PART_BYTES = 2**20
STORE_S = 30.0  # after which the owner of a log in a bucket should store new lines


class LineLog:
    """Appends lines to a log.

    On a local file system every line is passed to the operating system at once, whole or not at
    all. In a bucket, lines are kept until `flush`.
    """

    def __init__(self, path: AnyPath):
        """Continues the log at `path`, or starts it."""
        self._path, self._file = path, None
        self._last = 0  # where the last line begins
        if not in_bucket(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            return
        newest = newest_part(path)
        self._part = int(newest.name.removeprefix(path.name).removeprefix(".") or 0)
        self._content = b"".join(_lines(newest))
        self._stored = self._content

    def append(self, line: str) -> None:
        """Appends a line, given without its line feed."""
        if self._file:
            self._last = self._file.seek(0, os.SEEK_END)
            try:
                _write(self._file, line.encode() + b"\n")
            except OSError:  # a full disk has perhaps taken a part
                with contextlib.suppress(OSError):
                    self._file.truncate(self._last)
                raise
            return
        if len(self._content) >= PART_BYTES:
            self.flush()
            self._part, self._content, self._stored = self._part + 1, b"", b""
        self._last = len(self._content)
        self._content += line.encode() + b"\n"

    def replace(self, line: str) -> None:
        """Replaces the line that this object has appended last.

        A shorter line is followed by spaces. After a kill, the log has one of the two lines.
        """
        if not self._file:
            self._content = self._content[: self._last] + line.encode() + b"\n"
            return
        length = self._file.seek(0, os.SEEK_END) - self._last
        with self._path.open("r+b", buffering=0) as file:
            file.seek(self._last)
            _write(file, line.encode().ljust(length - 1) + b"\n")

    def flush(self) -> None:
        """Stores all lines. Raises OSError if a bucket does not answer; the lines are kept."""
        if not self._file and self._content != self._stored:
            content = self._content
            write_atomically(self._path.with_name(_part_name(self._path, self._part)), content)
            self._stored = content

    def close(self) -> None:
        """Stores all lines, on a local file system on the disk, and closes the log."""
        if self._file:
            os.fsync(self._file.fileno())
            self._file.close()
        else:
            self.flush()


def _write(file: io.RawIOBase, content: bytes) -> None:
    while content:
        content = content[file.write(content) :]


def read_lines(path: AnyPath) -> list[bytes]:
    """All lines of a log with their line feeds; [] if it does not exist."""
    if not in_bucket(path):
        return _lines(path)
    return [line for name in _part_names(path) for line in _lines(path.with_name(name))]


def newest_part(path: AnyPath) -> AnyPath:
    """The file of a log that grows; it may not exist."""
    names = _part_names(path) if in_bucket(path) else []
    return path.with_name(names[-1]) if names else path


def last_bytes(path: AnyPath, most: int) -> bytes:
    """The last bytes of a log; b"" if it does not exist."""
    if not in_bucket(path):
        if not path.exists():
            return b""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read()
    content = b""
    for name in reversed(_part_names(path)):
        content = b"".join(_lines(path.with_name(name))) + content
        if len(content) >= most:
            break
    return content[-most:]


def keep_lines(path: AnyPath, keep: Callable[[bytes], bool]) -> list[bytes]:
    """Removes lines from a log, and completes the last one. Returns the removed lines.

    A kill in between leaves a log without some of the lines to remove.
    """
    removed = []
    names = _part_names(path) if in_bucket(path) else [path.name]
    for name in reversed(names):
        part = path.with_name(name)
        lines = _lines(part)
        kept = [line for line in lines if keep(line)]
        if len(kept) == len(lines) and all(line.endswith(b"\n") for line in lines):
            continue
        removed = [line for line in lines if not keep(line)] + removed
        if kept or name == path.name:
            ended = (line if line.endswith(b"\n") else line + b"\n" for line in kept)
            write_atomically(part, b"".join(ended))
        else:
            storage.remove(part)
    return removed


def remove(path: AnyPath) -> None:
    """Deletes a log, the newest part first; nothing if it does not exist."""
    for name in reversed(_part_names(path) if in_bucket(path) else [path.name]):
        storage.remove(path.with_name(name))


def _part_name(path: AnyPath, part: int) -> str:
    return f"{path.name}.{part:04d}" if part else path.name


def _part_names(path: AnyPath) -> list[str]:
    """The parts of a log in a bucket, in order."""
    parts = re.compile(rf"{re.escape(path.name)}(?:\.(\d+))?")
    found = [match for name in entry_names(path.parent) if (match := parts.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda match: int(match[1] or 0))]


def _lines(path: AnyPath) -> list[bytes]:
    try:
        with bucket_errors(path):
            return path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
