"""How often the captioned image is the nearest of all to its sample, or among the 5 nearest.

Also writes the samples: samples.npz, which the next stage's `--lowres_from` takes, and a contact
sheet for each split.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imagen_jax.evals import nearest, report
from imagen_jax.evals.evaluation import Evaluation
from imagen_jax.evals.measures.measure import Column, Line, Result
from imagen_jax.evals.rows import Settings
from imagen_jax.pictures import contact_sheet, enlarge, write_png
from imagen_jax.stage import Stage
from imagen_jax.storage import write_arrays

ORDER = 40
COLUMNS = (Column("captioned image among the 5 nearest", "SPLIT.right.top5.rate", False),)
SHEET_ROWS = 24


def excluded(stage: Stage, settings: Settings) -> str:
    return ""


def measure(e: Evaluation) -> dict[str, Any]:
    """{split: {text: `nearest.score`}}."""
    out = {}
    for (split, text), distance in e.distances().items():
        out.setdefault(split, {})[text] = nearest.score(distance, _wanted(e, split))
    return out


def row_values(e: Evaluation) -> dict[str, np.ndarray]:
    out = {}
    for (split, text), distance in e.distances().items():
        rank = nearest.ranks(distance, _wanted(e, split))
        out |= {f"{split}.{text}.top{k}.rate": rank <= k for k in (1, 5)}
    return out


def _wanted(e: Evaluation, split: str) -> np.ndarray:
    """The place in the gallery of each row's own image."""
    return e.data.gallery_row(split, e.data.wholes(split).batch["index"])


def lines(found: Result) -> Iterator[Line]:
    for split, texts in found.items():
        for text, score in texts.items():
            rates = f"of {score['gallery']} images: {report.proportions(score)}"
            yield f"retrieval, {split}, {text} text", rates


def write(e: Evaluation, output: Path, origin: Mapping[str, str]) -> None:
    """Writes samples.npz, with `origin`, and samples_<split>.png to the directory `output`."""
    settings = {"manifest_hash": e.data.prepared.hash, "seed": e.probe.settings.seed, **origin}
    arrays = {name: np.array(value) for name, value in settings.items()}
    for split in e.data.counts:
        arrays[f"{split}_index"] = e.data.wholes(split).batch["index"]
        arrays |= {f"{split}_{text}": e.samples(split, text) for text in e.texts}
        write_png(output / f"samples_{split}.png", sheet(e, split))
    write_arrays(output / "samples.npz", arrays)


def sheet(e: Evaluation, split: str) -> np.ndarray:
    """A contact sheet of some rows: true image, low-res image, samples, nearest image."""
    rows, cell = e.data.wholes(split), max(96, e.stage.image_size)
    shown = np.unique(np.linspace(0, len(rows) - 1, SHEET_ROWS).astype(int))
    found = e.data.gallery_images(e.distances()[split, "right"].argmin(axis=1)[shown])
    columns = {"true": rows.batch["image"]}
    if e.stage.lowres_size:
        columns["low-res"] = e.sampled(split, "right").batch["lowres"]
    columns |= {f"{text} text": e.samples(split, text) for text in e.texts}
    cells = [
        [enlarge(image, cell) for image in [*(column[i] for column in columns.values()), near]]
        for i, near in zip(shown, found)
    ]
    captions = [e.data.caption(rows.batch["caption_id"][i].item()) for i in shown]
    return contact_sheet(captions, cells, [*columns, "nearest"], cell)
