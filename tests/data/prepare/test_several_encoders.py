"""prepare_data with named text encoders, or without any: what is stored, read and refused."""

import json
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from absl import flags

from imagen_jax import prepare_data
from imagen_jax.data import pipeline, quantization, records
from imagen_jax.data.example_text import StoredText
from imagen_jax.data.prepare import captions, passes
from imagen_jax.data.prepare.encoders import Encoders
from imagen_jax.data.prepare.preview import Bytes
from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.text_inputs import TextInput
from imagen_jax.weights.text_encoders import load_text_encoder, load_text_encoders
from tests.data.synthetic_source import SETTINGS, FakeEncoder, prepare, skipped, tree
from tests.weights.test_encoder_families import write

ROOT = Path(__file__).resolve().parents[3]
TEXTS = ["a colour ramp"] + [f"picture number {i}" for i in range(20)]
CAPTIONS = {"image_size": 16, "lowres_size": 0, "crop_size": 0, "text_length": 6, "workers": 0}
CAPTIONS |= {"decode": "exact", "flip": False, "caption": "first", "cache_mib": 0}


class Fake(FakeEncoder):
    """A FakeEncoder with a width, a pooled vector and features of its own."""

    def __init__(self, name: str, dim: int, pooled_dim: int, max_length: int):
        self.dim, self.pooled_dim = dim, pooled_dim
        super().__init__(max_length)
        self.identity |= {"name": name, "pooled_dim": pooled_dim}

    def encode_pooled(self, texts, batch_size, fill=False):
        features = self.encode(texts, batch_size, fill)
        pooled = np.array([self.pooled(text) for text in texts])
        return features, pooled.reshape(len(texts), self.pooled_dim)

    def pooled(self, text):
        numbers = np.arange(self.pooled_dim) + len(text) + int(text[-1:].isdigit())
        return (numbers / 7).astype(ml_dtypes.bfloat16)


def fakes():
    """An encoder that truncates no caption and has a pooled vector, one that does and has not."""
    return {"wide": Fake("wide fake", 12, 5, 6), "tiny": Fake("tiny fake", 4, 0, 3)}


def named(**changes) -> Encoders:
    return Encoders({name: lambda one=one: one for name, one in (fakes() | changes).items()})


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    """The directory that one process prepares with two encoders."""
    output = tmp_path_factory.mktemp("two") / "data"
    prepare(folder, output, named())
    return output


@pytest.fixture(scope="module")
def texts(folder, tmp_path_factory):
    """The directory that one process prepares without an encoder."""
    output = tmp_path_factory.mktemp("texts") / "data"
    prepare(folder, output, Encoders({}))
    return output


@pytest.mark.parametrize("embedding", records.EMBEDDINGS)
def test_each_encoder_has_a_store(folder, two, whole, tmp_path, embedding):
    """Catches features of another encoder or caption, pooled vectors that are lost or quantized,
    and texts stored with the features.
    """
    output = two if embedding == "bfloat16" else tmp_path / "int8"
    if embedding == "int8":
        prepare(folder, output, named(), embedding="int8")
    prepared, of_texts = records.Prepared(output), records.Prepared(whole).captions()
    prepared.verify()
    assert list(prepared.encoders) == ["wide", "tiny"] and prepared.embedding == embedding
    rows = prepared.captions()
    assert [rows[i].text for i in range(21)] == [of_texts[i].text for i in range(21)]
    assert len(rows) == 21 and rows[0].embedding is None
    for name, encoder in fakes().items():
        store = prepared.features(name)
        assert len(store) == 21 and prepared.features(name) is store
        for i in range(21):
            features, exact = store[i], encoder.features(rows[i].text)
            if embedding == "int8":
                exact = quantization.dequantize(*quantization.quantize(exact))
            assert features.embedding.dtype == "bfloat16"
            np.testing.assert_array_equal(features.embedding, exact)
            if name == "tiny":
                assert features.pooled is None
            else:
                assert features.pooled.dtype == "bfloat16"
                np.testing.assert_array_equal(features.pooled, encoder.pooled(rows[i].text))
    images = {k: v for k, v in tree(whole).items() if k.startswith("images/")}
    assert images.items() <= tree(output).items()


