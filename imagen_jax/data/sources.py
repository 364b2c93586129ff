"""Where captioned images come from: a folder, a TFDS dataset, or the set that ships with the package.

A source has a length, gives a `SourceItem` for every position, describes itself (`describe`, which is part of the prepared
data's identity and names no path), and can be sent to another process.
"""

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class SourceItem:
    """One image as the source has it: id, encoded bytes (None if the file is missing), captions, train or heldout."""

    id: str
    image: bytes | None
    captions: list[str]
    split: str


@runtime_checkable
class Source(Protocol):
    """What prepare_data needs of a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SourceItem: ...

    def describe(self) -> dict[str, Any]: ...


def hashed_split(item_id: str, heldout: float) -> str:
    """`heldout` for that fraction of all ids, the same ids on every machine and in every order, else `train`."""
    place = int.from_bytes(hashlib.sha256(item_id.encode()).digest()[:8], "big") / 2**64
    return "heldout" if place < heldout else "train"


def open_source(
    spec: str, heldout: float, *, tfds_dir: str | None, tfds_split: str, tfds_image: str, tfds_caption: str
) -> Source:
    """`emoji`, `folder:DIR` or `tfds:NAME` (or `tfds:DIR` of a TFDS builder) -> the source; ValueError if it is none."""
    kind, _, name = spec.partition(":")
    if spec == "emoji":
        if heldout:
            raise ValueError("the emoji have their own held-out compositions: leave --heldout at 0")
        from imagen_jax.data.embedded import EmbeddedSource

        return EmbeddedSource()
    if kind == "folder" and name:
        return FolderSource(name, heldout)
    if kind == "tfds" and name:
        return TfdsSource(name, tfds_dir, tfds_split, tfds_image, tfds_caption, heldout)
    raise ValueError(f"--source {spec!r} is not emoji, folder:DIR or tfds:NAME")


class FolderSource:
    """Images under a directory with their captions in one of three forms.

    captions.jsonl: one object a line, {"file": "a.png", "caption": "..."} or {"file": ..., "captions": [...]}, optionally
    "split": "train" or "heldout"; captions.csv: columns file, caption and optionally split; otherwise a.txt beside a.png,
    one caption a line. A file may come on several lines. Every image in the directory and every file named is an item, so
    that images without captions and captions without images are reported by prepare_data.
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
            raise ValueError(f"{self._directory}: the captions file names its own splits, leave --heldout at 0")
        for path in sorted(self._directory.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                captions.setdefault(path.relative_to(self._directory).as_posix(), [])
        if not captions:
            raise ValueError(f"{self._directory} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no captions file")
        self._items = [
            (file, texts, splits.get(file) or hashed_split(file, heldout)) for file, texts in sorted(captions.items())
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
        return {"kind": "folder", "name": name, "items": len(self), "heldout": self._heldout, "listing_sha256": listing}

    def _listed(self) -> Iterable[tuple[str, list[str], str]]:
        """(file, captions, split or "") from the captions file, or from the .txt files beside the images."""
        jsonl, table = self._directory / "captions.jsonl", self._directory / "captions.csv"
        if jsonl.is_file() and table.is_file():
            raise ValueError(f"{self._directory} has both captions.jsonl and captions.csv: keep one")
        if jsonl.is_file():
            return _read_jsonl(jsonl)
        if table.is_file():
            return _read_csv(table)
        return self._sidecars()

    def _sidecars(self) -> Iterable[tuple[str, list[str], str]]:
        for path in sorted(self._directory.rglob("*")):
            text = path.with_suffix(".txt")
            if path.suffix.lower() in IMAGE_SUFFIXES and text.is_file():
                yield path.relative_to(self._directory).as_posix(), text.read_text("utf-8").splitlines(), ""


def _read_jsonl(path: Path) -> Iterable[tuple[str, list[str], str]]:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            captions = row["captions"] if "captions" in row else [row["caption"] or ""]  # null: reported as empty
            yield _listing(row["file"], captions, row.get("split") or "")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number} is not an object with file and caption(s): {error}") from error


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
    if not isinstance(file, str) or not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise ValueError("file and captions must be text")
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"{file} is not in the directory of the captions file")
    if split not in ("", "train", "heldout"):
        raise ValueError(f"split {split!r} is neither train nor heldout")
    return file, captions, split


class TfdsSource:
    """A split of a TFDS dataset that is already on disk in ArrayRecord format; images are taken as stored, not decoded.

    `caption` may be a path such as captions/text; a sequence gives several captions.
    """

    def __init__(self, name: str, data_dir: str | None, split: str, image: str, caption: str, heldout: float):
        import tensorflow_datasets as tfds

        is_directory = (Path(name) / "dataset_info.json").is_file()
        try:
            options = {"data_dir": data_dir, "file_format": "array_record"}
            builder = tfds.builder_from_directory(name) if is_directory else tfds.builder(name, **options)
        except (tfds.core.DatasetNotFoundError, ModuleNotFoundError) as error:
            cause = str(error).splitlines()[0]
            raise ValueError(f"tfds:{name} is not a TFDS dataset or a directory of one ({cause})") from error
        if split not in builder.info.splits:
            found = ", ".join(builder.info.splits) or "none: download_and_prepare it first, file_format='array_record'"
            raise ValueError(f"tfds:{name} has no split {split!r} on disk (found {found})")
        for feature in (image, caption):
            _check_feature(f"tfds:{name}", builder.info.features, feature)
        try:
            self._rows = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise ValueError(f"tfds:{name} is not in the array_record format, which random access needs") from error
        self._name = f"{builder.info.name}/{builder.info.version}"
        self._split, self._image, self._caption, self._heldout = split, image, caption, heldout

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> SourceItem:
        row = self._rows[index]
        item_id = f"{self._split}-{index:09d}"
        captions = row
        for key in self._caption.split("/"):
            captions = captions[key]
        captions = [captions] if isinstance(captions, bytes | str) else list(captions)
        texts = [text.decode() if isinstance(text, bytes) else str(text) for text in captions]
        return SourceItem(item_id, row[self._image], texts, hashed_split(item_id, self._heldout))

    def describe(self) -> dict[str, Any]:
        features = {"image": self._image, "caption": self._caption}
        options = {"split": self._split, "heldout": self._heldout}
        return {"kind": "tfds", "name": self._name, "items": len(self)} | features | options


def _check_feature(label: str, features: Any, path: str) -> None:
    inside = features
    for key in path.split("/"):
        inside = getattr(inside, "feature", inside)  # a Sequence holds the features of its items
        if not hasattr(inside, "keys") or key not in inside.keys():
            raise ValueError(f"{label} has no feature {path!r} (it has {', '.join(features)})")
        inside = inside[key]
