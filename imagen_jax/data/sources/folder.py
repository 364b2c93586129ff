"""A folder of images with their captions in one of three forms."""

import argparse
import csv
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from imagen_jax.data.sources.source import SourceItem, hashed_split

USAGE = "folder:DIR (with captions.jsonl, captions.csv or .txt files)"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def open_source(name: str, args: argparse.Namespace) -> "FolderSource":
    """The folder `name`."""
    return FolderSource(name, args.heldout)


class FolderSource:
    """Images under a directory with their captions in one of three forms.

    captions.jsonl: one object a line, {"file": "a.png", "caption": "..."} or {"file": ...,
    "captions": [...]}, optionally "split": "train" or "heldout"; captions.csv: columns file,
    caption and optionally split; otherwise a.txt beside a.png, one caption a line. A file may come
    on several lines. Every image in the directory and every file named is an item, so that images
    without captions and captions without images are reported by prepare_data.
    """

    def __init__(self, directory: str | Path, heldout: float):
        self._directory, self._heldout = Path(directory), heldout
        if not self._directory.is_dir():
            raise ValueError(f"{self._directory} is not a directory of images")
        listed = list(self._listed())
        captions: dict[str, list[str]] = {}
        splits: dict[str, str] = {}
        for file, texts, split in listed:
            captions.setdefault(file, []).extend(texts)
            if split and splits.setdefault(file, split) != split:
                raise ValueError(f"{self._directory}: {file} is in both splits")
        if splits and heldout:
            raise ValueError(
                f"{self._directory}: the captions file names its own splits, leave --heldout at 0"
            )
        for path in sorted(self._directory.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                captions.setdefault(path.relative_to(self._directory).as_posix(), [])
        if not captions:
            raise ValueError(
                f"{self._directory} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no captions"
                " file"
            )
        self._items = [
            (file, texts, splits.get(file) or hashed_split(file, heldout))
            for file, texts in sorted(captions.items())
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> SourceItem:
        file, captions, split = self._items[index]
        path = self._directory / file
        return SourceItem(file, path.read_bytes() if path.is_file() else None, captions, split)

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

    def _listed(self) -> Iterable[tuple[str, list[str], str]]:
        """(file, captions, split or "") from the captions file, or from the .txt files beside the
        images.
        """
        jsonl, table = self._directory / "captions.jsonl", self._directory / "captions.csv"
        if jsonl.is_file() and table.is_file():
            raise ValueError(
                f"{self._directory} has both captions.jsonl and captions.csv: keep one"
            )
        if jsonl.is_file():
            return _read_jsonl(jsonl)
        if table.is_file():
            return _read_csv(table)
        return self._sidecars()

    def _sidecars(self) -> Iterable[tuple[str, list[str], str]]:
        for path in sorted(self._directory.rglob("*")):
            text = path.with_suffix(".txt")
            if path.suffix.lower() in IMAGE_SUFFIXES and text.is_file():
                yield (
                    path.relative_to(self._directory).as_posix(),
                    text.read_text("utf-8").splitlines(),
                    "",
                )


def _read_jsonl(path: Path) -> Iterable[tuple[str, list[str], str]]:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            captions = (
                row["captions"] if "captions" in row else [row["caption"] or ""]
            )  # null: reported as empty
            yield _listing(row["file"], captions, row.get("split") or "")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}:{number} is not an object with file and caption(s): {error}"
            ) from error


def _read_csv(path: Path) -> Iterable[tuple[str, list[str], str]]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"file", "caption"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: the first line must name the columns file and caption")
        for row in reader:
            try:
                yield _listing(row["file"], [row["caption"]], row.get("split") or "")
            except ValueError as error:
                raise ValueError(f"{path}:{reader.line_num}: {error}") from error


def _listing(file: Any, captions: Any, split: str) -> tuple[str, list[str], str]:
    if (
        not isinstance(file, str)
        or not isinstance(captions, list)
        or not all(isinstance(c, str) for c in captions)
    ):
        raise ValueError("file and captions must be text")
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"{file} is not in the directory of the captions file")
    if split not in ("", "train", "heldout"):
        raise ValueError(f"split {split!r} is neither train nor heldout")
    return file, captions, split
