"""Reads the captions of COCO: its annotation file, or a fixed list of captions as a table.

Every caption comes with the file name of its image. Names are joined by id, never by order. A list
of prompts must be complete; a folder of images may have a damaged entry, which is noted.
"""

import math
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.caption_text import is_text
from imagen_jax.data.sources.caption_files import (
    Caption,
    check_columns,
    optional_text,
    read_table,
    required_text,
    table_fields,
)
from imagen_jax.data.sources.listing import Listed, note_faults
from imagen_jax.data.sources.walk import Note, spelling
from imagen_jax.storage import COPY_AGAIN, read_object

ANNOTATIONS = "captions_val2014.json"
VAL2014 = {"images": 40_504, "annotations": 202_654}  # entries of that file
_FILE = "COCO_val2014_{:012d}.jpg"
_NUMBER = re.compile(r"(\d{12})\.jpe?g$", re.IGNORECASE)
# Names of one column in published lists.
_IMAGE_IDS = ("image_id", "coco_id")
_TEXTS = ("text", "caption", "prompt")
_CAPTION_IDS = ("caption_id", "id")
_FILES = ("file_name", "file")


def read_annotations(path: Path, notes: Counter) -> Iterator[Caption]:
    """Yields every caption of an annotation file, such as captions_val2014.json, in its order.

    The id is that of the caption. Captions without text are left out and counted in `notes`.

    Raises:
      ValueError: it is not such a file, an id occurs twice, a caption names an image that the file
        does not have, or captions_val2014.json has not its published number of entries.
    """
    content = read_object(path, dict.fromkeys(VAL2014, list))
    if path.name == ANNOTATIONS:
        _check_entries(path, content)
    files = _image_files(path, content["images"])
    seen: set[int] = set()
    for at, row in enumerate(content["annotations"]):
        _check_entry(path, "annotations", at, row, {"image_id": int, "id": int, "caption": str})
        if row["id"] in seen:
            raise ValueError(f"{path} has the caption id {row['id']} twice; {COPY_AGAIN}")
        seen.add(row["id"])
        if row["image_id"] not in files:
            raise ValueError(
                f"{path}: the caption {row['id']} names the image {row['image_id']}, which is not"
                f" among the images of the file; {COPY_AGAIN}"
            )
        if text := optional_text(row["caption"], notes):
            yield Caption(row["id"], text, "", files[row["image_id"]])


def _check_entries(path: Path, content: Mapping[str, Any]) -> None:
    for name, expected in VAL2014.items():
        if len(content[name]) != expected:
            raise ValueError(
                f"{path} has {len(content[name]):,} {name} instead of {expected:,}: download the"
                " annotations of COCO 2014 again, or rename a file that is something else"
            )


def _image_files(path: Path, images: list[Any]) -> dict[int, str]:
    """{image id: file name}."""
    files: dict[int, str] = {}
    for at, row in enumerate(images):
        _check_entry(path, "images", at, row, {"id": int, "file_name": str})
        if row["id"] in files:
            raise ValueError(f"{path} has the image id {row['id']} twice; {COPY_AGAIN}")
        files[row["id"]] = row["file_name"]
    return files


def _check_entry(path: Path, name: str, at: int, row: Any, fields: Mapping[str, type]) -> None:
    if fault := _fault(row, fields):
        raise ValueError(f"{path}: entry {at} of {name!r} {fault}")


def _fault(row: Any, fields: Mapping[str, type]) -> str:
    """Why an entry cannot be used, "" if it can."""
    for field, kind in fields.items():
        if not isinstance(row, dict) or not isinstance(row.get(field), kind):
            return f"has no valid {field!r}: give a file of captions, such as {ANNOTATIONS}"
    return ""


