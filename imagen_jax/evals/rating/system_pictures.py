"""The pictures of one system by prompt, from a set of `sample` or `evaluate` or a plain folder.

A plain folder names the prompts by their ids in the suite:

    17.png, 17_0.png, 17_1.png ...   pictures of prompt 17; leading zeros are ignored
    17/*.png, 00017/samples/*.png    the same in folders; the second is GenEval's layout, whose
                                     other files, such as grid.png, are not read
    manifest.jsonl                   lines {"prompt_id": 17, "file": ...}, as `rate export` writes

The pictures of a prompt are in the order of the set, of the manifest's lines, or of the file names;
numbers in names are compared by value.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax import picture_set, set_reservations
from imagen_jax.caption_text import clean
from imagen_jax.checksums import sha256_file
from imagen_jax.evals.rating.design import Item
from imagen_jax.evals.suites import Suite
from imagen_jax.storage import check_local, check_object

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
MANIFEST = "manifest.jsonl"
SETS = "pictures"  # of an evaluation's output: the folder of its set
SAMPLES = "samples"  # of a prompt's folder in GenEval's layout
_LISTED = 5  # values that a message lists
_STEM = re.compile(r"(\d+)(?:[_-].*)?")
_LINE_FIELDS = {"prompt_id": int, "file": str}
_AGAIN = "write the manifest again"


@dataclasses.dataclass(frozen=True)
class SystemPictures:
    """The pictures of a system.

    files: {prompt id: its files}. sha256: {file: its hash in a manifest}. origin: where they come
    from, for the key. notes: one line for each kind of thing that was left out.
    """

    name: str
    files: Mapping[int, Sequence[Path]]
    sha256: Mapping[Path, str]
    origin: Mapping[str, Any]
    notes: Sequence[str] = ()


def read(name: str, source: str, items: Sequence[Item]) -> SystemPictures:
    """Lists the pictures of a system without opening them.

    source: a folder, the output of `sample` or `evaluate --cascade`, or the manifest of a set.

    Raises ValueError for a source without pictures, with several sets, or with a damaged manifest.
    """
    check_local(f"--pictures {name}", source)
    path = Path(source)
    if path.is_file() and path.name != MANIFEST:
        return _from_set(name, path, items)
    directory = path.parent if path.is_file() else path
    if not directory.is_dir():
        raise ValueError(f"--pictures {name}={source} is not a folder: give one with its pictures")
    if (directory / MANIFEST).is_file():
        return _from_manifest(name, directory, items)
    for folder in (directory, directory / SETS):
        if sets := set_reservations.sets(folder):
            return _from_set(name, _only_manifest(folder, sorted(sets)), items)
    return _from_folder(name, directory, items)


def of_reference(name: str, suite: Suite) -> SystemPictures:
    """The reference images of a suite. Raises ValueError if it has none."""
    missing = [prompt.id for prompt in suite.prompts if not prompt.image]
    if missing:
        raise ValueError(
            f"{len(missing):,} prompts of the suite {suite.name} have no reference image: use a"
            " suite that names images, such as coco, and give their folder with --images"
        )
    folder = Path(suite.images)
    files = {prompt.id: [folder / prompt.image] for prompt in suite.prompts}
    return SystemPictures(name, files, {}, {"folder": suite.images})


def _only_manifest(folder: Path, firsts: Sequence[int]) -> Path:
    paths = [picture_set.manifest(folder, first) for first in firsts]
    if len(paths) > 1:
        raise ValueError(f"{folder} has {len(paths)} sets of pictures: give one, as {paths[0]}")
    if not paths[0].is_file():
        raise ValueError(
            f"the set of pictures in {folder} is not complete: run the command that made it again"
        )
    return paths[0]


def _from_set(name: str, manifest: Path, items: Sequence[Item]) -> SystemPictures:
    """If the suite has a text several times, its ids share the rows of that text in order."""
    if not (manifest.suffix == ".jsonl" and manifest.is_file()):
        raise ValueError(f"--pictures {name}={manifest} is not a manifest such as set_0000.jsonl")
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in picture_set.manifest_rows(manifest):
        rows.setdefault(clean(row["prompt"])[0], []).append(row)
    ids: dict[str, list[int]] = {}
    for item in items:
        ids.setdefault(clean(item.text)[0], []).append(item.id)
    files, sums = {}, {}
    for text, members in ids.items():
        listed = rows.get(text, [])
        each = len(listed) // len(members)
        for index, prompt in enumerate(members):
            mine = listed[index * each : (index + 1) * each]
            files[prompt] = [manifest.parent / row["file"] for row in mine]
            sums |= {manifest.parent / row["file"]: row["sha256"] for row in mine}
    origin = {"manifest": str(manifest), "sha256": sha256_file(manifest)}
    return SystemPictures(name, files, sums, origin, _left_out(name, set(rows) - set(ids)))


def _from_manifest(name: str, directory: Path, items: Sequence[Item]) -> SystemPictures:
    """Raises ValueError for a line that is damaged, doubled, or of a prompt of another suite."""
    path = directory / MANIFEST
    known = {item.id: item for item in items}
    files: dict[int, list[Path]] = {}
    sums: dict[Path, str] = {}
    others = set()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}); {_AGAIN}") from error
        check_object(f"{path}, line {number}", row, _LINE_FIELDS, _AGAIN)
        if row["prompt_id"] not in known:
            others.add(row["prompt_id"])
            continue
        text, expected = row.get("prompt"), known[row["prompt_id"]].text
        if isinstance(text, str) and clean(text)[0] != clean(expected)[0]:
            raise ValueError(
                f"{path}, line {number} has the text {text[:60]!a} for the prompt"
                f" {row['prompt_id']}, which is {expected[:60]!a} in the suite: give the suite that"
                " the pictures were drawn for"
            )
        file = directory / row["file"]
        mine = files.setdefault(row["prompt_id"], [])
        if file in mine:
            raise ValueError(f"{path}, line {number} lists {file.name} again; {_AGAIN}")
        mine.append(file)
        if isinstance(row.get("sha256"), str):
            sums[file] = row["sha256"]
    origin = {"manifest": str(path), "sha256": sha256_file(path)}
    return SystemPictures(name, files, sums, origin, _left_out(name, others))


def _from_folder(name: str, directory: Path, items: Sequence[Item]) -> SystemPictures:
    known = {item.id for item in items}
    files: dict[int, list[Path]] = {}
    others = set()
    for path in sorted(_pictures(directory), key=_by_numbers):
        first = path.relative_to(directory).parts[0]
        match = _STEM.fullmatch(first if (directory / first).is_dir() else path.stem)
        if match and int(match[1]) in known:
            files.setdefault(int(match[1]), []).append(path)
        else:
            others.add(first)
    if not files:
        raise ValueError(
            f"--pictures {name}={directory} has no picture named by a prompt's id, such as 17.png"
            f" or 17/0.png ({', '.join(SUFFIXES)}), and no set of pictures: give another folder"
        )
    return SystemPictures(name, files, {}, {"folder": str(directory)}, _left_out(name, others))


def _pictures(directory: Path) -> Iterator[Path]:
    """The pictures of a folder of all prompts. Links to folders of prompts are followed."""
    for entry in directory.iterdir():
        samples = entry / SAMPLES
        root = samples if samples.is_dir() else entry
        for path in root.rglob("*") if root.is_dir() else (entry,):
            hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
            if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
                yield path


def _by_numbers(path: Path) -> list[tuple[int, int | str]]:
    """Sorts 2.png before 10.png."""
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part)) if index % 2 else (1, part) for index, part in enumerate(parts)]


def _left_out(name: str, others: set) -> list[str]:
    if not others:
        return []
    return [
        f"{name}: {len(others):,} prompts or file names are not in the suite and are left out:"
        f" {first_values(sorted(others))}"
    ]


def first_values(values: Sequence[Any]) -> str:
    """The first values of a list, for a message."""
    more = ", ..." if len(values) > _LISTED else ""
    return ", ".join(str(value)[:200] for value in values[:_LISTED]) + more
