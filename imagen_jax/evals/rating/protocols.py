"""The questions that raters answer, and the protocols that ask them.

`drawbench` is the comparison of Imagen's section 4 and appendix C: two sets of pictures, two
questions, three answers. `coco` is that of section 3: a picture is compared with the reference
photograph, and one picture with its caption, scored 100, 50 or 0. The wording is ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

LEFT, SAME, RIGHT = "left", "same", "right"  # answers about two sets, as they are displayed
SCORES = {"yes": 100.0, "somewhat": 50.0, "no": 0.0}  # of Imagen's section 3
REFERENCE = "reference"  # the system whose pictures are the reference images
PER_SIDE = (1, 4, 8)  # pictures of one set


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its answers.

    answers: {value: label}, in the order of the keys 1, 2, 3. caption: whether it is shown.
    """

    text: str
    answers: Mapping[str, str]
    caption: bool

    @property
    def is_pair(self) -> bool:
        """Whether the question compares two sets."""
        return LEFT in self.answers

    @property
    def has_ties(self) -> bool:
        """Whether raters may prefer neither set."""
        return SAME in self.answers

    def record(self) -> dict[str, Any]:
        """The question for the page."""
        answers = [list(answer) for answer in self.answers.items()]
        return {"text": self.text, "caption": self.caption, "answers": answers}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One or more parts, each with its own raters.

    parts: {name: questions}; a trial of a part asks all of them. per_side: default number of
    pictures per set. block: default number of trials per rater; 0: all trials of the run.
    with_reference: whether systems are compared with reference images, not with each other.
    """

    parts: Mapping[str, tuple[str, ...]]
    per_side: int
    block: int
    with_reference: bool


_SETS = {LEFT: "Set A", SAME: "No preference", RIGHT: "Set B"}
QUESTIONS = {
    "fidelity": Question("Which set of pictures has the higher quality?", _SETS, False),
    "alignment": Question("Which set of pictures better matches the text?", _SETS, True),
    "photorealism": Question(
        "Which picture looks more like a photograph?",
        {LEFT: "Picture A", RIGHT: "Picture B"},
        False,
    ),
    "caption": Question(
        "Does the text describe the picture?",
        {"yes": "Yes", "somewhat": "Somewhat", "no": "No"},
        True,
    ),
}
PROTOCOLS = {
    "drawbench": Protocol({"sets": ("fidelity", "alignment")}, 8, 0, False),
    "coco": Protocol(
        {"photorealism": ("photorealism",), "caption": ("caption",)}, 1, 50, with_reference=True
    ),
}