def read_listed(
    path: Path, files: Collection[str], images: Sequence[str], notes: list[Note]
) -> tuple[list[Listed], dict[str, str]]:
    """Reads the annotation file of a folder of images, of which it may list more or fewer.

    A damaged entry is left out and added to `notes`. null and NaN give the caption "".

    files: names of the files in the folder, relative to it. images: those of them that are images.

    Returns:
      A row for each image of the annotations, and {name: why} for those that are not in the folder.
      An image whose name is not in the folder is the only one with that base name, if there is one.

    Raises:
      ValueError: the file is not an annotation file, half of its images or annotations are
        damaged, or an id has two names.
    """
    remedy = f"{COPY_AGAIN}, or rename a file that is not COCO's captions"
    content = read_object(path, dict.fromkeys(VAL2014, list), remedy)
    names = _listed_images(path, content["images"], notes)
    captions = _listed_captions(path, content["annotations"], notes)
    found, absent = _match(set(names.values()), files, images)
    rows = [(found.get(name, name), captions.get(id, []), "") for id, name in names.items()]
    for id in captions.keys() - names.keys():
        absent[f"image {id}"] = f"{path.name} has no image with this id"
        rows.append((f"image {id}", captions[id], ""))
    return rows, absent


def _listed_images(path: Path, entries: list[Any], notes: list[Note]) -> dict[int, str]:
    """{image id: file name}."""
    names: dict[int, str] = {}
    faults: dict[int | str, str] = {}
    for at, row in enumerate(entries):
        fault = _fault(row, {"id": int, "file_name": str})
        if not fault and not (row["file_name"] and is_text(row["file_name"])):
            fault = f"has the file_name {row['file_name']!r:.80}, which is not the name of a file"
        if fault:
            faults[f"images[{at}]"] = fault
        elif names.setdefault(row["id"], row["file_name"]) != row["file_name"]:
            raise ValueError(
                f"{path} has the image id {row['id']} twice, for {names[row['id']]} and"
                f" {row['file_name']}: give each image an id of its own"
            )
    note_faults(path, len(entries) - len(faults), faults, notes)
    return names


def _listed_captions(path: Path, entries: list[Any], notes: list[Note]) -> dict[int, list[str]]:
    """{image id: captions}."""
    captions: dict[int, list[str]] = {}
    faults: dict[int | str, str] = {}
    for at, row in enumerate(entries):
        if isinstance(row, dict) and _is_missing(row.get("caption", "")):
            row = row | {"caption": ""}
        if fault := _fault(row, {"image_id": int, "caption": str}):
            faults[f"annotations[{at}]"] = fault
        else:
            captions.setdefault(row["image_id"], []).append(row["caption"])
    note_faults(path, len(entries) - len(faults), faults, notes)
    return captions


def _is_missing(caption: Any) -> bool:
    """Whether a table without a caption has written this: null, NaN or Infinity."""
    return caption is None or (isinstance(caption, float) and not math.isfinite(caption))


