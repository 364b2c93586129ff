"""CLIP's tokenizer in both layouts, and the parts of a file that each tower reads."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from imagen_jax.text.choice import Choice
from imagen_jax.text.clip import CLIPText
from imagen_jax.text.sizes import SIZES
from imagen_jax.text.tokenizer import tokenize, unknown_characters
from imagen_jax.weights import clip_files
from imagen_jax.weights.name_map import read_tree
from tests.evals.networks import tiny
from tests.text.random_encoders import CLIPS, clip_json, random_params, random_weights

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("a", "p"), ("ap", "p"), ("l", "e</w>"), ("app", "le</w>"), ("r", "e"), ("re", "d</w>")]


def vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = letters + [f"{letter}</w>" for letter in letters] + ["".join(m) for m in MERGES]
    return {piece: i for i, piece in enumerate([*pieces, START, END])}


def write_tokenizer(directory, layout):
    """A small CLIP tokenizer: "tokenizer.json" alone, or the two files of OpenAI's time."""
    directory.mkdir()
    if layout == "tokenizer.json":
        from transformers import CLIPTokenizer

        CLIPTokenizer(vocab=vocabulary(), merges=MERGES).save_pretrained(directory)
        for extra in directory.iterdir():
            if extra.name != layout:
                extra.unlink()
    else:
        (directory / "vocab.json").write_text(json.dumps(vocabulary()))
        lines = ["#version: 0.2", *(" ".join(merge) for merge in MERGES)]
        (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    return directory


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json"])
def test_tokens(tmp_path, layout):
    """Catches missing start or end tokens, upper case that is kept, and merges that are ignored."""
    tokenizer, sha256 = clip_files.load_tokenizer(write_tokenizer(tmp_path / "clip", layout))
    ids = vocabulary()
    rows, cut = tokenize(tokenizer, ["A  Red apple", ""], 77)
    words = [ids[piece] for piece in ("a</w>", "red</w>", "apple</w>")]
    assert rows == [[ids[START], *words, ids[END]], [ids[START], ids[END]]]
    assert cut == [False, False] and len(sha256) == 64


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json"])
def test_a_long_caption_keeps_its_end(tmp_path, layout):
    """Catches a cut that drops the end token, whose feature is the caption's: scores would fall."""
    tokenizer, _ = clip_files.load_tokenizer(write_tokenizer(tmp_path / "clip", layout))
    (row,), (cut,) = tokenize(tokenizer, ["red apple " * 60], 77)
    assert cut and len(row) == 77 and row[-1] == vocabulary()[END] and END not in row[:-1]


def test_another_tokenizer_is_refused():
    """Catches T5's tokenizer, which has no start token."""
    with pytest.raises(ValueError, match="is not a CLIP tokenizer"):
        clip_files.load_tokenizer(tiny.GOLDENS.parent / "t5_tokenizer")


def test_each_tower_reads_its_part(tmp_path):
    """Catches a tower that refuses or reads the other's tensors, or the stored position ids."""
    text, image = CLIPText(tiny.CLIP_TEXT), tiny.NETWORKS["clip_image"][0]
    maps = (
        clip_files.text_map(tiny.text_shapes(text)),
        clip_files.image_map(tiny.image_shapes(image, tiny.CLIP_IMAGE.size)),
    )
    weights = {"logit_scale": np.float32([4.6])}
    for names, tower in zip(maps, ("text_model", "vision_model")):
        weights |= tiny.random_weights(names)
        weights[f"{tower}.embeddings.position_ids"] = np.arange(5)[None]
    save_file(weights, tmp_path / "model.safetensors")
    for names in maps:
        params, _ = read_tree(tmp_path, names, "float32")
        want = tiny.as_params(names, tiny.random_weights(names))
        np.testing.assert_array_equal(
            params["block_1"]["mlp"]["up"]["kernel"], want["block_1"]["mlp"]["up"]["kernel"]
        )
        np.testing.assert_array_equal(params["position_embedding"], want["position_embedding"])


def test_configs_of_the_text_tower():
    """Catches a tower alone that is refused, defaults other than transformers', the older of the
    two fields ignored, and the text tower's own projection_dim, which a whole CLIP does not use.
    """
    alone = clip_json(CLIPS["exact"])
    whole = {
        "model_type": "clip",
        "projection_dim": 10,
        "text_config": alone | {"projection_dim": 512},
    }
    for raw in (alone, whole):
        assert clip_files.is_clip(raw)
        assert clip_files.read_text_config(raw) == CLIPS["exact"]
    older = whole | {"text_config": {"hidden_size": 7}, "text_config_dict": alone}
    assert clip_files.read_text_config(older) == CLIPS["exact"]
    sparse = {"model_type": "clip", "text_config": {"hidden_act": "quick_gelu"}}
    assert clip_files.read_text_config(sparse) == SIZES["clip-b32"]
    bigg = {
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "eos_token_id": 2,
    }
    whole = {"model_type": "clip", "projection_dim": 1280, "text_config": bigg}
    assert clip_files.read_text_config(whole) == SIZES["clip-bigg"]
    assert not clip_files.is_clip({"model_type": "clip_vision_model"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu': only quick_gelu, gelu are supported"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06: only 1e-05"),
        ({"intermediate_size": 50}, "intermediate_size is 50: only 96"),
        ({"num_attention_heads": 5}, "5 attention heads do not divide the width 24"),
        ({"hidden_size": None}, "hidden_size is None, not a positive number"),
    ],
)
def test_other_towers_are_refused(change, message):
    """Catches another network that is read as CLIP's."""
    raw = clip_json(CLIPS["quick"]) | change
    for config in (raw, {"model_type": "clip", "text_config": raw}):
        with pytest.raises(ValueError, match=message):
            clip_files.read_text_config(config)
    with pytest.raises(ValueError, match="text_config is not an object"):
        clip_files.read_text_config({"model_type": "clip", "text_config": [1]})


def test_files_of_the_text_tower(tmp_path):
    """Catches a file without prefix or projection that is refused, and a missing projection that
    is not named together with the choice that needs none.
    """
    config, weights = CLIPS["exact"], random_weights(CLIPS["exact"])
    short = {name.removeprefix("text_model."): value for name, value in weights.items()}
    sums = set()
    for i, variant in enumerate((weights, short)):
        save_file(variant, tmp_path / f"{i}.safetensors")
        names = clip_files.encoder_map(config)
        params, sha256 = read_tree(tmp_path / f"{i}.safetensors", names, "float32")
        jax.tree.map(np.testing.assert_array_equal, params, random_params(config))
        sums.add(sha256)
    assert len(sums) == 1
    end = config.with_choice(Choice(pooling="end"))
    without = {name: value for name, value in weights.items() if "projection" not in name}
    for variant in (weights, without):
        save_file(variant, tmp_path / "model.safetensors")
        params, _ = read_tree(tmp_path, clip_files.encoder_map(end), "float32")
        assert "projection" not in params
    with pytest.raises(ValueError, match="lacks text_projection.weight: choose .*@pooling=end"):
        read_tree(tmp_path, clip_files.encoder_map(config), "float32")


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json"])
def test_no_caption_is_unknown(tmp_path, layout):
    """Catches the end token, which is CLIP's unknown token, taken for an unknown character."""
    tokenizer, _ = clip_files.load_tokenizer(write_tokenizer(tmp_path / "clip", layout))
    assert unknown_characters(tokenizer, ["a red apple", ""]) == ["", ""]


@pytest.mark.parity
def test_transformers_reads_the_same_tokens(tmp_path):
    """Catches other ids than those of transformers' own loading of a directory."""
    transformers = pytest.importorskip("transformers")
    directory = write_tokenizer(tmp_path / "clip", "vocab.json")
    texts = ["A  Red apple", "", "apple, red!", "red apple " * 60]
    want = transformers.CLIPTokenizer.from_pretrained(directory)(
        texts, truncation=True, max_length=77
    )["input_ids"]
    assert tokenize(clip_files.load_tokenizer(directory)[0], texts, 77)[0] == want
