"""Writes pictures in the layout that GenEval's scorer reads.

    00000/metadata.jsonl        the object of the prompt in evaluation_metadata.jsonl
    00000/samples/0000.png      its pictures

The scorer needs an object detector and runs elsewhere. It scores what it finds, so an incomplete
set is an error here.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.pictures import Picture, write_png
from imagen_jax.storage import write_atomically


def write_layout(
    directory: Path,
    metadata: Sequence[Mapping[str, Any]],
    pictures: Iterable[tuple[int, Picture]],
) -> None:
    """Writes each picture when it arrives, numbered within its prompt.

    metadata: see `caption_files.geneval_metadata`. pictures: the id of the prompt, which is its
    index in `metadata`, and an image, in any order of the prompts.

    Raises:
      ValueError: the directory has pictures, an id is not that of a prompt, or the prompts have
        not the same number of pictures at the end.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty: give another directory for the pictures")
    counts: Counter[int] = Counter(dict.fromkeys(range(len(metadata)), 0))
    for prompt, image in pictures:
        if prompt not in counts:
            raise ValueError(
                f"there is no prompt {prompt}: ids are 0 to {len(metadata) - 1}; take them from the"
                " suite geneval"
            )
        folder = directory / f"{prompt:05d}"
        if not counts[prompt]:
            content = json.dumps(metadata[prompt], ensure_ascii=False) + "\n"
            write_atomically(folder / "metadata.jsonl", content.encode())
        write_png(folder / "samples" / f"{counts[prompt]:04d}.png", image)
        counts[prompt] += 1
    most = max(counts.values())
    fewer = [prompt for prompt, count in counts.items() if count < max(most, 1)]
    if fewer:
        raise ValueError(
            f"{len(fewer)} of {len(metadata)} prompts have fewer than {max(most, 1)} pictures, the"
            f" first is {fewer[0]}: sample them too, GenEval would score the set without them"
        )
