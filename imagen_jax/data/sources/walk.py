"""Lists the files below a directory, symbolic links to directories included.

Every directory is read once, so a cycle of links ends. A directory inside the tree keeps its own
name even if a link to it comes first. What cannot be read is noted.
"""

import os
import posixpath
import unicodedata
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any

from imagen_jax.caption_text import is_text
from imagen_jax.storage import is_away

Note = dict[str, Any]  # a line of skipped.jsonl: id, reason and details


def files_below(root: Path, excluded: Collection[str] = ()) -> tuple[list[str], list[Note]]:
    """Returns the files below `root` as sorted relative paths, and notes on what was not read.

    excluded: real paths of directories to leave out without a note.

    Raises:
      ValueError: `root` itself cannot be read.
      OSError: the file system did not answer.
    """
    return _Walk(root, excluded).run()


class _Walk:
    """The state of one walk: `links` are the linked directories still to follow."""

    def __init__(self, root: Path, excluded: Collection[str]):
        self._root, self._excluded = root, excluded
        self._seen: set[str] = set()
        self._links = deque([str(root)])
        self._files: list[str] = []
        self._notes: list[Note] = []

    def run(self) -> tuple[list[str], list[Note]]:
        while self._links:
            self._follow(self._links.popleft())
        return sorted(self._files), self._notes

    def _follow(self, start: str) -> None:
        for folder, subfolders, files in os.walk(start, onerror=self._unreadable):
            if not self._enter(folder):
                subfolders.clear()
                continue
            subfolders.sort()
            paths = (os.path.join(folder, name) for name in subfolders)
            self._links += [path for path in paths if os.path.islink(path)]
            for name in sorted(files):
                self._add(os.path.join(folder, name))

    def _enter(self, folder: str) -> bool:
        """Whether this directory is to be read; False if it was read under another name."""
        real = os.path.realpath(folder)
        if real in self._excluded:
            return False
        if real in self._seen:
            other = os.path.relpath(real, os.path.realpath(self._root))
            self._note(folder, "linked_folder_again", f"read as {other}")
            return False
        self._seen.add(real)
        return True

    def _add(self, path: str) -> None:
        relative = self._relative(path)
        if not is_text(relative):
            self._note(path, "invalid_file_name", "the name is not UTF-8")
        elif os.path.islink(path) and not os.path.exists(path):
            self._note(path, "broken_link", os.readlink(path))
        else:
            self._files.append(relative)

    def _unreadable(self, error: OSError) -> None:
        if is_away(error):
            raise error
        if error.filename == str(self._root):
            raise ValueError(f"{self._root} cannot be read: {error.strerror}") from error
        self._note(error.filename, "unreadable_folder", error.strerror)

    def _relative(self, path: str) -> str:
        return Path(path).relative_to(self._root).as_posix()

    def _note(self, path: str, reason: str, detail: str) -> None:
        name, detail = (escaped(text) for text in (self._relative(path), detail))
        self._notes.append({"id": name, "reason": reason, "detail": detail})


def escaped(text: str) -> str:
    """Bytes of a file name that are not UTF-8 as "\\udce9"."""
    return text.encode(errors="backslashreplace").decode()


def spelling(file: str) -> str:
    """One spelling for ./a.png, for sub\\a.png of Windows and for the split accents of macOS."""
    return unicodedata.normalize("NFC", posixpath.normpath(file.replace("\\", "/")))
