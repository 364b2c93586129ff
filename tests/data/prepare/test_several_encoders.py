"""Data with named text encoders, or with texts alone: what is stored, read and refused."""

import numpy as np
import pytest

from imagen_jax.data import pipeline, quantization, records
from imagen_jax.data.example_text import StoredFeatures
from imagen_jax.text_inputs import TextInput
from tests.data import synthetic
from tests.data.synthetic_source import named, prepare, skipped, tree, two_encoders

TEXTS = ["a colour ramp"] + [f"picture number {i}" for i in range(20)]
CAPTIONS = {"image_size": 16, "lowres_size": 0, "crop_size": 0, "text_length": 6, "workers": 0}
CAPTIONS |= {"flip": False, "caption": "first", "cache_mib": 0} | synthetic.SQUARES


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
    for name, encoder in two_encoders().items():
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
    assert manifest["encoders"] == {name: one.identity for name, one in two_encoders().items()}
    assert not {"encoder", "max_length"} & manifest.keys()
    for name, encoder in two_encoders().items():
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
    batch = pipeline.eval_rows(cfg, [0, 1], "train", StoredFeatures(inputs))
    fields = {"text.tiny", "text_mask.tiny", "text.wide", "text_mask.wide", "pooled.wide"}
    assert {name for name in batch if name[:4] in ("text", "pool")} == fields
    assert batch["text.tiny"].shape == (2, 5, 4) and batch["text.wide"].shape == (2, 6, 12)
    rows = records.Prepared(two).captions()
    for i, caption_id in enumerate(batch["caption_id"]):
        text = rows[int(caption_id)].text
        for name, encoder in two_encoders().items():
            valid = batch[f"text.{name}"][i][batch[f"text_mask.{name}"][i]]
            np.testing.assert_array_equal(valid, encoder.features(text))
        np.testing.assert_array_equal(batch["pooled.wide"][i], two_encoders()["wide"].pooled(text))
    without = pipeline.eval_rows(cfg, [0], "train", StoredFeatures([TextInput("wide", 12, 6)]))
    assert "pooled.wide" not in without and "text.tiny" not in without
    batch = pipeline.eval_rows(
        CAPTIONS | {"path": str(whole)}, [0], "train", StoredFeatures([TextInput("", 8, 6)])
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
        (
            "two",
            TextInput("wide", 16, 6),
            "wide features of width 12 .encoder wide fake., but text.dims",
        ),
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
        StoredFeatures([one]).open(records.Prepared(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_another_length_and_the_only_encoder(two, texts):
    """Catches the longest caption of one encoder for another, and the identity of one of two."""
    prepared = records.Prepared(two)
    prepared.check_text([TextInput("tiny", 4, 3), TextInput("wide", 12, 4, 5)])
    with pytest.raises(ValueError, match="of the named text encoders wide, tiny"):
        _ = prepared.encoder
    with pytest.raises(ValueError, match="has only the texts"):
        records.Prepared(texts).features("wide")
