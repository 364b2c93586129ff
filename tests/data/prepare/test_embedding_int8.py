"""prepare_data --embedding int8: what is stored, read, stated in the manifest, and refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from imagen_jax import prepare_data
from imagen_jax.data import pipeline, quantization, records
from imagen_jax.data.prepare import captions, passes
from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.encoders_in_turn import Encoders
from tests.data import synthetic
from tests.data.synthetic_source import SETTINGS, FakeEncoder, prepare, tree

INT8 = {"embedding": "int8"}


@pytest.fixture(scope="module")
def small(folder, tmp_path_factory):
    """The directory that one process prepares with int8 features."""
    output = tmp_path_factory.mktemp("int8") / "data"
    prepare(folder, output, **INT8)
    return output


def features(text):
    """What readers get of a text."""
    return quantization.dequantize(*quantization.quantize(FakeEncoder().features(text)))


def test_readers_get_bfloat16(small, whole):
    """Catches features that are not scaled back, another order, and images that change."""
    prepared = records.Prepared(small)
    prepared.verify()
    captions, before = prepared.captions(), records.Prepared(whole).captions()
    assert prepared.embedding == "int8" and len(captions) == len(before) == 21
    assert records.Prepared(whole).embedding == "bfloat16"
    for i in range(21):
        row = captions[i]
        assert row.text == before[i].text and row.embedding.dtype == "bfloat16"
        np.testing.assert_array_equal(row.embedding, features(row.text))
        assert (row.embedding != before[i].embedding).any()
    shards = {
        name: entry["sha256"]
        for name, entry in prepared.manifest["shards"].items()
        if name.startswith("images/")
    }
    assert shards and shards.items() <= tree(whole).items()


def test_manifest_states_dtype_and_error(small, whole):
    """Catches a manifest that reads as bfloat16, and the error of one shard or of no rounding."""
    manifest, before = (records.Prepared(path).manifest for path in (small, whole))
    texts = ["a colour ramp"] + [f"picture number {i}" for i in range(20)]
    exact = np.concatenate([FakeEncoder().features(text) for text in texts]).astype(np.float64)
    error = np.concatenate([features(text) for text in texts]).astype(np.float64) - exact
    assert manifest["embedding"]["quantization_error"] == pytest.approx(
        {
            "relative_rms": np.linalg.norm(error) / np.linalg.norm(exact),
            "largest_token": (np.linalg.norm(error, axis=1) / np.linalg.norm(exact, axis=1)).max(),
        }
    )
    assert (manifest["format_version"], manifest["embedding_dtype"]) == (2, "int8")
    assert (before["format_version"], before["encoder"]) == (1, manifest["encoder"])
    assert not {"embedding_dtype"} & before.keys()
    assert "quantization_error" not in before["embedding"]


def test_tfds_opens_it_without_ml_dtypes(small):
    """Catches metadata that TFDS cannot read, and a scale that only this package can read."""
    program = f"""
import sys, tensorflow_datasets as tfds
captions = tfds.builder_from_directory({str(small / "captions")!r}).as_data_source("train")
row = captions[3]
assert len(captions) == 21 and row["embedding"].shape == (4, 8), row
assert (row["embedding"].dtype, row["scale"].dtype) == ("int8", "float32")
assert row["scale"].shape == (4,) and abs(row["embedding"]).max(axis=1).tolist() == [127] * 4
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_pipeline_reads_it(small):
    """Catches int8 features in a batch."""
    size = {"image_size": 16, "lowres_size": 0, "crop_size": 0, "text_length": 6, "workers": 0}
    size |= synthetic.SQUARES
    cfg = {"path": str(small), **size, "flip": False, "caption": "first", "cache_mib": 0}
    batch = pipeline.eval_rows(cfg, [0, 1], "train")
    captions = records.Prepared(small).captions()
    for i, caption_id in enumerate(batch["caption_id"]):
        text = batch["text"][i][batch["text_mask"][i]]
        np.testing.assert_array_equal(text, features(captions[int(caption_id)].text))


def test_a_stop_changes_no_byte(folder, small, tmp_path, monkeypatch):
    """Catches an error of the finished part only, and a continued run without int8."""
    original, calls = captions.write_captions, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    output = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(captions, "write_captions", stopping)
        prepare(folder, output, **INT8)
    with pytest.raises(ValueError, match=r"\(embedding_dtype was int8, is bfloat16\): choose an"):
        prepare(folder, output)
    prepare(folder, output, **INT8)
    assert tree(output) == tree(small)
    with pytest.raises(ValueError, match=r"\(embedding_dtype was int8, is bfloat16\): choose an"):
        prepare(folder, output)


def test_images_stored_first_take_either_dtype(folder, small, whole, tmp_path):
    """Catches work without captions that counts as bfloat16, and int8 that a later call forgets."""
    settings = passes.Settings(**SETTINGS)
    for name, changes, expected in [("int8", INT8, small), ("bfloat16", {}, whole)]:
        output = tmp_path / name
        assert passes.prepare(FolderSource(folder, 0.2), None, output, settings) == {}
        prepare(folder, output, **changes)
        assert tree(output) == tree(expected)


def test_a_version_of_the_future_is_refused(whole, tmp_path):
    """Catches a message that sends the user of newer data to prepare it again only."""
    manifest = json.loads((whole / "manifest.json").read_text()) | {"format_version": 4}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has format 4, but .* 1 to 3: .* install a newer version"):
        records.Prepared(tmp_path)


def test_the_flag_reaches_the_data(folder, tmp_path, monkeypatch):
    """Catches a flag that is parsed and not used, and an unknown dtype that stores bfloat16."""
    monkeypatch.setattr(prepare_data, "_encoders", lambda *_: Encoders.single(FakeEncoder()))
    values = flags.FlagValues()
    prepare_data.define_flags(values)
    base = [f"--source=folder:{folder}", f"--output={tmp_path / 'data'}", "--encoder=t5_tiny"]
    values(["prepare_data", *base, "--processes=1", "--embedding=int8"])
    prepare_data._run(values)
    assert records.Prepared(tmp_path / "data").embedding == "int8"
    with pytest.raises(
        ValueError, match="--embedding int4 is not implemented: use bfloat16 or int"
    ):
        prepare(folder, tmp_path / "other", embedding="int4")
