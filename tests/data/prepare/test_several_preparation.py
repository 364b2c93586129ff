"""prepare_data with named text encoders, or with none: stops, refusals, estimates, the command."""

import json
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from imagen_jax import prepare_data
from imagen_jax.data import records
from imagen_jax.data.prepare import captions, passes
from imagen_jax.data.prepare.preview import Bytes
from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.weights.text_encoders import encoder_loaders, load_text_encoder
from tests import processes
from tests.data.synthetic_source import (
    SETTINGS,
    FakeEncoder,
    NamedEncoder,
    is_complete,
    named,
    prepare,
    stored,
    tree,
    two_encoders,
)
from tests.weights.test_encoder_families import write

ROOT = Path(__file__).resolve().parents[3]


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "calls", "left"), [("write_texts", 2, 42), ("write_captions", 5, 13), ("finish", 1, 0)]
)
def test_stopped_anywhere_it_continues(folder, two, tmp_path, monkeypatch, name, calls, left):
    """Catches shards encoded twice, or left out because those of another encoder are there."""
    module = passes if name == "finish" else captions
    original, seen, output = getattr(module, name), [], tmp_path / "data"

    def stopping(*args):
        seen.append(args)
        if len(seen) == calls:
            raise Stop
        return original(*args)

    monkeypatch.setattr(passes, "preview", lambda *_: Bytes(0, 0, 0))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(module, name, stopping)
        prepare(folder, output, named())
    encoders = two_encoders()
    prepare(folder, output, named(encoders))
    # Shards of 8, 8 and 5 captions, of both encoders.
    assert sum(len(encoder.encoded) for encoder in encoders.values()) == left
    assert tree(output) == tree(two)


def run_processes(folder, output, count, victim=None, kill_at=0):
    """Prepares with two encoders in `count` processes; returns their exit codes."""
    command = lambda index: [
        *("-m", "tests.data.synthetic_source", str(folder), str(output), "1"),
        str(kill_at if index == victim else 0),
    ]
    started = processes.start(command, output, count, count)
    return [process.wait(timeout=120) for process in started]


@pytest.mark.slow
def test_killed_it_continues_with_any_number_of_processes(folder, two, tmp_path, monkeypatch):
    """Catches half-written stores, work lost after SIGKILL, and shards that two processes write."""
    monkeypatch.setenv("TWO_ENCODERS", "1")
    output = tmp_path / "data"
    # Renames: in the texts and in the features of each encoder, before or after the journal.
    for count, victim, kill_at in ((1, 0, 9), (1, 0, 10), (2, 1, 6), (1, 0, 11)):
        codes = run_processes(folder, output, count, victim, kill_at)
        assert codes[victim] == -signal.SIGKILL, processes.log_of(output, victim).read_text()
        assert not is_complete(output) and stored(output).items() <= tree(two).items()
    assert run_processes(folder, output, 2) == [0, 0]
    assert tree(output) == tree(two)


@pytest.mark.slow
def test_worker_processes_change_no_byte(folder, two, tmp_path):
    """Catches features or pooled vectors that a worker process mixes up."""
    prepare(folder, tmp_path / "data", named(), processes=2)
    assert tree(tmp_path / "data") == tree(two)


def test_one_encoder_is_in_memory(folder, two, tmp_path):
    """Catches an encoder that is kept while another is loaded, and one loaded without need."""
    alive, loads = [], []

    def load(name):
        assert not [one for one in alive if one() is not None], f"another one beside {name}"
        encoder = two_encoders()[name]
        alive.append(weakref.ref(encoder))
        loads.append(name)
        return encoder

    encoders = Encoders({name: lambda name=name: load(name) for name in two_encoders()})
    prepare(folder, tmp_path / "data", encoders)
    # For their identities, the estimate, and the features.
    assert loads == ["wide", "tiny", "wide", "tiny"] and tree(tmp_path / "data") == tree(two)


