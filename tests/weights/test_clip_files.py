"""CLIP's tokenizer in both layouts, and the parts of a file that each tower reads."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from imagen_jax.text.clip import CLIPText
from imagen_jax.text.tokenizer import tokenize
from imagen_jax.weights import clip_files
from imagen_jax.weights.name_map import read_tree
from tests.evals.networks import tiny

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
