"""prepare_data: what it stores, and that neither processes nor kills change a byte of it."""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from imagen_jax import exit_codes, prepare_data
from imagen_jax.data import pipeline, records
from imagen_jax.data.prepare import (
    captions,
    ingest,
    kept,
    passes,
    selection,
    shards,
)
from imagen_jax.data.prepare.preview import WORK_BYTES
from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.encoders_in_turn import Encoders
from tests import tiny
from tests.data import synthetic
from tests.data.synthetic_source import (
    SETTINGS,
    FakeEncoder,
    is_complete,
    prepare,
    stored,
    tree,
    write_folder,
)

ROOT = Path(__file__).resolve().parents[3]


def test_everything_is_stored_once_and_linked(folder, whole):
    """Catches captions stored per image, wrong ids or features, padding, re-encoded images."""
    prepared = records.Prepared(whole)
    prepared.verify()
    captions, encoder, source = prepared.captions(), FakeEncoder(), FolderSource(folder, 0.2)
    texts = [captions[i].text for i in range(len(captions))]
    assert sorted(texts) == sorted({"a colour ramp"} | {f"picture number {i}" for i in range(20)})
    for i, text in enumerate(texts):
        np.testing.assert_array_equal(captions[i].embedding, encoder.features(text))
    seen = {}
    for split in ("train", "heldout"):
        for row in range(prepared.num_images(split)):
            image = prepared.images(split)[row]
            seen[image.id] = (image.image, [texts[i] for i in image.caption_ids], split)
    assert seen == {item.id: (item.image, item.captions, item.split) for item in source}
    assert 0 < prepared.num_images("heldout") < 10


def test_manifest_tells_what_is_there(whole):
    """Catches wrong counts, norms over padding or captions, a missing identity."""
    manifest = records.Prepared(whole).manifest
    features = np.concatenate(
        [
            FakeEncoder().features(t)
            for t in ["a colour ramp"] + [f"picture number {i}" for i in range(20)]
        ]
    )
    norms = np.linalg.norm(features.astype(np.float64), axis=1)
    assert manifest["embedding"]["norm"] == pytest.approx(
        {"min": norms.min(), "mean": norms.mean(), "max": norms.max()}
    )
    assert (
        manifest["embedding"]["length"] == {"min": 4, "mean": 4, "max": 4}
        and manifest["embedding"]["tokens"] == 84
    )
    assert manifest["counts"]["captions"] == 21 and sum(manifest["counts"]["images"].values()) == 20
    assert manifest["counts"]["skipped"] == {"duplicate_caption": 19}
    assert (
        manifest["encoder"] == FakeEncoder().identity and manifest["image_sizes"]["min_side"] == 32
    )
    assert str(ROOT) not in json.dumps(manifest) and manifest["source"]["name"] == "ramps"


