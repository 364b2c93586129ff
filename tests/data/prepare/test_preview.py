"""Estimates of stores and of choices, against written data and numbers computed by hand."""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from imagen_jax.data import records
from imagen_jax.data.caption_records import CaptionRow, serialize_caption, serialize_features
from imagen_jax.data.prepare import checks, passes, preview
from imagen_jax.data.prepare.caption_estimate import (
    CaptionEstimate,
    FeatureSizes,
    StoreEstimate,
    TokenizerFacts,
    preview_captions,
)
from imagen_jax.data.prepare.choices import Choice, print_choices
from imagen_jax.data.prepare.resize import AS_IS, Resize
from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.text_inputs import TextFeatures
from imagen_jax.weights.text_encoders import find_encoder
from tests.data import synthetic
from tests.data.synthetic_source import SETTINGS, FakeEncoder, write_folder

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("embedding", records.EMBEDDINGS)
@pytest.mark.parametrize(("dim", "rows"), [(256, 2048), (1024, 500)])
def test_size_of_a_store_that_was_written(tmp_path, dim, rows, embedding):
    """Catches float32 or padded features, and compression, frames or last blocks left out."""
    rng = np.random.default_rng(0)
    captions = [
        records.CaptionRow(
            f"picture {i} of a red house",
            rng.normal(size=(5 + i % 20, dim)).astype(ml_dtypes.bfloat16),
        )
        for i in range(rows)
    ]
    size = rows // 2
    parts = [
        (records.serialize_caption(row, embedding) for row in captions[start : start + size])
        for start in (0, size)
    ]
    written = sum(
        records.write_shard(tmp_path, records.shard_name("captions", "train", i, 2), part)["bytes"]
        for i, part in enumerate(parts)
    )
    tokens = np.mean([len(row.embedding) for row in captions])
    text_bytes = np.mean([len(row.text) for row in captions])
    store = StoreEstimate(rows, tokens, text_bytes, dim, size, embedding)
    assert store.shards == 2 and store.bytes == pytest.approx(written, rel=0.04)
    assert store.uncompressed == pytest.approx(
        sum(len(row.text) for row in captions)
        + rows * tokens * (2 * dim if embedding == "bfloat16" else dim + 4)
    )


@pytest.mark.parametrize("embedding", records.EMBEDDINGS)
def test_size_of_named_stores_that_were_written(tmp_path, embedding):
    """Catches pooled vectors left out, texts counted for each encoder, and frames of features for
    texts alone.
    """
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(ml_dtypes.bfloat16)
    texts = [f"picture {i} of a red house" for i in range(4096)]
    features = [TextFeatures(normal(5 + i % 5, 64), normal(128)) for i in range(4096)]
    stores = {
        "captions": (serialize_caption(CaptionRow(text)) for text in texts),
        "captions_a": (serialize_features(row, embedding) for row in features),
    }
    written = [
        records.write_shard(tmp_path, records.shard_name(store, "train", 0, 1), rows)["bytes"]
        for store, rows in stores.items()
    ]
    tokens = np.mean([len(row.embedding) for row in features])
    text_bytes = np.mean([len(text) for text in texts])
    widths = {"a": FeatureSizes(64, tokens, 128)}
    estimate = CaptionEstimate.of(4096, text_bytes, widths, 4096, embedding)
    sizes = [store.bytes for store in estimate.stores.values()]
    assert sizes == pytest.approx(written, rel=0.07) and estimate.bytes == sum(sizes)
    uncompressed = tokens * (2 * 64 if embedding == "bfloat16" else 64 + 4) + 2 * 128
    assert estimate.stores["a"].uncompressed == pytest.approx(4096 * uncompressed)


def test_four_hundred_million(tmp_path, capsys):
    """Catches a time without rate or chips, captions counted per image, an assumed price."""
    source = FolderSource(write_folder(tmp_path / "ramps"), 0.0)
    tokenize = FakeEncoder(max_length=6).tokenize
    store = preview_captions(
        source,
        {"": TokenizerFacts(tokenize, 4096)},
        400_000_000,
        4096,
        "bfloat16",
        rate=8000,
        chips=64,
        price=0.5,
    ).stores[""]
    told = capsys.readouterr().out
    texts = {"a colour ramp"} | {f"picture number {i}" for i in range(20)}
    assert store.tokens == 4 and store.text_bytes == pytest.approx(
        np.mean([len(text) for text in texts])
    )
    assert store.bytes == pytest.approx(
        400e6 * (0.78 * 4 * 8192 + store.text_bytes + 250) + 97_657 * 2**15
    )
    assert (
        "400,000,000 of 4.0 +- 0.0 tokens (measured on 21 of the source's, 0.0 % truncated)" in told
    )
    assert (
        "in 97,657 shards of 4,096 captions" in told
        and "13.9 h at 8,000 captions per second, 889 chip-hours on 64 chips" in told
    )
    assert (
        "GiB of files until the end, for 200,000,000 images" in told
        and "price     0.5 per GiB and month" in told
    )
    int8 = 400e6 * (4 * (0.91 * 4096 + 4) + store.text_bytes + 250) + 97_657 * 2**15
    assert table(told) == [
        (
            True,
            "captions, bfloat16",
            tebibytes(store.bytes),
            "13.9 h",
            f"{store.bytes / 2**31:,.1f}",
        ),
        (False, "captions, int8", tebibytes(int8), "13.9 h", f"{int8 / 2**31:,.1f}"),
    ]
    small = preview_captions(
        source, {"": TokenizerFacts(tokenize, 4096)}, 1000, 4096, "int8", rate=0, chips=0, price=0
    ).stores[""]
    told = capsys.readouterr().out
    assert "price" not in told and "\ntime " not in told and "1 shards" in told
    assert "4096 features per token in int8, 15.7 MiB uncompressed; zstd leaves about 0.91" in told
    assert [row[:2] + row[3:] for row in table(told)] == [
        (False, "captions, bfloat16", "unknown"),
        (True, "captions, int8", "unknown"),
    ]
    assert small.uncompressed < 1000 * 4 * 8192


