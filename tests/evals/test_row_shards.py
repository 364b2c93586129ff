"""Values per picture in files: computed once, by any number of processes."""

import numpy as np
import pytest

from imagen_jax.evals.row_shards import RowShards, rows_per_shard

WHAT = {"network": "n"}


def manifest(n, per_prompt=2):
    return [{"row": i, "prompt": f"p{i // per_prompt}", "sha256": f"s{i}"} for i in range(n)]


def shards(tmp_path, rows, what=WHAT, size=3):
    return RowShards(tmp_path, what, rows, 2, size)


class Counting:
    """Values that name their row; remembers the rows that were computed."""

    def __init__(self):
        self.rows = []

    def __call__(self, rows):
        self.rows += [row["row"] for row in rows]
        return np.array([[row["row"], int(row["sha256"][1:])] for row in rows], np.float32)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_computes_every_row_once(tmp_path, processes):
    """Catches a shard of two processes, a ragged last shard that is dropped, and rows in the order
    of the processes.
    """
    table, compute = shards(tmp_path, manifest(10)), Counting()
    for process in reversed(range(processes)):
        table.compute(compute, process, processes, "x")
    assert sorted(compute.rows) == list(range(10))
    np.testing.assert_array_equal(table.joined(), [[i, i] for i in range(10)])


def test_an_interrupted_run_computes_what_is_missing(tmp_path):
    """Catches a second run that computes everything again, or trusts a file that was cut short."""
    table, compute = shards(tmp_path, manifest(10)), Counting()
    table.compute(compute, 0, 1, "x")
    (tmp_path / "rows_000003.npz").unlink()
    cut = tmp_path / "rows_000006.npz"
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"6 rows are missing.*\(1, 1\)"):
        table.joined()
    compute.rows.clear()
    assert table.compute(compute, 0, 1, "x") == 6
    assert compute.rows == [3, 4, 5, 6, 7, 8]
    assert len(table.joined()) == 10


@pytest.mark.parametrize("change", ["picture", "prompt", "network"])
def test_values_of_other_pictures_are_not_used(tmp_path, change):
    """Catches features of the pictures of an earlier evaluation, or of another network."""
    rows, what = manifest(6), WHAT
    shards(tmp_path, rows).compute(Counting(), 0, 1, "x")
    if change == "network":
        what = {"network": "other"}
    else:
        rows[4] = rows[4] | {"picture": {"sha256": "s99"}, "prompt": {"prompt": "q"}}[change]
    changed = shards(tmp_path, rows, what)
    compute = Counting()
    changed.compute(compute, 0, 1, "x")
    assert compute.rows == (list(range(6)) if change == "network" else [3, 4, 5])


@pytest.mark.parametrize(
    ("count", "processes", "batch", "size"),
    [
        (30_000, 4, 256, 512),
        (30_000, 4, 1024, 1024),  # a batch is larger than a shard
        (30_000, 4, 96, 480),
        (1_000, 4, 32, 256),
        (200, 8, 32, 25),
        (200, 1, 256, 200),
        (3, 8, 32, 1),
    ],
)
def test_shards_are_whole_batches_and_leave_no_process_idle(count, processes, batch, size):
    """Catches shards that are padded to several times their size in each batch, and a small set in
    one shard, which one process computes alone.
    """
    assert rows_per_shard(count, processes, batch) == size
