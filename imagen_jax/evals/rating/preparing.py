"""Checks the pictures of a study, and writes them under neutral names.

Pictures are decoded and encoded again as PNG: names, metadata, formats and dates of the original
files are lost.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from imagen_jax import pictures
from imagen_jax.data.prepare.upright import upright
from imagen_jax.evals.rating.design import Item, PictureSet, Run, Settings
from imagen_jax.evals.rating.system_pictures import SystemPictures, first_values
from imagen_jax.run_log import Progress

DATE = 946684800  # of all files of a study: 2000-01-01
TILES = 4  # a scrambled picture is cut into TILES x TILES parts
THREADS = 4
Shapes = dict[tuple[int, int], None]  # distinct (height, width), in order


@dataclasses.dataclass(frozen=True)
class Checked:
    """The prompts whose pictures can be compared, and the others.

    items: the prompts that can. sizes: {prompt id: (height, width) of its pictures in the study}.
    left_out: {prompt id: reason}. originals: {system: {"WIDTHxHEIGHT" of files: prompts}}.
    """

    items: Sequence[Item]
    sizes: Mapping[int, tuple[int, int]]
    left_out: Mapping[int, str]
    originals: Mapping[str, Mapping[str, int]]

    def explain(self) -> str:
        """The first prompts that cannot be compared, with the reasons."""
        return first_values([f"{number} ({reason})" for number, reason in self.left_out.items()])


def check(
    items: Sequence[Item], systems: Sequence[SystemPictures], per_side: int, size: int
) -> Checked:
    """Decodes the pictures of all systems and compares their numbers and sizes by prompt.

    size: the height of all pictures in the study; 0: that of the files, which must then agree.
    """
    kept, sizes, left_out = [], {}, {}
    originals: dict[str, Counter[str]] = {system.name: Counter() for system in systems}

    def inspect(item: Item) -> list[Shapes] | str:
        try:
            return [_shapes(system, item.id, per_side) for system in systems]
        except (OSError, ValueError) as error:
            return str(error)

    with (
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        Progress("prompts checked", len(items)) as progress,
    ):
        for done, (item, shapes) in enumerate(zip(items, pool.map(inspect, items)), 1):
            reason = shapes if isinstance(shapes, str) else _difference(systems, shapes, size)
            if reason:
                left_out[item.id] = reason
            else:
                kept.append(item)
                sizes[item.id] = _resized(next(iter(shapes[0])), size)
                for system, found in zip(systems, shapes):
                    originals[system.name].update(f"{w}x{h}" for h, w in found)
            progress.update(done)
    return Checked(kept, sizes, left_out, {name: dict(c) for name, c in originals.items()})


def _shapes(system: SystemPictures, prompt: int, per_side: int) -> Shapes:
    """The sizes of a system's pictures of a prompt. Raises ValueError if some cannot be used."""
    files = system.files.get(prompt, ())
    if len(files) < per_side:
        raise ValueError(f"{system.name} has {len(files)} of {per_side} pictures")
    shapes = {}
    for path in files[:per_side]:
        try:
            shapes[read_picture(path, system.sha256.get(path)).shape[:2]] = None
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from error
    return shapes


def _resized(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Height and width after scaling to the height `size`; 0: unchanged."""
    height, width = shape
    return (size, max(1, round(width * size / height))) if size else shape


def _difference(systems: Sequence[SystemPictures], found: Sequence[Shapes], size: int) -> str:
    """The reason why pictures of these sizes cannot be compared; "" if they can."""
    if len({_resized(shape, size) for shapes in found for shape in shapes}) == 1:
        return ""
    sizes = [
        f"{system.name} has {' and '.join(f'{w}x{h}' for h, w in shapes)}"
        for system, shapes in zip(systems, found)
    ]
    remedy = "crop them to one aspect ratio" if size else "--size scales all to one height"
    return f"{', '.join(sizes)} ({remedy})"


def read_picture(path: Path, sha256: str | None = None) -> UInt8[np.ndarray, "_ _ 3"]:
    """A picture, upright and on white.

    sha256: the expected hash of the file; None: unknown.

    Raises ValueError for a damaged or changed file.
    """
    content = path.read_bytes()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("its SHA-256 is not the one in the manifest")
    return np.asarray(upright(content)[0])


def file_names(runs: Sequence[Run], settings: Settings) -> dict[str, list[str]]:
    """{name of a set: names of its picture files}, sorted by the name of the set."""
    sets = sorted({part.token for run in runs for trial in run.trials for part in trial.sets})
    return {
        token: [f"{settings.token('picture', token, k)}.png" for k in range(settings.per_side)]
        for token in sets
    }


def write(
    runs: Sequence[Run],
    systems: Sequence[SystemPictures],
    sizes: Mapping[int, tuple[int, int]],
    settings: Settings,
    directory: Path,
) -> None:
    """Writes all pictures of a study to `directory`.

    sizes: (height, width) by prompt, from `check`. Files are written in the order of their hashed
    names and get the same date, so that neither order nor date shows which system they are from.

    Raises ValueError if a picture changed since it was checked.
    """
    names = file_names(runs, settings)
    sets = {part.token: part for run in runs for trial in run.trials for part in trial.sets}
    by_name = {system.name: system for system in systems}
    tasks = sorted(
        (name, sets[token], index) for token in names for index, name in enumerate(names[token])
    )

    def make(task: tuple[str, PictureSet, int]) -> None:
        name, part, index = task
        system = by_name[part.system]
        path = system.files[part.prompt][index]
        image = resize(read_picture(path, system.sha256.get(path)), sizes[part.prompt])
        if part.scrambled:
            image = scramble(image, settings.token("tiles", part.token, index))
        pictures.write_png(directory / name, image)
        os.utime(directory / name, (DATE, DATE))

    with (
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        Progress("pictures written", len(tasks)) as progress,
    ):
        for done, _ in enumerate(pool.map(make, tasks), 1):
            progress.update(done)


def resize(image: UInt8[np.ndarray, "_ _ 3"], shape: tuple[int, int]) -> UInt8[np.ndarray, "_ _ 3"]:
    """Bicubic (Pillow: antialiased when it shrinks), the same for every system."""
    height, width = shape
    if image.shape[:2] == shape:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def scramble(image: UInt8[np.ndarray, "h w 3"], seed: str) -> UInt8[np.ndarray, "h w 3"]:
    """Exchanges the TILES x TILES parts of a picture. Rows and columns left over stay."""
    rng = np.random.default_rng(int(seed, 16))
    height, width = (length // TILES for length in image.shape[:2])
    order = rng.permutation(TILES * TILES)
    order = np.roll(order, 1)[np.argsort(order)]  # one cycle: no part stays in its place
    result = image.copy()
    for place, source in enumerate(order):
        (top, left), (row, column) = divmod(place, TILES), divmod(int(source), TILES)
        result[top * height : (top + 1) * height, left * width : (left + 1) * width] = image[
            row * height : (row + 1) * height, column * width : (column + 1) * width
        ]
    return result
