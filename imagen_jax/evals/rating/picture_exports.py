"""Writes the pictures of a system for scorers that are not part of this package.

    manifest: manifest.jsonl with prompt_id, prompt, category, file, sha256, and pictures/17_0.png
    geneval:  the folders of `geneval_layout`

Pictures are written as PNG, upright and on white. A directory appears whole or not at all.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from imagen_jax import pictures
from imagen_jax.data.sources.caption_files import geneval_metadata
from imagen_jax.evals.geneval_layout import write_layout
from imagen_jax.evals.rating.preparing import read_picture
from imagen_jax.evals.rating.system_pictures import MANIFEST, SystemPictures, first_values
from imagen_jax.evals.suites import Suite
from imagen_jax.locks import whole_directory
from imagen_jax.run_log import Progress
from imagen_jax.storage import write_atomically, write_lines

GENEVAL = "geneval"
PICTURES = "pictures"


def write_manifest(system: SystemPictures, suite: Suite, output: Path) -> str:
    """Writes PNG files and their manifest. Returns a line that counts them and missing prompts."""
    prompts = {prompt.id: prompt for prompt in suite.prompts}
    counts = dict.fromkeys(prompts, 0)

    def write(work: Path) -> Iterator[str]:
        """Writes each picture, then yields its line."""
        for number, image in _pictures(system, list(prompts)):
            content = pictures.png_bytes(image)
            file = f"{PICTURES}/{number}_{counts[number]}.png"
            write_atomically(work / file, content)
            counts[number] += 1
            row = {"prompt_id": number, "prompt": prompts[number].text}
            row |= {"category": prompts[number].category, "file": file}
            row |= {"sha256": hashlib.sha256(content).hexdigest()}
            yield json.dumps(row, ensure_ascii=False) + "\n"

    with whole_directory(output, "writing pictures to") as work:
        write_lines(work / MANIFEST, write(work))
        if not any(counts.values()):
            raise ValueError("no prompt of the suite has a picture: give other --pictures")
    without = [number for number, count in counts.items() if not count]
    note = f"; {len(without)} prompts have no picture: {first_values(without)}" if without else ""
    shown = len(counts) - len(without)
    return f"{output / MANIFEST}: {sum(counts.values()):,} pictures of {shown:,} prompts{note}"


def write_geneval(system: SystemPictures, suite: Suite, output: Path) -> str:
    """Writes GenEval's folders. Returns a line that counts the prompts.

    Raises ValueError unless every prompt has the same number of pictures.
    """
    if suite.name != GENEVAL:
        raise ValueError(f"--layout geneval needs --suite geneval, not {suite.name}")
    metadata = geneval_metadata(Path(suite.identity["file"]))
    if len(suite.prompts) != len(metadata):
        raise ValueError("--layout geneval needs all prompts: leave out --prompts")
    with whole_directory(output, "writing pictures to") as work:
        write_layout(work, metadata, _pictures(system, range(len(metadata))))
    return f"{output}: pictures of {len(metadata):,} prompts"


def _pictures(system: SystemPictures, numbers) -> Iterator[tuple[int, np.ndarray]]:
    """(prompt id, picture) of all pictures. Raises ValueError, with its name, for a broken file."""
    with Progress("prompts written", len(numbers)) as progress:
        for done, number in enumerate(numbers, 1):
            for path in system.files.get(number, ()):
                try:
                    yield number, read_picture(path, system.sha256.get(path))
                except ValueError as error:
                    raise ValueError(f"{path} cannot be used: {error}; replace it") from error
            progress.update(done)