def test_manifest_has_each_encoder(two, texts):
    """Catches statistics and truncated captions of one encoder for another."""
    manifest = records.Prepared(two).manifest
    assert manifest["format_version"] == 3 and manifest["embedding_dtype"] == "bfloat16"
    assert manifest["encoders"] == {name: one.identity for name, one in fakes().items()}
    assert not {"encoder", "max_length"} & manifest.keys()
    for name, encoder in fakes().items():
        norms = np.linalg.norm(
            np.concatenate([encoder.features(text) for text in TEXTS]).astype(np.float64), axis=1
        )
        stats, length = manifest["embedding"][name], min(4, encoder.max_length)
        assert stats["length"] == {"min": length, "mean": length, "max": length}
        assert stats["norm"]["mean"] == pytest.approx(norms.mean())
    assert manifest["counts"]["truncated_captions"] == {"wide": 0, "tiny": 21}
    lines = [line for line in skipped(two) if line["reason"] == "truncated_caption"]
    assert [line["id"] for line in lines] == [f"caption {i}" for i in range(21)]
    assert {line["encoder"] for line in lines} == {"tiny"}
    manifest = records.Prepared(texts).manifest
    assert (manifest["encoders"], manifest["embedding"], manifest["format_version"]) == ({}, {}, 3)
    assert manifest["embedding_dtype"] == "bfloat16" and "batch_size" not in manifest


def test_texts_alone(texts, whole):
    """Catches texts in another order than with features, and stores that nobody can open."""
    prepared, before = records.Prepared(texts), records.Prepared(whole).captions()
    prepared.verify()
    rows = prepared.captions()
    assert [rows[i] for i in range(21)] == [
        records.CaptionRow(before[i].text) for i in range(len(before))
    ]
    assert prepared.encoders == {} and not list(texts.glob("captions_*"))
    batch = pipeline.eval_rows(CAPTIONS | {"path": str(texts)}, [0, 1], "train")
    assert batch["image"].shape == (2, 16, 16, 3) and "text" not in batch


def test_tfds_opens_each_store(two, texts):
    """Catches a store without metadata, or with that of another."""
    import tensorflow_datasets as tfds

    open_store = lambda path: tfds.builder_from_directory(path).as_data_source("train")
    wide, tiny = open_store(two / "captions_wide")[3], open_store(two / "captions_tiny")[3]
    assert {name: np.shape(value) for name, value in wide.items()} == {
        "embedding": (4, 12),
        "length": (),
        "pooled": (5,),
    }
    assert tiny.keys() == {"embedding", "length"} and tiny["embedding"].shape == (3, 4)
    for path in (two, texts):
        assert open_store(path / "captions")[0].keys() == {"text"}
        assert len(open_store(path / "captions")) == 21


def test_the_pipeline_reads_the_inputs(two, whole):
    """Catches features under another name, a pooled vector that was not asked for, and a mask of
    another encoder.
    """
    inputs = [TextInput("tiny", 4, 5), TextInput("wide", 12, 6, pooled_dim=5)]
    cfg = CAPTIONS | {"path": str(two)}
    batch = pipeline.eval_rows(cfg, [0, 1], "train", StoredText(inputs))
    fields = {"text.tiny", "text_mask.tiny", "text.wide", "text_mask.wide", "pooled.wide"}
    assert {name for name in batch if name[:4] in ("text", "pool")} == fields
    assert batch["text.tiny"].shape == (2, 5, 4) and batch["text.wide"].shape == (2, 6, 12)
    rows = records.Prepared(two).captions()
    for i, caption_id in enumerate(batch["caption_id"]):
        text = rows[int(caption_id)].text
        for name, encoder in fakes().items():
            valid = batch[f"text.{name}"][i][batch[f"text_mask.{name}"][i]]
            np.testing.assert_array_equal(valid, encoder.features(text))
        np.testing.assert_array_equal(batch["pooled.wide"][i], fakes()["wide"].pooled(text))
    without = pipeline.eval_rows(cfg, [0], "train", StoredText([TextInput("wide", 12, 6)]))
    assert "pooled.wide" not in without and "text.tiny" not in without
    batch = pipeline.eval_rows(
        CAPTIONS | {"path": str(whole)}, [0], "train", StoredText([TextInput("", 8, 6)])
    )
    np.testing.assert_array_equal(
        batch["text"],
        pipeline.eval_rows(CAPTIONS | {"path": str(whole)}, [0], "train")["text"],
    )


