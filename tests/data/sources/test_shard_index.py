"""The index of shards: unchanged shards are not opened again, whatever happens to the index."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from imagen_jax import prepare_data
from imagen_jax.data.sources import shard_index, summaries
from imagen_jax.data.sources.parquet import ParquetSource
from imagen_jax.data.sources.shard_index import ShardIndex, Summary
from imagen_jax.data.sources.webdataset import WebDatasetSource
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.object_storage import file_state
from tests.data.sources import layouts, parquet_files
from tests.data.sources.test_webdataset import tar_bytes, triple
from tests.data.synthetic_source import FakeEncoder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def tars(tmp_path):
    """Five tars with three items each, one without image; a sixth is not a tar."""
    for i in range(5):
        members = [*triple(f"{i}a", f"first of {i}"), *triple(f"{i}b"), (f"{i}.cls", b"1")]
        (tmp_path / f"{i}.tar").write_bytes(tar_bytes(members))
    (tmp_path / "5.tar").write_bytes(b"no tar" * 200)
    return tmp_path


@pytest.fixture
def summarized(monkeypatch):
    """The names of the shards that are summarized, in the order of their names."""
    names = []
    for kind in (WebDatasetSource, ParquetSource):
        original = kind.summarize
        noted = lambda self, path, make=original: names.append(path.name) or make(self, path)
        monkeypatch.setattr(kind, "summarize", noted)

    def take():
        found = sorted(names)
        names.clear()
        return found

    return take


def opened(tars, *options, index=True):
    source = f"webdataset:{tars}/{{0..5}}.tar"
    return layouts.opened(source, *options, index=tars / "i" / "x.jsonl" if index else None)


def content(source):
    return source.describe(), source.notes(), [source[i] for i in range(len(source))]


def test_unchanged_shards_are_not_opened_again(tars, summarized):
    """Catches shards that every start looks at, and items or notes lost on the way."""
    plain = content(opened(tars, index=False))
    assert len(summarized()) == 6
    assert content(opened(tars)) == plain and len(summarized()) == 6
    # The damaged one is looked at again: it may have become readable.
    assert content(opened(tars)) == plain and summarized() == ["5.tar"]
    assert [note["reason"] for note in plain[1]] == ["ignored_member"] * 5 + ["unreadable_shard"]


@pytest.mark.parametrize("change", ["time", "size"])
def test_a_changed_shard_is_summarized_again(tars, summarized, change):
    """Catches items of the shard as it was."""
    before = opened(tars).describe()
    summarized()
    stat = os.stat(tars / "3.tar")
    if change == "size":
        (tars / "3.tar").write_bytes(tar_bytes([*triple("x"), ("y.jpg", b"a" * 20_000)]))
    os.utime(tars / "3.tar", ns=(stat.st_mtime_ns, stat.st_mtime_ns + (change == "time")))
    after = content(opened(tars))
    assert summarized() == ["3.tar", "5.tar"] and (after[0] == before) == (change == "time")
    assert after == content(opened(tars, index=False))


def test_an_interrupted_opening_continues(tars, summarized, monkeypatch):
    """Catches an index that is only written at the end."""
    summarize, left = WebDatasetSource.summarize, [3]

    def interrupted(self, path):
        left[0] -= path.name != "5.tar"
        if left[0] < 0:
            raise KeyboardInterrupt
        return summarize(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(summaries, "THREADS", 1)
        patch.setattr(WebDatasetSource, "summarize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened(tars)
    assert len(summarized()) in (3, 4)
    assert len(opened(tars)) == 15 and len(summarized()) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],  # torn
        lambda data: data.replace(b'"items": 3', b'"items": "3"', 1),
        lambda data: data.replace(b'"items": 3', b'"items": -3', 1),
        lambda data: data.replace(b'"reason"', b'"season"', 1),
        lambda data: data.replace(b'"notes": [', b'"notes": [3, ', 1),
        lambda data: data.replace(b'"columns": []', b'"columns": [1]', 1),
        lambda data: data.replace(b'{"key"', b"[" * 5000 + b'{"key"', 1),
        lambda data: data.replace(b'{"key"', b'\xff{"key"', 1),
    ],
)
def test_a_damaged_line_costs_one_shard(tars, summarized, damage):
    """Catches a line cut by a kill that ends the run, or that spoils the next one."""
    plain, index = content(opened(tars)), tars / "i" / "x.jsonl"
    summarized()
    data = damage(b"null\n3\n\n{}\n" + index.read_bytes())
    assert data != index.read_bytes()
    index.write_bytes(data)
    assert content(opened(tars)) == plain and len(summarized()) == 2
    assert content(opened(tars)) == plain and summarized() == ["5.tar"]


def test_only_options_that_matter_summarize_again(tmp_path, tars, summarized):
    """Catches notes of other columns or names, and a new caption field that costs an hour."""
    opened(tars)
    summarized()
    opened(tars, "--heldout=0.5", "--where=width > 2", "--webdataset_captions=caption")
    assert summarized() == ["5.tar"]
    (tars / "a").mkdir()
    (tars / "a" / "3.tar").write_bytes((tars / "3.tar").read_bytes())
    index = tars / "i" / "x.jsonl"
    for pattern, name in (("{a/,}3", "a/3"), ("a/3", "3"), ("a/3", "3")):
        found = layouts.opened(f"webdataset:{tars}/{pattern}.tar", index=index)
        assert found[0].id == f"{name}/3a" and found.notes()[0]["id"] == f"{name}.tar"
    assert summarized() == ["3.tar", "3.tar"]
    rows = [row | {"id": 1, "width": 2} for row in parquet_files.good(2)]
    source = f"parquet:{parquet_files.write(tmp_path / 'p.parquet', rows)}"
    for options, again, reasons in [
        (["--parquet_key=id"], 1, ["repeated_key"]),
        (["--parquet_key=id", "--where=width > 1"], 0, ["repeated_key"]),
        ([], 1, []),
        (["--heldout=0.1"], 0, []),
    ]:
        found = layouts.opened(source, *options, index=index)
        assert (len(summarized()), [note["reason"] for note in found.notes()]) == (again, reasons)
    with pytest.raises(ValueError, match="no shard has the column hight: .* caption, id, image"):
        layouts.opened(source, "--where=hight > 1", index=index)
    assert summarized() == []


def append(path, name):
    index, stat = ShardIndex(path), file_state(path.parent)
    for i in range(200):
        index.add(Path(f"{name}/{i}"), "k", stat, Summary(i + 1, name * 100))


def test_two_processes_append(tmp_path, monkeypatch):
    """Catches lines that are mixed or overwritten, and lines of others that are not seen."""
    monkeypatch.setattr(shard_index, "REFRESH_S", 0.0)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"key": "torn')
    stat = file_state(tmp_path)
    reader = ShardIndex(path)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=append, args=(path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    names = [f"{name}/{i}" for name in "ab" for i in range(200)]
    found = [reader.find(Path(name), "k", stat) for name in names]
    assert [summary and summary.items for summary in found] == [*range(1, 201)] * 2
    assert found[300].digest == "b" * 100 and reader.find(Path("a/0"), "other", stat) is None


def test_work_of_another_process_is_not_repeated(tars, summarized, monkeypatch):
    """Catches hosts that each open every shard."""
    monkeypatch.setattr(shard_index, "REFRESH_S", 0.0)
    whole = content(opened(tars))
    summarized()
    lines = (tars / "i" / "x.jsonl").read_bytes()
    (tars / "i" / "x.jsonl").unlink()
    summarize = WebDatasetSource.summarize

    def meanwhile(self, path):
        (tars / "i" / "x.jsonl").write_bytes(lines)
        return summarize(self, path)

    monkeypatch.setattr(WebDatasetSource, "summarize", meanwhile)
    assert content(opened(tars)) == whole and len(summarized()) <= 2


def test_processes_find_what_threads_find(tars, monkeypatch):
    """Catches notes, columns or shards that are lost between processes."""
    plain = content(opened(tars, index=False))
    monkeypatch.setattr(summaries, "PROCESSES_FROM_S", -1.0)
    monkeypatch.setattr(summaries, "THREADS", 1)
    assert content(opened(tars)) == plain
    assert len((tars / "i" / "x.jsonl").read_bytes().split()) > 5


def prepare(tars, output, *more):
    values = flags.FlagValues()
    prepare_data.define_flags(values)
    base = ["--encoder=t5_tiny", "--max_length=16", "--processes=1", f"--output={output}"]
    values(["prepare_data", f"--source=webdataset:{tars}/?.tar", *base, *more])
    prepare_data._run(values)


def test_prepare_data_keeps_an_index(tars, tmp_path, summarized, monkeypatch):
    """Catches an index that is not used, that a dry run writes, or that is left behind."""
    monkeypatch.setattr(prepare_data, "_encoders", lambda *_: Encoders.single(FakeEncoder()))
    output, index = tmp_path / "out" / "data", tmp_path / "out" / "data" / "partial" / "index.jsonl"
    prepare(tars, output, "--dry_run")
    assert len(summarized()) == 6 and not output.parent.exists()
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "prepare", lambda *_: 0)
        prepare(tars, output)
    assert len(summarized()) == 6 and index.read_bytes().count(b"digest") == 5
    before = index.read_bytes()
    prepare(tars, output, "--dry_run")
    assert summarized() == ["5.tar"] and index.read_bytes() == before
    (index.parent / "other").write_text("")
    with pytest.raises(ValueError, match="data/partial is in the way"):
        prepare(tars, output)
    (index.parent / "other").unlink()
    assert summarized() == []
    prepare(tars, output)
    assert summarized() == ["5.tar"] and [path.name for path in output.parent.iterdir()] == ["data"]


OPEN = '''
import multiprocessing, sys, time
from pathlib import Path
from imagen_jax import cli
from imagen_jax.data.sources import summaries
from imagen_jax.object_storage import file_state
from imagen_jax.data.sources.shard_index import ShardIndex
from imagen_jax.data.sources.webdataset import WebDatasetSource

class Slow(WebDatasetSource):
    """One shard takes a minute, in a worker; the other worker has nothing to do then."""

    def summarize(self, path):
        if multiprocessing.parent_process():
            try:
                Path(sys.argv[2]).with_name("slow").touch(exist_ok=False)
                time.sleep(60)
            except FileExistsError:
                pass
        return super().summarize(path)

def main():
    summaries.PROCESSES_FROM_S = -1.0
    summaries.THREADS = summaries.MOST_PROCESSES = 2
    Slow(sys.argv[1], 0.0, index=ShardIndex(sys.argv[2]))

if __name__ == "__main__":
    sys.exit(cli.guard(main))
'''


def lines_of(index):
    return index.read_bytes().count(b"digest") if index.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_worker_processes_end_with_the_command(tmp_path, number):
    """Catches tracebacks of workers after Ctrl-C, workers that survive, and lost summaries."""
    for i in range(20):
        (tmp_path / f"{i:03d}.tar").write_bytes(tar_bytes(triple("a")))
    index, program = tmp_path / "x.jsonl", tmp_path / "program.py"
    program.write_text(OPEN)
    started = subprocess.Popen(
        [sys.executable, program, f"{tmp_path}/*.tar", index],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 60
    while lines_of(index) < 19 and time.monotonic() < deadline:
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(started.pid, number)
    else:
        started.kill()
    errors = started.communicate(timeout=20)[1]  # ends when no worker has the pipe any more
    if number == signal.SIGINT:
        assert started.returncode == 130 and errors.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in errors and lines_of(index) == 19
