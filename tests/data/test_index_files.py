"""Files that are computed from prepared data once."""

import pickle
import threading
import time

import numpy as np
import pytest

from imagen_jax.data import buckets, index_files


def test_a_file_is_written_once(tmp_path):
    """Catches two writers at a time, and a name that appears before its content."""
    written = []

    def write(path):
        written.append(path)
        assert not (tmp_path / "file.npy").exists()
        time.sleep(0.05)
        np.save(path.open("wb"), np.arange(3))

    build = lambda: index_files.build_once(tmp_path / "file.npy", write)
    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1 and [path.name for path in tmp_path.iterdir()] == ["file.npy"]

    def fail(path):
        path.write_bytes(b"half")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        index_files.build_once(tmp_path / "other.npy", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file.npy"]


def test_rows_of_a_bucket_are_not_held_in_memory(tmp_path):
    """Catches rows that are pickled to every worker, or read as a whole."""
    path = tmp_path / "rows.npy"
    np.save(path, np.arange(100_000, dtype=np.uint32))
    rows = buckets.BucketRows(index_files.MappedArray(path), 10, 50_000)
    assert rows[0] == 10 and isinstance(rows.mapped.array, np.memmap)
    copy = pickle.loads(content := pickle.dumps(rows))
    assert copy[49_999] == 50_009 and len(content) < 1000
    with pytest.raises(IndexError, match="has no image 50000"):
        copy[50_000]