@pytest.mark.parametrize(
    ("data", "one", "message"),
    [
        ("two", TextInput("clip", 12, 6), "no features of a text encoder clip, but of wide, tiny"),
        ("two", TextInput("clip", 12, 6), "set text.encoders, or prepare with --encoder clip=..."),
        ("two", TextInput("wide", 16, 6), "wide features of width 12 .wide fake., but text.dims"),
        ("two", TextInput("wide", 12, 6, 7), "pooled wide vectors of width 5, but text.pooled_dim"),
        ("two", TextInput("tiny", 4, 6, 7), "no pooled tiny vectors, but text.pooled_dims asks"),
        ("two", TextInput("wide", 12, 3), "up to 4 tokens of wide, but text.lengths is 3: prepare"),
        ("two", TextInput("", 12, 6), "named text encoders wide, tiny, but the config has no name"),
        ("whole", TextInput("t5", 8, 6), "one unnamed text encoder .fake., but text.encoders asks"),
        ("texts", TextInput("", 8, 6), "has only the texts of its captions.* text.online = True"),
        ("texts", TextInput("t5", 8, 6), "has only the texts of its captions.*or prepare with"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(request, data, one, message):
    """Catches features of another encoder, width or length that are found in the jitted step."""
    path = request.getfixturevalue(data)
    with pytest.raises(ValueError, match=message) as caught:
        StoredText([one]).open(records.Prepared(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_another_length_and_the_only_encoder(two, texts):
    """Catches the longest caption of one encoder for another, and the identity of one of two."""
    prepared = records.Prepared(two)
    prepared.check_text([TextInput("tiny", 4, 3), TextInput("wide", 12, 4, 5)])
    with pytest.raises(ValueError, match="of the named text encoders wide, tiny"):
        _ = prepared.encoder
    with pytest.raises(ValueError, match="has only the texts"):
        records.Prepared(texts).features("wide")


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
    encoders = fakes()
    prepare(folder, output, named(**encoders))
    # Shards of 8, 8 and 5 captions, of both encoders.
    assert sum(len(encoder.encoded) for encoder in encoders.values()) == left
    assert tree(output) == tree(two)


@pytest.mark.slow
def test_killed_at_any_rename_it_continues(folder, two, tmp_path):
    """Catches half-written stores, and work lost after SIGKILL."""
    output, killed = tmp_path / "data", 0
    program = f"""
import sys
from pathlib import Path
from tests.data import synthetic_source
from tests.data.prepare.test_several_encoders import named
if __name__ == "__main__":
    synthetic_source.kill_at_rename(int(sys.argv[1]))
    synthetic_source.prepare(Path({str(folder)!r}), Path({str(output)!r}), named())
"""
    for kill_at in (9, 13, 8, 9, 1000):
        command = [sys.executable, "-c", program, str(kill_at)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        killed += done.returncode == -signal.SIGKILL
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        if done.returncode == 0:
            break
        assert not output.exists()
    assert killed >= 2 and tree(output) == tree(two)


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
        encoder = fakes()[name]
        alive.append(weakref.ref(encoder))
        loads.append(name)
        return encoder

    encoders = Encoders({name: lambda name=name: load(name) for name in fakes()})
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
            lambda: named(clip=Fake("c", 2, 2, 6)),
            "text encoders were wide, tiny, are wide, tiny, clip",
        ),
        (
            named,
            lambda: named(tiny=Fake("tiny fake", 4, 0, 2)),
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
    wide = Fake("wide fake", 12, 5, 6)
    pooled = wide.pooled
    wide.pooled = lambda text: np.full_like(
        pooled(text), np.inf if text == "picture number 11" else 1
    )
    with pytest.raises(ValueError, match="not finite for the caption 'picture number 11'"):
        prepare(folder, tmp_path / "data", named(wide=wide))


def test_damaged_manifests_and_work_are_one_line(folder, two, tmp_path, monkeypatch):
    """Catches a KeyError from a manifest or a request that lacks an encoder's width."""
    manifest = json.loads((two / "manifest.json").read_text())
    del manifest["encoders"]["tiny"]["dim"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"is damaged \(it has no encoders.tiny.dim\)"):
        records.Prepared(tmp_path)
    stopped(folder, tmp_path / "data", named(), monkeypatch)
    request = tmp_path / "data.partial" / "request.json"
    before = request.read_text()
    request.write_text(json.dumps(json.loads(before) | {"encoders": ["wide"]}))
    with pytest.raises(ValueError, match="request.json is damaged"):
        prepare(folder, tmp_path / "data", named())
    request.write_text(before)
    entry = next((tmp_path / "data.partial" / "journal").glob("captions_tiny-*-00001-of-*"))
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
    assert "before compression (only texts)" in capsys.readouterr().out


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
    loaded = load_text_encoders(given, 15)
    assert {name: dict(one.identity) for name, one in loaded.items()} == prepared.encoders
    with pytest.raises(ValueError, match="reads at most 14 tokens, not 15"):
        load_text_encoders(str(directories["clip"]), 15)
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
        (["--encoder=a=t5_tiny+a=t5_tiny"], "the name a is given twice"),
        (["--encoder=a=t5_tiny+b=gs://bucket/t5"], "--encoder"),
        (["--encoder=a=t5_tiny+b=no/such/place"], "no/such/place"),
    ],
)
def test_wrong_flags_are_one_line(folder, tmp_path, options, message):
    """Catches flags that contradict each other, and an encoder that is missed after hours."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run(folder, tmp_path / "data", *options)
    assert "\n" not in str(caught.value) and not (tmp_path / "data.partial" / "plan").exists()
