"""The measurement of prepare_data on synthetic items: what it prepares, samples and prints."""

import time

import pytest

from imagen_jax.data import records
from imagen_jax.data.prepare.work_directory import work_directory
from tools import prepare_memory


def test_items_are_distinct_and_prepared(tmp_path, monkeypatch):
    """Catches items that are skipped or merged, so that fewer are measured than the table says."""
    monkeypatch.setattr(prepare_memory, "_SAMPLE_S", 0.005)
    row = prepare_memory.measure(70, tmp_path / "70", processes=1, shard_size=32)
    prepared = records.Prepared(tmp_path / "70")
    counts = prepared.manifest["counts"]
    assert (counts["images"]["train"], counts["captions"], row["shards"]) == (70, 70, 6)
    assert row["work_bytes"] > 70 * 100 and row["main_bytes"] >= row["start_bytes"] > 2**20
    assert row["result_bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "70").rglob("*.array_record-*")
    )
    row["opening"] = {"64 images": {"opening_s": 0.25, "total_s": 2.5}}
    lines = prepare_memory.table([row]).splitlines()
    assert lines[0] == "| items | 70 |" and lines[-1].endswith(
        "64 images, in s; with imports | 0.25; 2.50 |"
    )


def test_work_files_without_the_result_are_counted(tmp_path, monkeypatch):
    """Catches the result counted as work files, and a maximum that is the last value."""
    monkeypatch.setattr(prepare_memory, "_SAMPLE_S", 0.005)
    for directory in (tmp_path / "images", work_directory(tmp_path) / "plan"):
        directory.mkdir(parents=True)
        (directory / "x").write_bytes(b"x" * 50_000)
    with prepare_memory.sampled(work_directory(tmp_path)) as peaks:
        deadline = time.monotonic() + 5
        while not peaks["work_bytes"] and time.monotonic() < deadline:
            time.sleep(0.01)
        (work_directory(tmp_path) / "plan" / "x").unlink()
    assert 50_000 <= peaks["work_bytes"] < 70_000


@pytest.mark.slow
def test_first_batch_of_a_new_process(tmp_path):
    """Catches a process that does not end because of its data workers, and imports counted."""
    prepare_memory.measure(70, tmp_path / "70", processes=1, shard_size=32)
    for workers in (0, 1):
        took = prepare_memory.first_batch(tmp_path / "70", 64, workers)
        assert 0 < took["opening_s"] < took["total_s"] - 0.3