def stopped(folder, output, encoders, monkeypatch):
    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(passes, "finish", stop)
        prepare(folder, output, encoders)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (named, FakeEncoder, "text encoders were wide, tiny, are a single unnamed one"),
        (FakeEncoder, named, "text encoders were a single unnamed one, are wide, tiny"),
        (lambda: Encoders({}), named, r"text encoders were none \(--text_only\), are wide, tiny"),
        (named, lambda: Encoders({}), r"text encoders were wide, tiny, are none"),
        (
            named,
            lambda: named(two_encoders() | {"clip": NamedEncoder("c", 2, 2, 6)}),
            "text encoders were wide, tiny, are wide, tiny, clip",
        ),
        (
            named,
            lambda: named(two_encoders() | {"tiny": NamedEncoder("tiny fake", 4, 0, 2)}),
            r"\(encoders.tiny.max_length was 3, is 2\)",
        ),
    ],
)
def test_other_encoders_are_refused(folder, tmp_path, monkeypatch, before, after, message):
    """Catches one directory with the features of two requests."""
    output = tmp_path / "data"
    stopped(folder, output, before(), monkeypatch)
    for _ in range(2):  # unfinished, then complete
        with pytest.raises(ValueError, match=f"was made with other settings .*{message}"):
            prepare(folder, output, after())
        prepare(folder, output, before())


def test_another_dtype_is_refused(folder, tmp_path, monkeypatch):
    """Catches shards of two dtypes in one store."""
    stopped(folder, tmp_path / "data", named(), monkeypatch)
    with pytest.raises(ValueError, match=r"\(embedding_dtype was bfloat16, is int8\)"):
        prepare(folder, tmp_path / "data", named(), embedding="int8")


def test_images_stored_first_take_any_encoders(folder, two, texts, whole, tmp_path):
    """Catches work without captions that counts as that of one kind."""
    for encoders, expected in ((named(), two), (Encoders({}), texts), (FakeEncoder(), whole)):
        output = tmp_path / expected.parent.name
        source = FolderSource(folder, 0.2)
        assert passes.prepare(source, None, output, passes.Settings(**SETTINGS)) == {}
        prepare(folder, output, encoders)
        assert tree(output) == tree(expected)


def test_pooled_vectors_that_are_not_finite_stop_the_run(folder, tmp_path):
    """Catches an encoder whose pooled vector alone overflows."""
    wide = NamedEncoder("wide fake", 12, 5, 6)
    pooled = wide.pooled
    wide.pooled = lambda text: np.full_like(
        pooled(text), np.inf if text == "picture number 11" else 1
    )
    with pytest.raises(ValueError, match="not finite for the caption 'picture number 11'"):
        prepare(folder, tmp_path / "data", named({"wide": wide}))


def test_damaged_manifests_and_work_are_one_line(folder, two, tmp_path, monkeypatch):
    """Catches a KeyError from a manifest or a request that lacks an encoder's width."""
    manifest = json.loads((two / "manifest.json").read_text())
    del manifest["encoders"]["tiny"]["dim"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"is damaged \(it has no encoders.tiny.dim\)"):
        records.Prepared(tmp_path)
    stopped(folder, tmp_path / "data", named(), monkeypatch)
    request = tmp_path / "data" / "partial" / "request.json"
    before = request.read_text()
    request.write_text(json.dumps(json.loads(before) | {"encoders": ["wide"]}))
    with pytest.raises(ValueError, match="request.json is damaged"):
        prepare(folder, tmp_path / "data", named())
    request.write_text(before)
    entry = next((tmp_path / "data" / "partial" / "journal").glob("captions_tiny-*-00001-of-*"))
    entry.write_text(json.dumps({"rows": 8, "bytes": 1, "sha256": ""}))
    with pytest.raises(ValueError, match="is damaged .it has no cut"):
        prepare(folder, tmp_path / "data", named())


