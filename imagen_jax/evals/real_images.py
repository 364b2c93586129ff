"""The real images of an evaluation: a split of prepared data, or a folder of image files.

Images are upright, cut to the centre square and resized to one size by area average, as
`prepare_data` and training do.
"""

import concurrent.futures
import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from imagen_jax.data.prepare.checks import stored_bytes
from imagen_jax.data.prepare.upright import first_line, upright
from imagen_jax.data.records import Prepared
from imagen_jax.data.sources.walk import files_below
from imagen_jax.data.transforms import decode_square
from imagen_jax.run_log import Progress
from imagen_jax.storage import check_local

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
log = logging.getLogger(__name__)
ENLARGED = 0.05  # share of real images that may be enlarged; COCO has a few below 256 pixels
SHOWN = 3  # damaged files that a message names


@runtime_checkable
class RealImages(Protocol):
    """A list of images, read one by one.

    identity: JSON: where they come from, how many, how they are prepared, and a checksum that
    changes with the list.
    """

    identity: dict[str, Any]

    def __len__(self) -> int: ...

    def image(self, index: int) -> UInt8[np.ndarray, "s s 3"]: ...

    def check(self) -> None:
        """Raises ValueError, which names the first ones, if an image cannot be read."""
        ...

    def check_sizes(self) -> None:
        """Raises ValueError if many images would have to be enlarged, and warns of a few; reads no
        pixels.
        """
        ...


@dataclasses.dataclass(frozen=True)
class PreparedImages:
    """The images of splits of prepared data at `size` pixels, in the order of the rows."""

    prepared: Prepared
    splits: tuple[str, ...]
    size: int

    def __post_init__(self) -> None:
        self.prepared.check_image_size(self.size)
        object.__setattr__(self, "_stores", [self.prepared.images(split) for split in self.splits])

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": "prepared",
            "path": str(self.prepared.path),
            "splits": list(self.splits),
            "count": len(self),
            "sha256": self.prepared.hash,
            **_preparation(self.size),
        }

    def __len__(self) -> int:
        return sum(map(len, self._stores))

    def image(self, index: int) -> UInt8[np.ndarray, "s s 3"]:
        for store in self._stores:
            if index < len(store):
                return decode_square(store[index].image, self.size)
            index -= len(store)
        raise IndexError(index)

    def position(self, split: str, row: int) -> int:
        """The index of a row of a split."""
        before = self.splits[: self.splits.index(split)]
        return row + sum(self.prepared.num_images(name) for name in before)

    def check(self) -> None:
        """Does nothing: `prepare_data` has checked every image."""

    def check_sizes(self) -> None:
        """Does nothing: `Prepared.check_image_size` has checked them."""


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """The image files below a folder at `size` pixels, in the order of their names."""

    folder: Path
    size: int

    def __post_init__(self) -> None:
        check_local("--images", self.folder)
        if not self.folder.is_dir():
            raise ValueError(f"--images {self.folder} is not a directory; give a folder of images")
        names, _ = files_below(self.folder)
        names = [name for name in names if name.lower().endswith(SUFFIXES)]
        if not names:
            raise ValueError(f"--images {self.folder} has no image files ({', '.join(SUFFIXES)})")
        object.__setattr__(self, "_names", names)

    @property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name in self._names:
            stat = (self.folder / name).stat()
            digest.update(f"{name} {stat.st_size}\n".encode())
        return {
            "kind": "folder",
            "path": str(self.folder),
            "count": len(self),
            "sha256": digest.hexdigest(),  # of names and sizes
            **_preparation(self.size),
        }

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> UInt8[np.ndarray, "s s 3"]:
        data = (self.folder / self._names[index]).read_bytes()
        return decode_square(stored_bytes(data), self.size)

    def check(self) -> None:
        def problem(index: int) -> str:
            try:
                self.image(index)
            except Exception as error:  # PIL raises many kinds of exceptions for damaged files
                return f"{self._names[index]} ({first_line(error)})"
            return ""

        if found := self._problems(problem, "images checked"):
            raise ValueError(
                f"{len(found)} of {len(self)} images of {self.folder} cannot be used:"
                f" {_first(found)}; replace or remove them"
            )

    def check_sizes(self) -> None:
        def problem(index: int) -> str:
            width, height = _size_of(self.folder / self._names[index])
            small = min(width, height) < self.size
            return f"{self._names[index]} ({width:g}x{height:g})" if small else ""

        found = self._problems(problem, "image sizes checked")
        told = (
            f"{len(found)} of {len(self)} images of {self.folder} have a side below {self.size}"
            f" pixels, the size to compare at, e.g. {_first(found)}"
        )
        if len(found) > ENLARGED * len(self):
            raise ValueError(f"{told}: give fewer --stages, such as base,sr_1, or larger images")
        if found:
            log.warning("%s: they are enlarged", told)

    def _problems(self, problem: Callable[[int], str], label: str) -> list[str]:
        """The texts of problem(index) that are not empty, in order."""
        found = []
        with (
            concurrent.futures.ThreadPoolExecutor() as pool,
            Progress(label, len(self)) as progress,
        ):
            for i, text in enumerate(pool.map(problem, range(len(self)))):
                found += [text] * bool(text)
                progress.update(i + 1)
        return found


def _size_of(path: Path) -> tuple[float, float]:
    """Width and height of an image file; infinite for a damaged one, which `check` reports."""
    try:
        with Image.open(path) as opened:
            return opened.size
    except Exception:  # PIL refuses headers with much text, which `upright` reads
        try:
            return upright(path.read_bytes())[0].size
        except Exception:
            return math.inf, math.inf


def _first(found: Sequence[str]) -> str:
    """The first ones of a list, for a message."""
    return ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")


def _preparation(size: int) -> dict[str, Any]:
    return {"size": size, "crop": "centre square", "filter": "area average (PIL BOX)"}


class Images(Sequence):
    """A lazy sequence of the images [first, end)."""

    def __init__(self, images: RealImages, first: int, end: int):
        self._images, self._rows = images, range(first, min(end, len(images)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._images.image(row) for row in self._rows[index]]
        return self._images.image(self._rows[index])
