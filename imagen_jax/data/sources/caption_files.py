"""Reads the prompts of published lists and of files of your own, one reader for each format.

A reader yields cleaned captions, see `caption_text.clean`, and counts in `notes` what it left out
or changed, with the reasons of skipped.jsonl. A list of known size is complete or an error; the
error comes after the last caption.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from imagen_jax import cli
from imagen_jax.caption_text import MARK, clean, is_text, lines, read_text
from imagen_jax.data.sources.listing import csv_rows
from imagen_jax.storage import COPY_AGAIN, check_content

DRAWBENCH = {
    "Reddit": 38,
    "Colors": 25,
    "Text": 21,
    "DALL-E": 20,
    "Descriptions": 20,
    "Positional": 20,
    "Counting": 19,
    "Conflicting": 10,
    "Gary Marcus et al.": 10,
    "Misspellings": 10,
    "Rare Words": 7,
}
# The categories of DrawBench that have another name in the embedded suite.
RENAMED = {"Reddit": "Free form", "DALL-E": "Imaginative", "Gary Marcus et al.": "Compositional"}
EMBEDDED = {RENAMED.get(name, name): size for name, size in DRAWBENCH.items()}
GENEVAL = {
    "position": 100,
    "two_object": 99,
    "color_attr": 100,
    "colors": 94,
    "single_object": 80,
    "counting": 80,
}
PARTIPROMPTS = 1632
GPIC = 50_000
_PARTI_COLUMNS = ("Prompt", "Category", "Challenge", "Note")


class Caption(NamedTuple):
    """One prompt. image: the name or key of the image that it describes, "" for none."""

    id: int
    text: str
    category: str = ""
    image: str = ""


def prompt_lines(path: str | Path) -> Iterator[str]:
    """Yields the lines of a file of prompts, without those that have no text.

    Raises ValueError if it is not UTF-8 or a Git LFS pointer.
    """
    if Path(path).stat().st_size:
        check_content(Path(path))
    return (line for line in lines(read_text(path)) if clean(line)[0])


def read_prompt_file(path: Path, notes: Counter) -> Iterator[Caption]:
    """Yields the prompts of a file with one per line, numbered without the blank lines.

    The rules and messages are those of `sample --prompts`.
    """
    for number, line in enumerate(prompt_lines(path)):
        notes["removed_characters"] += bool(clean(line)[1])
        yield Caption(number, *cli.check_prompts([line]))
    notes["blank_line"] += sum(not clean(line)[0] for line in lines(read_text(path)))


def read_drawbench(path: Path, notes: Counter) -> Iterator[Caption]:
    """Yields the 200 prompts of DrawBench (Imagen, appendix C) from its sheet, saved as CSV."""
    yield from _table_with_categories(path, notes, DRAWBENCH, "DrawBench")


def read_embedded(path: Path, notes: Counter) -> Iterator[Caption]:
    """Yields the 200 prompts of the suite of this project."""
    yield from _table_with_categories(path, notes, EMBEDDED, "the embedded suite")


def _table_with_categories(
    path: Path, notes: Counter, sizes: Mapping[str, int], title: str
) -> Iterator[Caption]:
    check_content(path)
    table = csv_rows(path)
    _, header = next(table, (1, []))
    check_columns(path, header, ("Prompts", "Category"))
    found = Counter()
    number = -1
    for number, (line, row) in enumerate(table):
        fields = table_fields(path, line, header, row)
        category = clean(fields["Category"])[0]
        found[category] += 1
        text = required_text(fields["Prompts"], f"{path}:{line}", notes)
        yield Caption(number, text, category)
    check_sizes(path, found, sizes, title)


def read_partiprompts(path: Path, notes: Counter) -> Iterator[Caption]:
    """Yields the 1,632 prompts of PartiPrompts.tsv, which has tabs and no quoting."""
    check_content(path)
    rows = ((n, line.split("\t")) for n, line in enumerate(lines(read_text(path)), 1) if line)
    _, header = next(rows, (1, []))
    check_columns(path, header, _PARTI_COLUMNS, "tabs")
    number = -1
    for number, (line, row) in enumerate(rows):
        if any(field[:1] == field[-1:] == '"' and '""' in field[1:-1] for field in row):
            raise ValueError(
                f"{path}:{line} has doubled quotes: a spreadsheet has saved the file; {COPY_AGAIN}"
            )
        fields = table_fields(path, line, header, row + [""] * (len(header) - len(row)))
        text = required_text(fields["Prompt"], f"{path}:{line}", notes)
        yield Caption(number, text, clean(fields["Category"])[0])
    check_total(path, number + 1, PARTIPROMPTS, "PartiPrompts")


def geneval_metadata(path: Path) -> list[dict[str, Any]]:
    """The 553 objects of GenEval's evaluation_metadata.jsonl, which its scorer reads again."""
    objects = list(_json_lines(path, ("tag", "prompt")))
    metadata = [content for _, content in objects]
    check_sizes(path, Counter(entry["tag"] for entry in metadata), GENEVAL, "GenEval")
    for line, content in objects:
        if not isinstance(content.get("include"), list):
            raise ValueError(f"{path}:{line} has no list `include`; {COPY_AGAIN}")
    return metadata