def test_the_estimate_is_for_all_stores(folder, capsys):
    """Catches the bytes of one encoder alone, and texts counted for each."""
    source, settings = FolderSource(folder, 0.2), passes.Settings(**SETTINGS)
    text_bytes = sum(len(f"picture number {i}") + len("a colour ramp") for i in range(20))
    features = 40 * (4 * 12 * 2 + 5 * 2 + 3 * 4 * 2)
    assert passes.preview(source, named(), settings).captions == features + text_bytes
    told = capsys.readouterr().out
    assert "40 captions, 40 (tiny), 0 (wide) of them truncated" in told
    assert "(12 of wide, 4 of tiny features a token in bfloat16)" in told
    assert passes.preview(source, Encoders({}), settings).captions == text_bytes
    # Records of 100 bytes and the text, and the last block of each of 5 shards.
    stored = (40 * 100 + text_bytes + 5 * 2**15) / 2**20
    assert f"at most 40, {stored:.1f} MiB on disk (only texts)" in capsys.readouterr().out


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A random CLIP and a random BERT; they read up to 14 and 16 tokens."""
    root = tmp_path_factory.mktemp("encoders")
    return {family: write(root / family, family) for family in ("clip", "bert")}


def run(folder, output, *more):
    base = [f"--source=folder:{folder}", f"--output={output}", "--processes=1"]
    values = flags.FlagValues()
    prepare_data.define_flags(values)
    values(["prepare_data", *base, *more])
    prepare_data._run(values)


def test_the_command(folder, directories, tmp_path, capsys):
    """Catches a flag without effect, one length for all encoders, and the features of another
    layer.
    """
    given = f"c={directories['clip']}@layer=1+b={directories['bert']}"
    output = tmp_path / "data"
    run(folder, output, f"--encoder={given}", "--max_length=15", "--verify")
    prepared = records.Prepared(output)
    lengths = {name: one["max_length"] for name, one in prepared.encoders.items()}
    assert lengths == {"c": 14, "b": 15} and prepared.encoders["c"]["layer"] == 1
    encoder = load_text_encoder(f"{directories['clip']}@layer=1", 14)
    rows, store = prepared.captions(), prepared.features("c")
    features, pooled = encoder.encode_pooled([rows[i].text for i in range(21)], 64)
    for i in range(21):
        np.testing.assert_array_equal(store[i].embedding, features[i])
        np.testing.assert_array_equal(store[i].pooled, pooled[i])
    (load,) = encoder_loaders(str(directories["clip"]), 15).values()
    with pytest.raises(ValueError, match="reads at most 14 tokens, not 15"):
        load()
    capsys.readouterr()
    run(folder, output, f"--encoder={given}", "--max_length=15", "--preview_captions=1000")
    told = capsys.readouterr().out
    assert "tokens of c (" in told and "tokens of b (" in told
    assert told.count("store     ") == 3 and "of the pooled vector" in told
    run(folder, tmp_path / "dry", f"--encoder={given}", "--max_length=15", "--dry_run")
    assert "captions, int8" in capsys.readouterr().out and not (tmp_path / "dry").exists()


def test_the_command_for_texts_alone(folder, texts, tmp_path, capsys):
    """Catches an encoder that is needed for texts, and estimates of features that are not there."""
    run(folder, tmp_path / "data", "--text_only", "--shard_size=8", "--heldout=0.2")
    assert tree(tmp_path / "data") == tree(texts)
    capsys.readouterr()
    for option in ("--dry_run", "--preview_captions=1000"):
        run(folder, tmp_path / "estimate", "--text_only", option)
        assert "captions, text only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --encoder NAME, --images_only and --text_only"),
        (["--text_only", "--images_only"], "give one of"),
        (["--text_only", "--encoder=t5_tiny"], "give one of"),
        (["--text_only", "--embedding=int8"], "--embedding has no effect with --text_only"),
        (["--text_only", "--max_length=9"], "--max_length has no effect with --text_only"),
        (["--encoder=a=t5_tiny+a=t5_tiny"], "the name a is given twice"),
        (["--encoder=a=t5_tiny+b=gs://bucket/t5"], "--encoder"),
        (["--encoder=a=t5_tiny+b=no/such/place"], "no/such/place"),
    ],
)
def test_wrong_flags_are_one_line(folder, tmp_path, options, message):
    """Catches flags that contradict each other, and an encoder that is missed after hours."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run(folder, tmp_path / "data", *options)
    assert "\n" not in str(caught.value) and not (tmp_path / "data" / "partial").exists()