def table(told):
    """The rows of the printed table: (chosen, name, size, time, ...)."""
    rows = told[told.index("* chosen") :].splitlines()[1:]
    cells = lambda row: re.split(r"\s{2,}", row[26:].strip())
    return [(row[0] == "*", row[2:26].strip(), *cells(row)) for row in rows if row[0] in " *"]


def tebibytes(size):
    return f"{size / 2**40:,.1f} TiB"


def test_a_row_of_the_table(capsys):
    """Catches seconds as hours, a price per GB, and costs without a price."""
    choices = [Choice("a", 3 * 2**30, 5400, True), Choice("b", 2**20, None, False)]
    print_choices(choices, 20.0)
    told = capsys.readouterr().out
    assert table(told) == [
        (True, "a", "3.0 GiB", "1.500 h", "60.0"),
        (False, "b", "1.0 MiB", "unknown", "0.020"),
    ]
    print_choices(choices, 0.0)
    told = capsys.readouterr().out
    assert "month" not in told and table(told)[0] == (True, "a", "3.0 GiB", "1.500 h")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of three captioned photographs of 270 x 300 pixels."""
    folder = tmp_path_factory.mktemp("source") / "photographs"
    folder.mkdir()
    for i in range(3):
        data = synthetic.encode(synthetic.photograph(270, 300, i), "JPEG", quality=90)
        (folder / f"{i}.jpg").write_bytes(data)
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return FolderSource(folder, 0.0)


CHOICES = {
    "images, as they are": AS_IS,
    "images, 64 jpeg": Resize(64),
    "images, 64 png": Resize(64, "png"),
    "images, 256 jpeg": Resize(256),
    "images, 256 png": Resize(256, "png"),
}


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, {}),
        ({"resize": Resize(64, "png"), "embedding": "int8", "processes": 2}, {}),
        ({"resize": Resize(128)}, {"images, 128 jpeg": Resize(128)}),
    ],
)
def test_a_dry_run_compares_the_choices(photographs, monkeypatch, capsys, changes, more):
    """Catches bytes and seconds of another choice, rows without effect, and wrong marks."""
    printed, clock = [], itertools.count()
    monkeypatch.setattr(preview, "print_choices", lambda rows, price: printed.append((rows, price)))
    # Every measurement takes a second: reading, checking, encoding, writing.
    monkeypatch.setattr(preview, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    settings = passes.Settings(**SETTINGS | changes)
    preview.dry_run(photographs, Encoders.single(FakeEncoder()), settings, 2, 0.5)
    (rows, price) = printed[0]
    workers = 2 * settings.processes
    expected = [
        Choice(
            name,
            sum(len(checks.stored_bytes(item.image, resize)) for item in photographs),
            2 * 3 * 2 / workers,
            resize == settings.resize,
        )
        for name, resize in (CHOICES | more).items()
    ]
    expected += [
        Choice(
            f"captions, {name}",
            StoreEstimate(3, 3, 9, 8, 8, name).bytes,
            1 / 2 + 1 / workers,
            name == settings.embedding,
        )
        for name in records.EMBEDDINGS
    ]
    assert rows == expected and price == 0.5
    seconds = 12 / workers + 1 / 2 + 1 / workers
    assert (
        f"about {seconds:.0f} s in 2 processes, each with {settings.processes} w"
        in capsys.readouterr().out
    )


def test_a_preview_needs_no_weights_and_writes_nothing(tmp_path):
    """Catches a preview that needs 9 GB of weights, or that leaves files behind."""
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(find_encoder("t5_tiny") / name, encoder)
    options = [
        "--source",
        "emoji",
        "--output",
        str(tmp_path / "o"),
        "--encoder",
        str(encoder),
        "--preview_captions",
    ]
    run = lambda *more: subprocess.run(
        [sys.executable, "-m", "imagen_jax.prepare_data", *options, *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    done = run("6659", "--shard_size", "512")
    assert done.returncode == 0 and "26.8 MiB in 14 shards" in done.stdout, (
        done.stderr
    )  # written, it has 27.2 MiB
    assert {path.name for path in tmp_path.iterdir()} == {"encoder"}
    done = run("-5")
    assert done.returncode == 2 and done.stderr.endswith(
        "error: flag --preview_captions=-5: -5 is not a non-negative integer\n"
    )
