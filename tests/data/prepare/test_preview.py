"""The estimate of a caption store, against a written one and against numbers computed by hand."""

import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from imagen_jax.data import records
from imagen_jax.data.prepare.preview import StoreEstimate, preview_captions
from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.weights.text_encoders import find_encoder
from tests.data.synthetic_source import FakeEncoder, write_folder

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("dim", "rows"), [(256, 2048), (1024, 500)])
def test_size_of_a_store_that_was_written(tmp_path, dim, rows):
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
    parts = [map(records.serialize_caption, captions[start : start + size]) for start in (0, size)]
    written = sum(
        records.write_shard(tmp_path, records.shard_name("captions", "train", i, 2), part)["bytes"]
        for i, part in enumerate(parts)
    )
    tokens = np.mean([len(row.embedding) for row in captions])
    store = StoreEstimate(rows, tokens, np.mean([len(row.text) for row in captions]), dim, size)
    assert store.shards == 2 and store.bytes == pytest.approx(written, rel=0.04)
    assert store.uncompressed == pytest.approx(
        sum(row.embedding.nbytes + len(row.text) for row in captions)
    )


def test_four_hundred_million(tmp_path, capsys):
    """Catches a time without rate or chips, captions counted per image, an assumed price."""
    source = FolderSource(write_folder(tmp_path / "ramps"), 0.0)
    tokenize = FakeEncoder(max_length=6).tokenize
    store = preview_captions(
        source, tokenize, 4096, 400_000_000, 4096, rate=8000, chips=64, price=0.5
    )
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
        f"price     {store.bytes / 2**30 / 2:,.0f} per month" in told
        and "GiB of files until the end, for 200,000,000 images" in told
    )
    preview_captions(source, tokenize, 4096, 1000, 4096, rate=0, chips=0, price=0)
    told = capsys.readouterr().out
    assert "price" not in told and "time" not in told and "1 shards" in told


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