def read_geneval(path: Path, notes: Counter) -> Iterator[Caption]:
    """Yields the 553 prompts of GenEval; the category is the tag."""
    for number, entry in enumerate(geneval_metadata(path)):
        text = required_text(entry["prompt"], f"{path}:{number + 1}", notes)
        yield Caption(number, text, entry["tag"])


def read_gpic(path: Path, notes: Counter) -> Iterator[Caption]:
    """Yields the 50,000 fixed test captions of GPIC (arXiv 2605.30341, section 3).

    The file is JSON lines with the keys key, caption and caption_type, in the order of the array
    `key` of GPIC's test_stats.npz. The category is the type of the caption, the image its key.
    """
    keys: dict[str, int] = {}
    for line, entry in _json_lines(path, ("key", "caption", "caption_type")):
        key = entry["key"]
        if key in keys:
            raise ValueError(
                f"{path}:{line} has the key {key!r:.80} of line {keys[key]}: write each test"
                " caption once"
            )
        keys[key] = line
        text = required_text(entry["caption"], f"{path}:{line}", notes)
        yield Caption(len(keys) - 1, text, entry["caption_type"], key)
    check_total(path, len(keys), GPIC, "the fixed test captions of GPIC")


def _json_lines(path: Path, names: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with their lines. Each has texts with these names."""
    check_content(path)
    for number, line in enumerate(lines(read_text(path)), 1):
        line = line.lstrip(MARK)
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number} is not valid JSON ({error}); {COPY_AGAIN}"
            ) from error
        for name in names:
            if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
                raise ValueError(
                    f"{path}:{number} has no text {name!r}: each line must be an object with"
                    f" {', '.join(names)}"
                )
        yield number, entry


def read_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table with their lines, the header first: tabs in .tsv, else commas."""
    check_content(path)
    return csv_rows(path, separator="\t" if path.suffix.lower() == ".tsv" else ",")


def table_fields(path: Path, line: int, header: list[str], row: list[str]) -> dict[str, str]:
    """A row by column. Raises ValueError if it has not the columns of the header.

    Text outside the columns is an error: the prompt would lose what follows its comma.
    """
    if len(row) < len(header) or any(row[len(header) :]):
        raise ValueError(
            f"{path}:{line} has {len(row)} columns, but the first line names {len(header)}: put"
            " prompts with commas in double quotes"
        )
    return dict(zip((name.strip() for name in header), row))


def check_columns(
    path: Path, header: list[str], names: tuple[str, ...], separator: str = "commas"
) -> None:
    """Raises ValueError unless the first line of a table names each of these columns once."""
    columns = [name.strip() for name in header]
    for name in names:
        if columns.count(name) != 1:
            raise ValueError(
                f"{path}: the first line must name the columns {', '.join(names)} once each, with"
                f" {separator} between; it is {','.join(header)[:80]!r}"
            )


def check_total(path: Path, found: int, expected: int, title: str) -> None:
    """Raises ValueError if a published list does not have its published number of prompts."""
    if found != expected:
        raise ValueError(
            f"{path} has {found:,} prompts, but {title} has {expected:,}: give the complete list,"
            " or use a file of prompts for a list of your own"
        )


def check_sizes(path: Path, found: Counter, sizes: Mapping[str, int], title: str) -> None:
    """Raises ValueError if a published list does not have its published categories."""
    unknown = sorted(found.keys() - sizes.keys())
    if unknown:
        raise ValueError(
            f"{path} has the category {unknown[0]!r:.80}, which {title} does not have: the"
            f" categories are {', '.join(sizes)}"
        )
    check_total(path, found.total(), sum(sizes.values()), title)
    for category, size in sizes.items():
        if found[category] != size:
            raise ValueError(
                f"{path} has {found[category]} prompts of the category {category!r}, but {title}"
                f" has {size}; {COPY_AGAIN}"
            )


def required_text(text: str, where: str, notes: Counter) -> str:
    """The cleaned text of a prompt that may not be left out. Raises ValueError if it has none."""
    cleaned, removed = clean(text)
    notes["removed_characters"] += bool(removed)
    if not cleaned or not is_text(cleaned):
        reason = "is empty" if not cleaned else "is not valid Unicode"
        raise ValueError(f"{where}: the prompt {reason}; {COPY_AGAIN}")
    return cleaned


def optional_text(text: str, notes: Counter) -> str:
    """The cleaned text of a caption, "" for one to leave out, which is counted."""
    cleaned, removed = clean(text)
    if not cleaned:
        notes["empty_caption"] += 1
    elif not is_text(cleaned):
        notes["invalid_caption"] += 1
        return ""
    else:
        notes["removed_characters"] += bool(removed)
    return cleaned
