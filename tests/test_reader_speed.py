"""tools/reader_speed.py on a few small images, without PyTorch."""

import dataclasses
import os
import subprocess
import time

import numpy as np
import pytest

from tools import reader_speed
from tools.reading import fixture, measure, readers

IMAGES, SIDE, SIZE = 6, 96, 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("reading") / "data"
    fixture.make(root, IMAGES, SIDE, [SIZE], text_dim=8)
    return root


def test_every_reader_has_its_rows(data, monkeypatch, caplog):
    """Wrong: a layout or a config that is not measured, a DataLoader that is required."""
    monkeypatch.setattr(reader_speed, "OPTIONAL", ("torch_that_is_missing",))
    cores = len(os.sched_getaffinity(0))
    here = lambda reading, *times: dataclasses.asdict(measure.measure(reading, *times))
    monkeypatch.setattr(reader_speed, "_measure", here)
    baseline = reader_speed.baseline_available()
    assert "torch_that_is_missing: not installed, so DataLoader is left out" in caplog.text
    readings = reader_speed.plan(data, [SIZE], 4, 0, baseline)
    rows = reader_speed.measured(readings, rounds=1, seconds=0.02, cores=cores)
    lines = reader_speed.table(rows).splitlines()[2:]
    found = [tuple(line.split(" | ")[:4]) for line in lines]
    both = lambda reader, path: [(f"| {SIZE}", reader, path, d) for d in ("exact", "draft")]
    small = lambda reader: [(f"| {SIZE}", reader, f"prepared_{SIZE}", "exact")]
    assert found == [
        *both("tar", "tars"),
        *both("parquet", "parquet"),
        *both("prepared", "prepared"),
        *small("prepared"),
        *both("prepared, base_64", "prepared"),
        *small("prepared, base_64"),
    ]
    assert all(row["images_per_s"] > 0 and row["cpu_ratio"] is None for row in rows)


def test_readers_read_the_same_pixels(data):
    """Wrong: a reader of other images, of another size, or with another decoder."""
    read = lambda reader, folder, decode: readers.Reading(
        reader, str(data / folder), SIZE, decode, "", IMAGES, 0
    )
    batches = {}
    for reader, folder in (("tar", "tars"), ("parquet", "parquet"), ("prepared", "prepared")):
        stream = readers.READERS[reader](read(reader, folder, "exact"))
        batches[reader] = sorted(image.tobytes() for image in np.asarray(next(stream)))
        stream.close()
    assert batches["tar"] == batches["parquet"] and len(set(batches["tar"])) == IMAGES
    assert set(batches["prepared"]) <= set(batches["tar"])  # shuffled, with repeats


def test_ratios_are_of_the_same_round(monkeypatch):
    """Wrong: the ratio of the medians, which a slow phase of the machine distorts."""
    speeds = {"DataLoader": [2.0, 8.0, 4.0], "tar": [4.0, 4.0, 8.0]}
    measured = {name: iter(found) for name, found in speeds.items()}
    monkeypatch.setattr(
        reader_speed,
        "_measure",
        lambda reading, *_: {
            "images_per_s": next(measured[reading["reader"]]),
            "cpu_ms": {"DataLoader": 3.0, "tar": 2.0}[reading["reader"]],
            "first_batch_s": 1.0,
        },
    )
    common = {"path": "DATA/tars", "size": 64, "decode": "exact", "config": ""}
    rows = reader_speed.measured([common | {"reader": name} for name in speeds], 3, 1.0, 1)
    assert [row["ratio"] for row in rows] == [1.0, 2.0]
    assert [row["cpu_ratio"] for row in rows] == [1.0, 1.5]
    assert [(row["lowest"], row["images_per_s"], row["highest"]) for row in rows] == [
        (2.0, 4.0, 8.0),
        (4.0, 4.0, 8.0),
    ]


def test_cpu_time_counts_descendants():
    """Wrong: the time of worker processes is left out."""
    child = subprocess.Popen(["sh", "-c", "while :; do :; done"])
    try:
        deadline = time.monotonic() + 20
        while (passed := measure.cpu_seconds(child.pid)) < 0.05 and time.monotonic() < deadline:
            pass
        own = measure.cpu_seconds(os.getpid())
        assert passed >= 0.05 and own >= time.process_time() - 0.1 + passed
    finally:
        child.kill()
        child.wait()


def test_wrong_input_is_refused(tmp_path):
    """Wrong: a traceback, or an empty table."""
    with pytest.raises(ValueError, match="has none of the folders prepared, tars and parquet"):
        reader_speed.plan(tmp_path, [SIZE], 4, 0, False)
    with pytest.raises(ValueError, match="--sizes 64,x: give whole numbers above 0"):
        reader_speed._sizes(["64", "x"])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty; give a new directory"):
        fixture.make(tmp_path, 1, SIDE, [], text_dim=8)


def test_a_reader_that_hangs_is_an_error(tmp_path, monkeypatch):
    """Catches a measurement that waits for ever."""
    monkeypatch.setattr(reader_speed, "START_S", 0.1)
    with pytest.raises(ValueError, match="tars cannot be read at 64: no result within 0.2 s"):
        reader_speed._measure({"path": str(tmp_path / "tars"), "size": 64}, 0.01, 1)
