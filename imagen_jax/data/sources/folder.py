"""A folder of images with their captions in one of four forms."""

import errno
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from absl import flags

from imagen_jax.caption_text import lines, read_text
from imagen_jax.data.sources import coco
from imagen_jax.data.sources.listing import Listed, read_csv, read_jsonl
from imagen_jax.data.sources.source import Fault, SourceItem, hashed_split
from imagen_jax.data.sources.walk import Note, files_below, spelling
from imagen_jax.object_storage import SCHEME, AnyPath, bucket_errors
from imagen_jax.storage import check_local, is_away

USAGE = "folder:DIR (with captions.jsonl, captions.csv, captions_*.json or .txt files)"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# macOS stores a file's attributes beside it under this prefix where a disk has no room for them.
_APPLE_DOUBLE = "._"
_ANNOTATIONS = "captions_*.json"
_KINDS = 50  # kinds of ignored files with a note of their own
# Failures of the machine, not of the file that was opened.
_OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def open_source(name: str, args: flags.FlagValues) -> "FolderSource":
    """Opens the folder `name`. An output inside it is not a part of the source."""
    output = getattr(args, "output", None)
    return FolderSource(name, args.heldout, Path(output) if output else None)


class FolderSource:
    """Images below a directory, with their captions in one of four forms.

    captions.jsonl: one object a line, {"file": "a.png", "caption": "..."} or {"file": ...,
    "captions": [...]}, optionally "split": "train" or "heldout". captions.csv: columns file,
    caption and optionally split. captions_*.json: an annotation file of COCO. Otherwise a.txt next
    to a.png, one caption a line. A file may have several rows.

    Every image below the directory is an item, and so is every file that has a row. So
    prepare_data reports images without captions and captions without images. Links to directories
    are followed. `notes` lists the files and folders that were not read.
    """

    def __init__(self, directory: str | Path, heldout: float, output: Path | None = None):
        check_local("the source", directory)
        self._directory, self._heldout = Path(directory), heldout
        if not self._directory.is_dir():
            raise ValueError(f"{self._directory} is not a directory of images")
        files, self._notes = files_below(self._directory, _work_of(output))
        images = [file for file in files if _is_image(file)]
        self._faults: dict[str, Fault] = {}
        used = set(images)
        captions, splits = self._read(images, set(files), used)
        for file in images:
            captions.setdefault(file, [])
        self._notes += _ignored(f for f in files if f not in used and f not in captions)
        if not captions:
            raise ValueError(self._empty())
        self._items = [
            (file, texts, splits.get(file) or hashed_split(file, heldout))
            for file, texts in sorted(captions.items())
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> SourceItem:
        file, captions, split = self._items[index]
        fault = self._faults.get(file)
        if fault and fault.reason == "missing_image":  # its name may lead out of the folder
            return SourceItem(file, None, captions, split, fault)
        image, unreadable = read_image(self._directory / file)
        return SourceItem(file, image, captions, split, unreadable or fault)

    def describe(self) -> dict[str, Any]:
        listing = hashlib.sha256(json.dumps(self._items).encode()).hexdigest()
        name = self._directory.resolve().name
        return {
            "kind": "folder",
            "name": name,
            "items": len(self),
            "heldout": self._heldout,
            "listing_sha256": listing,
        }

    def notes(self) -> list[Note]:
        return list(self._notes)

    def _read(
        self, images: Sequence[str], files: set[str], used: set[str]
    ) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Returns {file: captions} and {file: split}; adds the files it reads to `used`."""
        captions: dict[str, list[str]] = {}
        splits: dict[str, str] = {}
        spellings: dict[str, str] = {}  # made when a row names no file
        for file, texts, split in self._listed(images, files, used):
            if file not in files:
                spellings = spellings or {spelling(name): name for name in files}
                file = spellings.get(spelling(file), file)
            captions.setdefault(file, []).extend(texts)
            if split and splits.setdefault(file, split) != split:
                raise ValueError(f"{self._directory}: {file} is in both splits")
        if splits and self._heldout:
            raise ValueError(
                f"{self._directory}: the captions file names its own splits, leave --heldout at 0"
            )
        return captions, splits

    def _listed(self, images: Sequence[str], files: set[str], used: set[str]) -> Iterable[Listed]:
        """Rows of the captions file; without one, of the .txt files next to the images."""
        readers = {"captions.jsonl": read_jsonl, "captions.csv": partial(read_csv, files=files)}
        annotations = sorted(fnmatch.filter((f for f in files if "/" not in f), _ANNOTATIONS))
        readers |= dict.fromkeys(annotations, partial(self._annotated, images, files))
        tables = [name for name in readers if name in files]
        if len(tables) > 1:
            raise ValueError(
                f"{self._directory} has several captions files ({', '.join(tables)}): keep one"
            )
        used.update(tables)
        for name in tables:
            path = self._directory / name
            _check_regular(path)
            return readers[name](path, self._notes)
        return self._sidecars(images, files, used)

    def _annotated(
        self, images: Sequence[str], files: set[str], path: Path, notes: list[Note]
    ) -> list[Listed]:
        rows, absent = coco.read_listed(path, files, images, notes)
        self._faults |= {file: Fault("missing_image", why) for file, why in absent.items()}
        return rows

    def _sidecars(self, images: Sequence[str], files: set[str], used: set[str]) -> Iterator[Listed]:
        for file in images:
            names = (PurePosixPath(file).with_suffix(s).as_posix() for s in (".txt", ".TXT"))
            text = next((name for name in names if name in files), None)
            if text:
                used.add(text)
                yield file, self._captions(file, text), ""

    def _captions(self, file: str, text: str) -> list[str]:
        try:
            _check_regular(self._directory / text)
            return list(lines(read_text(self._directory / text)))
        except (ValueError, OSError) as error:
            raise_unless_of_the_file(error)
            cause = getattr(error, "strerror", None)
            detail = f"{text}: {cause}" if cause else str(error)
            self._faults[file] = Fault(
                "unreadable_captions", detail.replace(f"{self._directory}/", "")
            )
            return []

    def _empty(self) -> str:
        ignored = ", ".join(f"{note['id']} {note['reason']}" for note in self._notes[:10])
        return (
            f"{self._directory} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no captions file"
            + (f"; not read: {ignored}" if ignored else "")
        )


def _work_of(output: Path | None) -> set[str]:
    """Real paths of the output and of the directory in which it is made."""
    if output is None:
        return set()
    output = output.resolve()
    return {str(output), f"{output}.partial"}


def _is_image(file: str) -> bool:
    path = PurePosixPath(file)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(_APPLE_DOUBLE)


def _ignored(files: Iterable[str]) -> list[Note]:
    """One note for each kind of file that is not looked at: its suffix, their number, examples."""
    kinds: dict[str, Note] = {}
    for file in files:
        path = PurePosixPath(file)
        kind = f"{_APPLE_DOUBLE}*" if path.name.startswith(_APPLE_DOUBLE) else f"*{path.suffix}"
        if kind not in kinds and len(kinds) >= _KINDS:
            kind = "other files"
        empty = {"id": kind, "reason": "ignored_file", "count": 0, "files": []}
        note = kinds.setdefault(kind, empty)
        note["count"] += 1
        if len(note["files"]) < 3:
            note["files"].append(file)
    return list(kinds.values())


def _check_regular(path: Path) -> None:
    """Opening a named pipe would wait for a writer, forever if there is none."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a named pipe or a device, not a file")


def read_image(path: AnyPath) -> tuple[bytes | None, Fault | None]:
    """A file's content, None if there is no such file; and why it cannot be read."""
    try:
        with bucket_errors(path):
            return (path.read_bytes() if path.is_file() else None), None
    except FileNotFoundError:
        return None, None
    except OSError as error:
        raise_unless_of_the_file(error)
        return None, Fault("unreadable_image", error.strerror or str(error))


def raise_unless_of_the_file(error: Exception) -> None:
    """Raises an error that the next file would meet too: trying again may help.

    An object of a bucket that was found and then cannot be read is such an error.
    """
    number = getattr(error, "errno", None)
    of_bucket = str(getattr(error, "filename", None)).startswith(f"{SCHEME}://")
    if is_away(error) or of_bucket or isinstance(error, MemoryError) or number in _OF_THE_MACHINE:
        raise error