def _match(
    names: Collection[str], files: Collection[str], images: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns {name: file} and {name: why there is no file}; its time is linear in both."""
    spellings = {spelling(file): file for file in files}
    spelled = {name: spelling(name) for name in names}
    bases: dict[str, list[str]] = {}
    for image in images:
        bases.setdefault(posixpath.basename(spelling(image)), []).append(image)
    sharing = Counter(map(posixpath.basename, set(spelled.values())))
    found, absent = {}, {}
    for name, path in spelled.items():
        base = posixpath.basename(path)
        alike = bases.get(base, [])
        if name in files or path in spellings:
            found[name] = name if name in files else spellings[path]
        elif not alike:
            absent[name] = "no image of the folder has this name"
        elif len(alike) > 1:
            absent[name] = f"several images have this name: {', '.join(alike[:3])}"
        elif sharing[base] > 1:
            absent[name] = f"{alike[0]} may be another image of this name"
        else:
            found[name] = alike[0]
    return found, absent


def read_list(path: Path, notes: Counter) -> Iterator[Caption]:
    """Yields the captions of a fixed list, in its order.

    The list is a table (.csv or .tsv) with the columns image_id and text, or image_id and
    caption_id; published lists also call them coco_id, caption or prompt, and id. Captions by id
    are looked up in captions_val2014.json beside the list. A list with texts is compared with that
    file if it is there. A column file_name is optional.

    Raises:
      ValueError: it is not such a table, a caption occurs twice, or a row has the caption or file
        of another image.
    """
    table = read_table(path)
    _, header = next(table, (1, []))
    columns = _columns(path, header)
    annotations = path.with_name(ANNOTATIONS)
    by_id = _by_id(annotations, "text" in columns)
    texts = _texts(by_id) if "text" in columns else {}
    seen: dict[int, int] = {}
    strange = []
    for number, (line, row) in enumerate(table):
        fields = table_fields(path, line, header, row)
        image_id = _integer(path, line, columns["image_id"], fields)
        caption_id = number
        if "caption_id" in columns:
            caption_id = _integer(path, line, columns["caption_id"], fields)
        if caption_id in seen:
            raise ValueError(
                f"{path}:{line} has the caption id {caption_id} of line {seen[caption_id]}: list"
                " each caption once"
            )
        seen[caption_id] = line
        file = _file(path, line, image_id, fields[columns["file"]] if "file" in columns else "")
        if "text" in columns:
            text = required_text(fields[columns["text"]], f"{path}:{line}", notes)
            if texts and _words(text) not in texts.get(file, ()):
                strange.append(line)
        else:
            text = _look_up(path, line, by_id, caption_id, file, annotations)
        yield Caption(caption_id, text, "", file)
    if strange:
        raise ValueError(
            f"{path}:{strange[0]}: the text is not a caption of its image in {annotations} (rows"
            f" like this: {len(strange)} of {len(seen)}): texts and image ids are in different"
            " orders; write the list again, with both from the same row"
        )


def _columns(path: Path, header: list[str]) -> dict[str, str]:
    """The column of each kind that the first line names."""
    names = [name.strip() for name in header]
    kinds = {"image_id": _IMAGE_IDS, "text": _TEXTS, "caption_id": _CAPTION_IDS, "file": _FILES}
    found = {kind: next((n for n in alike if n in names), "") for kind, alike in kinds.items()}
    columns = {kind: name for kind, name in found.items() if name}
    if "image_id" not in columns or not {"text", "caption_id"} & columns.keys():
        raise ValueError(
            f"{path}: the first line must name the columns image_id and text, or image_id and"
            f" caption_id; it is {','.join(header)[:80]!r}"
        )
    check_columns(path, header, tuple(columns.values()))
    return columns


def _by_id(annotations: Path, has_text: bool) -> dict[int, Caption]:
    """The captions of the annotation file beside a list. Only a list with texts can do without."""
    if not annotations.exists():
        if has_text:
            return {}
        raise ValueError(
            f"{annotations} does not exist, and the list has no column text: put {ANNOTATIONS}"
            " beside the list"
        )
    return {caption.id: caption for caption in read_annotations(annotations, Counter())}


def _texts(by_id: Mapping[int, Caption]) -> dict[str, set[str]]:
    """{file name: its captions, as words}."""
    texts: dict[str, set[str]] = {}
    for caption in by_id.values():
        texts.setdefault(caption.image, set()).add(_words(caption.text))
    return texts


def _words(text: str) -> str:
    """The words of a caption; lists differ in capitals and in the full stop."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _integer(path: Path, line: int, column: str, fields: Mapping[str, str]) -> int:
    try:
        return int(fields[column])
    except ValueError as error:
        raise ValueError(
            f"{path}:{line}: {column} is {fields[column]!r:.40}; it must be an integer"
        ) from error


def _file(path: Path, line: int, image_id: int, name: str) -> str:
    """The file name of an image. Raises ValueError if the row names the file of another image."""
    name = name.strip().rpartition("/")[2] or _FILE.format(image_id)
    number = _NUMBER.search(name)
    if number and int(number[1]) != image_id:
        raise ValueError(
            f"{path}:{line} has the image id {image_id} but the file {name}: ids and files are in"
            " different orders; write the list again, with both from the same row"
        )
    return name


def _look_up(
    path: Path, line: int, by_id: Mapping[int, Caption], caption_id: int, file: str, where: Path
) -> str:
    """The text of a caption. Raises ValueError unless it is a caption of the image `file`."""
    if caption_id not in by_id:
        raise ValueError(
            f"{path}:{line}: {where} has no caption {caption_id}: give a list of captions of COCO"
            " 2014 val"
        )
    if by_id[caption_id].image != file:
        raise ValueError(
            f"{path}:{line}: caption {caption_id} belongs to {by_id[caption_id].image}, not to"
            f" {file}: caption ids and image ids are in different orders; write the list again,"
            " with both from the same row"
        )
    return by_id[caption_id].text