def test_trained_on_as_it_is(whole):
    """Catches a prepared directory that the pipeline or TFDS cannot read."""
    import tensorflow_datasets as tfds

    size = {
        "image_size": 16,
        "lowres_size": 4,
        "crop_size": 8,
        "text_length": 6,
        "batch_size": 4,
        "workers": 0,
        **synthetic.SQUARES,
    }
    cfg = {"path": str(whole), **size, "flip": False, "caption": "random", "cache_mib": 0}
    reader = pipeline.batches(cfg, 0, 0)
    assert next(reader)["image"].shape == (4, 8, 8, 3)
    reader.close()
    images = tfds.builder_from_directory(whole / "images").as_data_source("train")
    assert images[0]["image"].shape == (32, 32, 3) and len(images) == records.Prepared(
        whole
    ).num_images("train")
    assert len(tfds.builder_from_directory(whole / "captions").as_data_source("train")) == 21


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_change_no_byte(folder, whole, tmp_path, processes, monkeypatch):
    """Catches completion order, time stamps, paths or process ids in the output."""
    monkeypatch.setattr(ingest, "CHUNK", 3)
    prepare(folder, tmp_path / "data", processes=processes)
    assert tree(tmp_path / "data") == tree(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def run_as_a_program(folder, output, processes, kill_at):
    """Prepares in a process that kills itself at the `kill_at`-th rename, or just before it."""
    command = [
        sys.executable,
        "-m",
        "tests.data.synthetic_source",
        str(folder),
        str(output),
        str(processes),
        str(kill_at),
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_killed_at_any_rename_it_continues_to_the_same_bytes(folder, whole, tmp_path):
    """Catches half-written files under final names, and work done twice or lost after SIGKILL."""
    output, rng, killed = tmp_path / "data", random.Random(0), 0
    for _ in range(20):
        process = run_as_a_program(folder, output, 1, rng.randint(2, 12))
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
        killed += 1
        assert stored(output).items() <= tree(whole).items()
    assert killed >= 3 and tree(output) == tree(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_killed_at_any_time_with_workers(folder, whole, tmp_path):
    """Catches workers that outlive a killed parent and spoil the next run."""
    output = tmp_path / "data"
    for seconds in (0.8, 1.6, 2.4):
        process = run_as_a_program(folder, output, 2, 0)
        try:
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert stored(output).items() <= tree(whole).items()
    process = run_as_a_program(folder, output, 2, 0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    assert tree(output) == tree(whole) and [path.name for path in tmp_path.iterdir()] == ["data"]


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "module, last",
    [
        (ingest, "write_images"),
        (captions, "write_captions"),
        (passes, "finish"),
        (ingest, "check_span"),
        (shards, "journal"),
        (selection, "item_lines"),
        (kept, "write_atomically"),
    ],
)
def test_stopped_inside_each_pass_it_continues(folder, whole, tmp_path, module, last, monkeypatch):
    """Catches a pass that starts over, trusts unfinished work, or completes early."""
    output, original, calls = tmp_path / "data", getattr(module, last), []

    def stopping(*args):
        calls.append(args)
        if len(calls) == (1 if last == "finish" else 2):
            raise Stop
        return original(*args)

    monkeypatch.setattr(ingest, "CHUNK", 4)
    with monkeypatch.context() as patch:
        patch.setattr(module, last, stopping)
        with pytest.raises(Stop):
            prepare(folder, output)
    with pytest.raises(ValueError, match="data is not complete: the same prepare_data command"):
        records.Prepared(output)
    encoder = FakeEncoder()
    prepare(folder, output, encoder)
    # Three caption shards of 8, 8 and 5; what was journalled is not encoded again.
    assert (
        len(encoder.encoded)
        == {
            "write_images": 21,
            "finish": 0,
            "write_captions": 13,
            "item_lines": 21,
            "write_atomically": 21,
            "journal": 21,
            "check_span": 21,
        }[last]
    )
    assert tree(output) == tree(whole)


def test_other_arguments_are_refused(folder, tmp_path, monkeypatch):
    """Catches two settings mixed in one directory, and a complete run done again."""
    output = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(passes, "finish", lambda *a: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            prepare(folder, output)
    for changes in ({"shard_size": 9}, {"encoder": FakeEncoder(max_length=3)}, {"heldout": 0.5}):
        with pytest.raises(
            ValueError, match="was made with other settings .*choose another --output or remove"
        ):
            prepare(folder, output, **changes)
    first = prepare(folder, output)
    with pytest.raises(ValueError, match="shard_size was 8, is 9"):
        prepare(folder, output, shard_size=9)
    encoder = FakeEncoder()
    assert prepare(folder, output, encoder, processes=2) == first and not encoder.encoded
    with pytest.raises(ValueError, match="is not prepared data: choose another --output"):
        prepare(folder, folder)


def test_only_what_differs_is_named(folder, tmp_path, monkeypatch):
    """Catches whole descriptions of source and encoder in an error line."""
    with monkeypatch.context() as patch:
        patch.setattr(passes, "finish", lambda *a: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            prepare(folder, tmp_path / "data")
    with pytest.raises(ValueError) as error:
        prepare(folder, tmp_path / "data", heldout=0.5)
    output = tmp_path / "data"
    told = f"{output} was made with other settings (source.heldout was 0.2, is 0.5): choose"
    assert str(error.value) == f"{told} another --output or remove {output}"


def test_settings_may_change_while_nothing_is_selected(folder, whole, tmp_path):
    """Catches a mistaken limit that makes the corrected command fail."""
    with pytest.raises(ValueError, match="no usable image"):
        prepare(folder, tmp_path / "data", min_size=100)
    prepare(folder, tmp_path / "data")
    assert tree(tmp_path / "data") == tree(whole)


def test_a_split_without_images_is_a_warning(folder, tmp_path, capsys):
    """Catches a validation that never runs, unnoticed."""
    prepare(folder, tmp_path / "data", heldout=0.0001)
    assert "warning: --heldout 0.0001 holds out none of these images" in capsys.readouterr().out
    prepare(folder, tmp_path / "none", heldout=0)
    told = capsys.readouterr().out
    assert "note: no image is held out" in told
    assert "text encoder fake: features of width 8, captions of up to 4 tokens\n" in told


def test_work_files_that_were_shortened_are_errors(folder, tmp_path, monkeypatch):
    """Catches items that vanish, and captions whose ids shift, without a word."""
    output, partial = tmp_path / "data", tmp_path / "data" / "partial"
    monkeypatch.setattr(ingest, "CHUNK", 4)

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(passes, "finish", stop)
        prepare(folder, output)
    entry = next((partial / "journal").glob("captions-*-00001-of-*.json"))
    damages = {
        entry: (lambda row: row | {"rows": 5}, "has 5 rows instead of 8; remove it"),
        partial / "plan" / "captions-000001.json": (lambda rows: rows[1:], "has not 8 rows"),
        partial / "plan" / "images-train-000000.json": (lambda rows: rows[1:], "has not 8 rows"),
        partial / "checked" / "000000000004-000000000008.json": (
            lambda rows: rows[1:],
            "3 items instead of 4",
        ),
    }
    for file, (change, message) in damages.items():
        before = file.read_text()
        file.write_text(json.dumps(change(json.loads(before))))
        if file is not entry:  # the files are read again
            for name in ["journal"] + ["plan"] * (file.parent.name == "checked"):
                shutil.move(partial / name, tmp_path / name)
                (partial / name).mkdir()
        with pytest.raises(ValueError, match=message):
            prepare(folder, output)
        for name in ("journal", "plan"):
            if (tmp_path / name).exists():
                shutil.rmtree(partial / name)
                shutil.move(tmp_path / name, partial / name)
        file.write_text(before)
        assert not is_complete(output)


def test_features_that_are_not_finite_stop_the_run(folder, tmp_path):
    """Catches an encoder that overflows and poisons the training set."""
    encoder = FakeEncoder()
    features = encoder.features
    encoder.features = lambda text: np.full_like(
        features(text), np.inf if text == "picture number 11" else 1
    )
    with pytest.raises(ValueError, match="not finite for the caption 'picture number 11'"):
        prepare(folder, tmp_path / "data", encoder)


def test_an_image_that_changes_meanwhile_is_an_error(tmp_path, monkeypatch):
    """Catches an image stored with the size, split and captions of its earlier content."""
    folder = write_folder(tmp_path / "source")
    original = ingest._write_all

    def change(*args):
        (folder / "003.png").write_bytes(synthetic.encode(synthetic.gradient(32, 77)))
        return original(*args)

    monkeypatch.setattr(ingest, "_write_all", change)
    with pytest.raises(ValueError, match="image 003.png changed while it was being prepared"):
        prepare(folder, tmp_path / "data")


def test_preview_is_near_the_truth_and_writes_nothing(folder, whole, capsys):
    """Catches a wrong estimate, and files left by --dry_run."""
    before = set(folder.parent.rglob("*"))
    estimate = passes.preview(
        FolderSource(folder, 0.2), Encoders.single(FakeEncoder()), passes.Settings(**SETTINGS)
    )
    images = sum(len((folder / f"{i:03d}.png").read_bytes()) for i in range(20))
    texts = 40 * 4 * FakeEncoder.dim * 2 + sum(
        len(f"picture number {i}") + len("a colour ramp") for i in range(20)
    )
    assert estimate == (images, texts, 20 * WORK_BYTES)
    printed = capsys.readouterr().out
    assert "20 usable, 40 captions, 0 of them truncated" in printed and "time      about" in printed
    assert set(folder.parent.rglob("*")) == before


def options(source, output, *more):
    base = ["--encoder=t5_tiny", "--processes=1", f"--source={source}", f"--output={output}"]
    values = flags.FlagValues()
    prepare_data.define_flags(values)
    values(["prepare_data", *base, *more])
    return values


def test_the_work_is_on_the_file_system_of_a_linked_output(folder, whole, tmp_path, monkeypatch):
    """Catches a link to an empty directory that cannot be replaced, with the work next to it."""
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "empty")
    monkeypatch.setattr(prepare_data, "_encoders", lambda *_: Encoders.single(FakeEncoder()))
    seen = []
    original = captions.encode_all
    monkeypatch.setattr(
        captions, "encode_all", lambda *args: seen.append(args[2]) or original(*args)
    )
    prepare_data._run(options(f"folder:{folder}", tmp_path / "data", "--heldout=0.2"))
    assert seen == [tmp_path / "disk" / "empty" / "partial"] and (tmp_path / "data").is_symlink()
    assert records.Prepared(tmp_path / "data").num_images("train") > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "s3://bucket/data"}, "--output s3://bucket/data has the scheme s3://"),
        ({"output": "s3:/bucket/data"}, "--output s3:/bucket/data has the scheme s3://"),
        ({"source": "folder:s3://bucket/x"}, "source s3://bucket/x is a URL, only local paths"),
        ({"source": "tfds:gs://bucket/x"}, "TFDS dataset gs://bucket/x is a URL: mount"),
        ({"encoder": "gs://bucket/t5"}, "--encoder gs://bucket/t5 is a URL"),
        ({"tfds_dir": "gs://bucket", "source": "tfds:coco"}, "TFDS dataset gs://bucket is a URL"),
    ],
)
def test_urls_are_refused_at_once(folder, tmp_path, monkeypatch, changes, message):
    """Catches a local folder "./gs:" that is filled as if it were the bucket."""
    monkeypatch.setattr(prepare_data, "_encoders", lambda *_: Encoders.single(FakeEncoder()))
    monkeypatch.chdir(tmp_path)
    changed = (f"--{name}={value}" for name, value in changes.items())
    args = options(f"folder:{folder}", "data", *changed)
    with pytest.raises(ValueError, match=message.replace("URL: mount", "URL, only local paths")):
        prepare_data._run(args)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="prepared data s3:/b/x has the scheme s3://"):
        records.Prepared(Path("s3://b/x"))


