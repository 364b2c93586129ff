"""prepare_data with an output in a bucket: the bytes of a local one, through kills and failures."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from absl import flags

from imagen_jax import exit_codes, locks, many_files, prepare_data, storage
from imagen_jax.data import manifest_file
from imagen_jax.data.prepare import work_directory
from tests import processes, storage_emulator, tiny
from tests.data.synthetic_source import FakeEncoder, named, prepare, stored, tree

DELAY_S = 0.01


@pytest.fixture(scope="module")
def server():
    """The environment of a server that does not fail; set for this process too."""
    with storage_emulator.used() as env:
        yield env


@pytest.fixture
def output(server, request):
    """A directory in the bucket that does not exist."""
    return storage_emulator.directory_of(request) / "data"


def run(folder, output, *more):
    values = flags.FlagValues()
    prepare_data.define_flags(values)
    base = [f"--source=folder:{folder}", f"--output={output}", "--processes=1", "--heldout=0.2"]
    values(["prepare_data", *base, *more])
    prepare_data._run(values)


def start(folder, output, kill_at=0, workers=1):
    """Prepares in a process that dies at the `kill_at`-th file that it stores."""
    program = ["-m", "tests.data.synthetic_source", str(folder), os.fspath(output)]
    command = [sys.executable, *program, str(workers), str(kill_at)]
    return subprocess.Popen(
        command, cwd=tiny.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def test_the_bytes_of_a_local_output(folder, two, output):
    """Catches local paths in the bytes, a file that is not stored, and work files that stay."""
    prepare(folder, output, named())
    assert tree(output) == tree(two)
    encoder = FakeEncoder()
    with pytest.raises(ValueError, match="text encoders were wide, tiny, are a single unnamed one"):
        prepare(folder, output, encoder)
    shard = next(name for name in tree(two) if name.startswith("images/images-train"))
    storage.write_atomically(output / shard, b"short")
    with pytest.raises(ValueError, match="cut short: remove gs://"):
        prepare(folder, output, named())


def test_killed_and_continued(folder, whole, output):
    """Catches work done twice or lost, and an unfinished output that readers take for a whole one.

    Killed with two shards of images in the journal, then with all of them and one of
    captions.
    """
    seen = []
    for kill_at in (20, 7):
        process = start(folder, output, kill_at)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors.decode()
        seen.append(stored(output))
        assert seen[-1].items() <= tree(whole).items()
        with pytest.raises(ValueError, match="data is not complete: the same prepare_data command"):
            manifest_file.read_manifest(output)
    of = lambda store, files: [name for name in files if name.startswith(store)]
    assert [len(of("images/", files)) for files in seen] == [2, 4]
    assert [len(of("captions/", files)) for files in seen] == [0, 1]
    encoder = FakeEncoder()
    prepare(folder, output, encoder)
    assert tree(output) == tree(whole)
    assert len(encoder.encoded) == 13  # shards of 8, 8 and 5 captions


def test_the_command(folder, texts, output, capsys):
    """Catches a flag that needs a local directory, and a dry run that writes."""
    run(folder, output, "--text_only", "--dry_run")
    assert "captions, text only" in capsys.readouterr().out and storage.file_names(output) == []
    run(folder, output, "--images_only", "--shard_size=8")
    assert f"the images are in {output}; the same command" in capsys.readouterr().out
    run(folder, output, "--text_only", "--shard_size=8", "--verify")
    assert "every shard matches its checksum" in capsys.readouterr().out
    assert tree(output) == tree(texts)
    shard = "images/images-heldout.array_record-00000-of-00001"
    content = (output / shard).read_bytes()
    storage.write_atomically(output / shard, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="its checksum differs"):
        run(folder, output, "--text_only", "--shard_size=8", "--verify")


def test_what_is_refused(folder, output):
    """Catches files of a user among the shards, and a pipeline whose workers lack the bucket."""
    storage.write_atomically(output / "thesis.txt", b"keep")
    with pytest.raises(ValueError, match="exists and is not prepared data: choose another"):
        run(folder, output, "--text_only")
    with pytest.raises(ValueError, match="--beam writes to a file system .* mount the bucket"):
        run(folder, output, "--images_only", "--beam=--runner=DirectRunner")
    assert storage.file_names(output) == ["thesis.txt"]
    with pytest.raises(ValueError, match="there is no bucket gs://no-such-bucket"):
        run(folder, "gs://no-such-bucket/data", "--text_only")


def test_the_index_of_shards_is_kept(output):
    """Catches shards that the next command looks at again, and an index that a dry run stores."""
    for read_only, line in ((True, b"one\n"), (False, b"one\n"), (False, b"two\n")):
        with pytest.raises(KeyboardInterrupt):
            with work_directory.shard_index(output, read_only) as file:
                with open(file, "ab") as index:
                    index.write(line)
                raise KeyboardInterrupt
        assert storage.exists(output / "partial" / "index.jsonl") != read_only
    with work_directory.shard_index(output, True) as file:
        assert file.read_bytes() == b"one\ntwo\n"
    assert storage.file_names(output) == ["partial/index.jsonl"]


def test_many_files_at_once(output, monkeypatch):
    """Catches results in the order of completion, all items in memory, and one file at a time."""
    monkeypatch.setattr(many_files, "THREADS", 4)
    barrier, drawn = threading.Barrier(4, timeout=10), []

    def items():
        for i in range(12):
            drawn.append(i)
            yield i

    def work(i):
        barrier.wait()
        time.sleep(random.random() / 100)
        return i

    results = many_files.each(work, items(), output)
    assert next(results) == 0 and len(drawn) <= 4
    assert list(results) == list(range(1, 12))


@pytest.fixture
def failing():
    """The environment of a server that fails requests; set for this process too."""
    with storage_emulator.used(0.05, DELAY_S, seed=3) as env:
        yield env


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_with_worker_processes_and_failures(failing, folder, whole, output):
    """Catches a worker that gives up after a failed request or spoils the next run."""
    rng, killed = random.Random(1), 0
    while killed < 4:
        process = start(folder, output, workers=2)
        try:
            _, errors = process.communicate(timeout=rng.uniform(4, 12))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
        else:
            assert process.returncode == 0, errors.decode()
            break
        assert stored(output).items() <= tree(whole).items()
    process = start(folder, output, workers=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    assert killed and tree(output) == tree(whole)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_processes_and_one_killed(failing, folder, whole, output, tmp_path):
    """Catches hosts that need a common disk, and one that waits for a lost one."""
    for count, victim, kill_at in ((2, 1, 5), (2, 0, 9), (1, 0, 7), (2, None, 0)):
        command = lambda index: [
            *("-m", "tests.data.synthetic_source", str(folder), os.fspath(output), "1"),
            str(kill_at if index == victim else 0),
        ]
        started = processes.start(command, tmp_path / "log", count, count)
        codes = [process.wait(timeout=300) for process in started]
        logs = [processes.log_of(tmp_path / "log", i).read_text() for i in range(count)]
        expected = [-signal.SIGKILL if i == victim else exit_codes.LOST for i in range(count)]
        assert codes == (expected if victim is not None else [0, 0]), logs
        assert stored(output).items() <= tree(whole).items()
    assert tree(output) == tree(whole)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_bucket_that_stays_away(failing, folder, whole, output):
    """Catches a traceback, an exit code after which no launcher tries again, and lost work."""
    process = start(folder, output, workers=2)
    while not storage.entry_names(output / "partial" / "journal"):
        time.sleep(0.1)
    storage_emulator.set_failing(failing, 1.0)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == exit_codes.FAILED, errors.decode()
    assert errors.decode().splitlines()[-1].startswith("error: ") and b"Traceback" not in errors
    storage_emulator.set_failing(failing, 0.0)
    before = stored(output)
    assert before and before.items() <= tree(whole).items()
    process = start(folder, output)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and tree(output) == tree(whole), errors.decode()


@pytest.mark.slow
def test_one_command_at_a_time(folder, output, server):
    """Catches two commands that write into one directory."""
    with (
        locks.only_process(work_directory.work_directory(output), "preparing data in"),
        pytest.raises(ValueError, match=r"process \d+ on .* is preparing data in gs://"),
    ):
        prepare(folder, output)
