"""Ingestion on a Beam runner writes the files of the worker pool, byte for byte."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from imagen_jax import prepare_data
from imagen_jax.data.prepare import ingest, passes
from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.exit_codes import PipelineFailed
from tests import tiny
from tests.data.synthetic_source import (
    SETTINGS,
    FakeEncoder,
    is_complete,
    skipped,
    tree,
    write_folder,
)

pytestmark = pytest.mark.slow
beam = pytest.importorskip("apache_beam", reason="needs the extra `beam`")
from imagen_jax.data.prepare import beam_ingest  # noqa: E402

TWO_WORKERS = [
    "--runner=DirectRunner",
    "--direct_num_workers=2",
    "--direct_running_mode=multi_processing",
]


@pytest.fixture(scope="module")
def tangled(tmp_path_factory):
    """Ramps, and equal pictures in both splits, captions of several pictures, and bad items."""
    folder = write_folder(tmp_path_factory.mktemp("tangled") / "in")
    rng, lines = random.Random(0), []
    for i in range(24):
        shutil.copy(folder / f"{rng.randrange(20):03d}.png", folder / f"copy{i:02d}.png")
        texts = [f"picture number {rng.randrange(30)}" for _ in range(rng.randrange(1, 4))]
        texts += rng.choice([[], [" "], ["a\u200bb"], ["a colour ramp", "a colour ramp"]])
        lines.append({"file": f"copy{i:02d}.png", "captions": texts})
    lines.append({"file": "missing.png", "captions": ["nothing"]})
    with open(folder / "captions.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    (folder / "copy03.png").write_bytes(b"not a picture")
    (folder / "notes.doc").write_bytes(b"ignored")
    return folder


def prepared(folder, output, how=ingest.ingest, **changes):
    settings = passes.Settings(**SETTINGS | changes)
    passes.prepare(FolderSource(folder, 0.4), Encoders.single(FakeEncoder()), output, settings, how)
    return tree(output)


@pytest.fixture(scope="module")
def by_pool(tangled, tmp_path_factory):
    output = tmp_path_factory.mktemp("pool") / "data"
    files = prepared(tangled, output)
    reasons = {line["reason"] for line in skipped(output)}
    assert reasons >= {"duplicate_image", "duplicate_image_in_other_split", "duplicate_caption"}
    assert reasons >= {"missing_image", "broken_image", "empty_caption", "ignored_file"}
    return files


@pytest.mark.parametrize("block", [1, 5, 4096])
def test_the_same_bytes(tangled, by_pool, tmp_path, block, monkeypatch):
    """Catches an order that depends on grouping, lost lines, and numbers that jump or repeat."""
    monkeypatch.setattr(beam_ingest, "BLOCK", block)
    monkeypatch.setattr(ingest, "CHUNK", 4)
    assert prepared(tangled, tmp_path / "data", beam_ingest.on_runner(TWO_WORKERS[:1])) == by_pool


def test_the_same_bytes_with_two_workers(tangled, by_pool, tmp_path):
    """Catches state of this process that workers lack, and shards written by none or by two."""
    how = beam_ingest.on_runner(TWO_WORKERS)
    assert prepared(tangled, tmp_path / "data", how) == by_pool


@pytest.mark.parametrize("first", ["pool", "pipeline"])
def test_the_pool_continues_a_pipeline_and_the_other_way_round(
    tangled, by_pool, tmp_path, first, monkeypatch
):
    """Catches work files that only their own engine can read, or that the other makes again."""
    engines = {"pool": ingest.ingest, "pipeline": beam_ingest.on_runner(TWO_WORKERS[:1])}
    second = next(name for name in engines if name != first)
    monkeypatch.setattr(ingest, "CHUNK", 4)
    original, done = ingest.check_span, []

    def stop_after_five(*args):
        if len(done) == 5:
            raise OSError(5, "Input/output error", "a file")
        done.append(args[2])
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "check_span", stop_after_five)
        with pytest.raises((OSError, PipelineFailed)):
            prepared(tangled, tmp_path / "data", engines[first])
    more = []
    monkeypatch.setattr(ingest, "check_span", lambda *args: more.append(args[2]) or original(*args))
    assert prepared(tangled, tmp_path / "data", engines[second]) == by_pool
    assert len(more) > 5 and not {*done} & {*more}


def test_no_usable_image_is_the_same_error(tmp_path):
    """Catches an empty collection that fails somewhere inside the pipeline."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"not a picture")
    (tmp_path / "in" / "a.txt").write_text("a caption")
    with pytest.raises(ValueError, match="no usable image in --source: 1 broken_image, such as"):
        prepared(tmp_path / "in", tmp_path / "data", beam_ingest.on_runner(TWO_WORKERS[:1]))


def test_a_worker_that_fails_is_one_line(tangled, tmp_path, monkeypatch):
    """Catches pages of tracebacks in an error message, and a result that is published."""

    def fail(*args):
        raise OSError(5, "Input/output error", "/mnt/pictures/003.png")

    monkeypatch.setattr(ingest, "check_span", fail)
    cause = "OSError: .Errno 5. Input/output error: '/mnt/pictures/003.png' .while running 'check'."
    with pytest.raises(PipelineFailed, match=f"^the Beam pipeline failed: {cause}; run the same"):
        prepared(tangled, tmp_path / "data", beam_ingest.on_runner(TWO_WORKERS[:1]))
    assert not is_complete(tmp_path / "data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--runner=DirectRunner --direct_num_workers=many",
            "--beam: argument --direct_num_workers: invalid int value",
        ),
        ("--help", "^--beam: give the options of a runner"),
        ("--runner='DirectRunner", "--beam .* No closing quotation"),
        ("--runnner=FlinkRunner", "names no runner: give --runner=DirectRunner"),
        ("--runner=DirectRunner --direct_num_worker=2", "has no option --direct_num_worker$"),
        ("--runner=MyRunner", "Unexpected pipeline runner: MyRunner. Valid values are "),
    ],
)
def test_wrong_options_are_refused_before_the_source_is_opened(tmp_path, options, message):
    """Catches a usage text of Beam, and a mistake found after hours of opening shards."""
    values = flags.FlagValues()
    prepare_data.define_flags(values)
    values(["", "--source=folder:absent", f"--output={tmp_path / 'o'}", "--images_only"])
    values.beam = options
    with pytest.raises(ValueError, match=message):
        prepare_data._run(values)


def test_a_worker_without_the_shared_file_system(tangled, tmp_path, monkeypatch):
    """Catches images that count as missing, and files on the disk of a worker."""
    monkeypatch.setattr(beam_ingest, "write_atomically", lambda *_: None)  # no token
    with pytest.raises(ValueError, match="data/partial is another directory on the worker "):
        prepared(tangled, tmp_path / "data", beam_ingest.on_runner(TWO_WORKERS[:1]))


def test_killed_and_continued(tangled, by_pool, tmp_path):
    """Catches half-written files that a second pipeline trusts, and workers that live on."""
    output, partial = tmp_path / "data", tmp_path / "data" / "partial"
    command = [sys.executable, "-m", "imagen_jax.prepare_data", f"--source=folder:{tangled}"]
    command += [f"--output={output}", "--images_only", "--heldout=0.4", "--shard_size=8"]
    command += [f"--beam={' '.join(TWO_WORKERS)}"]
    # Killed once there is something in these folders, and all three times before the end.
    for folder in ("checked", "plan", "journal"):
        with subprocess.Popen(command, cwd=tiny.ROOT, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not any((partial / folder).glob("*")):
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    subprocess.run(command, cwd=tiny.ROOT, check=True)
    assert prepared(tangled, output) == by_pool