def test_an_interruption_says_that_the_work_continues(monkeypatch, capsys):
    """Catches a message after which a user starts over."""

    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "_run", run)
    assert prepare_data.main() == exit_codes.INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted; the same command continues\n"


def test_images_only_and_then_the_rest(folder, whole, tmp_path, monkeypatch, capsys):
    """Catches a second command that starts over, and other bytes in the end."""
    output = tmp_path / "data"
    settings = passes.Settings(**SETTINGS)
    assert passes.prepare(FolderSource(folder, 0.2), None, output, settings) == {}
    assert not is_complete(output)
    assert "same command with --encoder" in capsys.readouterr().out
    assert stored(output).items() <= tree(whole).items()
    assert len(list((output / "partial" / "journal").iterdir())) == 4
    with pytest.raises(ValueError, match="min_size was 0, is 5"):
        prepare(folder, tmp_path / "data", min_size=5)
    monkeypatch.setattr(ingest, "write_images", lambda *_: pytest.fail("written twice"))
    prepare(folder, tmp_path / "data")
    assert tree(tmp_path / "data") == tree(whole)


def test_without_beam_it_says_what_to_install(monkeypatch):
    """Catches an ImportError that names a module of ours."""
    monkeypatch.setitem(sys.modules, "imagen_jax.data.prepare.beam_ingest", None)
    monkeypatch.delattr("imagen_jax.data.prepare.beam_ingest", raising=False)
    with pytest.raises(ValueError, match="needs Apache Beam: pip install 'apache-beam>=2.77'"):
        prepare_data._ingestion("--runner=DirectRunner")


def test_command_line_errors_are_one_line(tmp_path):
    """Catches tracebacks for foreseeable mistakes."""
    base = [
        sys.executable,
        "-m",
        "imagen_jax.prepare_data",
        "--output",
        str(tmp_path / "x"),
        "--encoder",
        "t5_tiny",
        "--source",
    ]
    for source, message in [
        ("cloud", "is not emoji, folder:DIR"),
        (f"folder:{tmp_path}/no", "is not a directory of images"),
    ]:
        done = subprocess.run([*base, source], cwd=ROOT, capture_output=True, text=True)
        (line,) = tiny.said(done.stderr)
        assert done.returncode == 2 and message in line
