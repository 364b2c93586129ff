"""Small studies for the tests of the rating page."""

import json

import numpy as np
from PIL import Image

PAIR = [["left", "Set A"], ["same", "No preference"], ["right", "Set B"]]
QUESTIONS = {
    "fidelity": {
        "text": "Which set of pictures has the higher quality?",
        "caption": False,
        "answers": PAIR,
    },
    "alignment": {
        "text": "Which set fits the caption?",
        "caption": True,
        "answers": PAIR,
    },
    "caption": {
        "text": "Does the caption describe the picture?",
        "caption": True,
        "answers": [["yes", "Yes"], ["somewhat", "Somewhat"], ["no", "No"]],
    },
}
CAPTION = "A red cube on a blue sphere, with a green cone in front of it"


def make_trial(index, questions=("fidelity", "alignment"), sides=2, caption=CAPTION):
    """The trial with id 000i, prompt 100 + i, and the sets i0 and i1."""
    return {
        "id": f"{index:04x}",
        "prompt": 100 + index,
        "caption": f"{caption}, number {index}",
        "questions": list(questions),
        "sets": [f"{index}{side}" for side in range(sides)],
    }


def make_study(trials, schedules, *, count=1, order="hidden", **changed):
    """A study whose sets have `count` pictures each, by relative URLs."""
    tokens = [token for trial in trials for token in trial["sets"]]
    pictures = {token: [f"pictures/{token}_{k}.png" for k in range(count)] for token in tokens}
    return {
        "version": 1,
        "study": "5a" * 32,
        "run": 3,
        "order": order,
        "questions": QUESTIONS,
        "trials": trials,
        "pictures": pictures,
        "schedules": schedules,
        "consent": "You compare pictures. Your answers are used for research.\nYou may stop.",
        "warning": "Some pictures may be disturbing. You can skip any of them.",
        **changed,
    }


def write_pictures(folder, study, size=32):
    """Random pictures at the relative URLs of the study."""
    rng = np.random.default_rng(0)
    for name in sorted(name for names in study["pictures"].values() for name in names):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC).save(folder / name)


def parse_records(text):
    return [json.loads(line) for line in text.splitlines()]
