"""The rate at which the captioned image is nearest to its sample, or among the 5 nearest.

It also writes the samples: samples.npz, which `--lowres_from` of the next stage takes, and a
contact sheet for each split.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from imagen_jax.evals import nearest, report
from imagen_jax.evals.evaluation import Evaluation
from imagen_jax.evals.measures.measure import Column, Line, Result, RowValues
from imagen_jax.evals.rows import Data, Settings
from imagen_jax.object_storage import AnyPath
from imagen_jax.pictures import contact_sheet, enlarge, write_png
from imagen_jax.stage import Stage
from imagen_jax.storage import write_arrays

ORDER = 40
COLUMNS = (Column("captioned image among the 5 nearest", "SPLIT.right.top5.rate", False),)
SHEET_ROWS = 24


def excluded(stage: Stage, settings: Settings) -> str:
    return ""


def too_few(stage: Stage, data: Data) -> dict[str, str]:
    reasons = {split: data.no_shuffled_text(split) for split in data.counts if stage.reads_text}
    return {f", {split}, shuffled text": reason for split, reason in reasons.items() if reason}


def measure(e: Evaluation) -> dict[str, Any]:
    """{split: {text: `nearest.score`}}."""
    out = {}
    for (split, text), distance in e.distances().items():
        out.setdefault(split, {})[text] = nearest.score(distance, _wanted(e, split))
    return out


def row_values(e: Evaluation) -> RowValues:
    out = {}
    for (split, text), distance in e.distances().items():
        rank = nearest.ranks(distance, _wanted(e, split))
        out |= {f"{split}.{text}.top{k}.rate": rank <= k for k in (1, 5)}
    return out


def _wanted(e: Evaluation, split: str) -> Int[np.ndarray, " n"]:
    """The position in the gallery of each row's own image."""
    return e.data.gallery_row(split, e.data.wholes(split).index)


def lines(result: Result) -> Iterator[Line]:
    for split, texts in result.items():
        for text, score in texts.items():
            rates = f"of {score['gallery']} images: {report.proportions(score)}"
            yield f"retrieval, {split}, {text} text", rates


def write(e: Evaluation, output: AnyPath, origin: Mapping[str, str]) -> None:
    """Writes samples.npz, with `origin`, and samples_<split>.png to the directory `output`."""
    settings = {"manifest_hash": e.data.prepared.hash, "seed": e.probe.settings.seed, **origin}
    arrays = {name: np.array(value) for name, value in settings.items()}
    for split in e.data.counts:
        arrays[f"{split}_index"] = e.data.wholes(split).index
        arrays |= {f"{split}_{text}": e.samples(split, text) for text in e.texts(split)}
        write_png(output / f"samples_{split}.png", sheet(e, split))
    write_arrays(output / "samples.npz", arrays)


def sheet(e: Evaluation, split: str) -> UInt8[np.ndarray, "h w 3"]:
    """A contact sheet of SHEET_ROWS rows: true and low-res image, samples, nearest image."""
    rows, cell = e.data.wholes(split), max(96, e.stage.image_size)
    shown = np.unique(np.linspace(0, len(rows) - 1, SHEET_ROWS).astype(int))
    batch = e.sampled(split, "right").at(shown)
    columns = {"true": batch["image"]}
    if e.stage.lowres_size:
        columns["low-res"] = batch["lowres"]
    columns |= {f"{text} text": e.samples(split, text)[shown] for text in e.texts(split)}
    near = e.distances()[split, "right"].argmin(axis=1)[shown]
    columns["nearest"] = e.data.gallery_images(near)
    cells = [[enlarge(image, cell) for image in row] for row in zip(*columns.values())]
    captions = [e.data.caption(rows.caption_id[i].item()) for i in shown]
    return contact_sheet(captions, cells, [*columns], cell)
