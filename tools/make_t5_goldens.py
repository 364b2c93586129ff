"""Makes the goldens of tests/text from transformers' T5EncoderModel.

    pip install torch==2.13.0 transformers==5.23.0 && python tools/make_t5_goldens.py

They are features, files written by torch.save, and a small tokenizer. Weights come from a seed
(tests/text/random_t5.py), so only tokens, masks and features are stored. torch.save writes a full
encoder-decoder in three shards; the third one (decoder only) is deleted, because loading the
encoder must not need it. A second run gives the same bytes, except for t5_torch_legacy.bin, in
which torch writes memory addresses.
"""

import json
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.text.random_t5 import (  # noqa: E402
    CASES,
    GOLDENS,
    TOKENIZER,
    random_tensor,
    random_tokens,
)

LENGTHS = (40, 17, 1)
SEED = 7
BIN_CONFIG = dict(d_model=8, d_ff=12, d_kv=4, num_heads=2, num_layers=2, vocab_size=24)
CAPTIONS = [
    "a red apple on a blue plate",
    "two green birds over the sea",
    "a woman doctor with dark skin tone",
    "the flag of a small island",
    "a yellow star and a white moon",
    "an old clock in a dark room",
    "man riding a brown horse",
    "a cup of black coffee, with milk.",
]


def seeded_state(model, seed: int, embedding_scale: float) -> dict:
    """The seeded weights under the names of a torch model.

    All names of the embedding share one storage, as in the model.
    """
    import torch

    state = {
        n: torch.tensor(random_tensor(n, tuple(v.shape), seed, embedding_scale))
        for n, v in model.state_dict().items()
    }
    aliases = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return state | {alias: state["shared.weight"] for alias in aliases if alias in state}


def make_features() -> None:
    import torch
    from transformers import T5Config, T5EncoderModel

    arrays = {}
    for case, (fields, scale) in CASES.items():
        fields = {"feed_forward_proj": "gated-gelu"} | fields
        model = T5EncoderModel(T5Config(**fields)).eval()
        model.load_state_dict(seeded_state(model, SEED, scale))
        tokens, mask = random_tokens(model.config, SEED, LENGTHS)
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()
            ).last_hidden_state
        arrays |= {f"{case}/tokens": tokens, f"{case}/mask": mask, f"{case}/features": out.numpy()}
    np.savez_compressed(GOLDENS / "t5_features.npz", **arrays)


def make_torch_files() -> None:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    directory = GOLDENS / "t5_bin"
    directory.mkdir(parents=True, exist_ok=True)
    model = T5ForConditionalGeneration(
        T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **BIN_CONFIG)
    )
    state = seeded_state(model, SEED, 1.0)
    decoder = [n for n in state if n.startswith("decoder.block.1")]
    encoder = [n for n in state if n not in decoder]
    shards = [encoder[: len(encoder) // 3], encoder[len(encoder) // 3 :], decoder]
    index = {}
    for i, names in enumerate(shards):
        file = f"pytorch_model-0000{i + 1}-of-00003.bin"
        index |= dict.fromkeys(names, file)
        if names is not decoder:
            torch.save({name: state[name] for name in names}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}, indent=1) + "\n"
    )
    config = {"model_type": "t5", "feed_forward_proj": "gated-gelu", **BIN_CONFIG}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    grid = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    odd = {
        "view": grid[1:, 2:],
        "transposed": grid.t(),
        "expanded": torch.ones(1).expand(3, 4),
        "empty": torch.zeros(0, 3),
        "bfloat16": grid[0].bfloat16(),
        "half": grid[1].half(),
        "double": grid[2].double(),
        "long": grid[3].long(),
        "bool": grid[0] > 2,
    }
    for name, zipped in (("zip", True), ("legacy", False)):
        torch.save(odd, GOLDENS / f"t5_torch_{name}.bin", _use_new_zipfile_serialization=zipped)
    np.savez_compressed(
        GOLDENS / "t5_torch_values.npz", **{n: t.float().numpy() for n, t in odd.items()}
    )


def make_tokenizer() -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=96, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS * 4, trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    pieces = sorted(
        (round(-score, 6), piece) for piece, score in vocab[len(special) :]
    )  # training leaves ties in any order
    T5Tokenizer(
        vocab=[(s, 0.0) for s in special] + [(piece, -score) for score, piece in pieces],
        extra_ids=0,
    ).save_pretrained(TOKENIZER)


if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    make_features()
    make_torch_files()
    make_tokenizer()
