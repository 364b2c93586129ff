"""What the control trials say about raters, and how well raters agree."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import krippendorff
import numpy as np
from jaxtyping import Int

from imagen_jax.evals import statistics
from imagen_jax.evals.rating.design import IDENTICAL, REPEAT
from imagen_jax.evals.rating.protocols import LEFT, SAME
from imagen_jax.evals.rating.rating_exports import Key, Rating

THRESHOLD = 0.8  # share of right answers to controls, of Imagen's section 3


@dataclasses.dataclass
class RaterScore:
    """Answers of one rater to control trials.

    right: (right answers, all answers to trials with a right answer). repeats: (answers to repeats
    that are the same as before, all answers to repeats).
    """

    right: tuple[int, int] = (0, 0)
    repeats: tuple[int, int] = (0, 0)

    @property
    def is_kept(self) -> bool:
        """Whether enough answers are right. A rater without control answers is kept."""
        right, answers = self.right
        return answers == 0 or right >= THRESHOLD * answers


def score(ratings: Sequence[Rating], key: Key) -> dict[str, RaterScore]:
    """{rater: score} of all raters."""
    scores = {rating.rater: RaterScore() for rating in ratings}
    chosen: dict[tuple[str, str], Mapping[str, str]] = {}
    for rating in ratings:
        chosen[rating.rater, rating.trial] = systems_chosen(rating, key)
    for rating in ratings:
        trial, own = key.trials[rating.trial], scores[rating.rater]
        if rating.skipped:
            continue
        for question, answer in rating.answers.items():
            if (right := _is_right(rating, trial, answer)) is not None:
                own.right = _add(own.right, right)
            if trial["kind"] == REPEAT:
                before = chosen.get((rating.rater, trial["repeats"]), {}).get(question)
                if before is not None:
                    again = chosen[rating.rater, rating.trial][question]
                    own.repeats = _add(own.repeats, before == again)
    return scores


def systems_chosen(rating: Rating, key: Key) -> dict[str, str]:
    """{question: the preferred system, SAME, or the answer about one set}."""
    sets = key.trials[rating.trial]["sets"]
    side = lambda answer: rating.left if answer == LEFT else rating.right
    if rating.right is None:
        return dict(rating.answers)
    return {
        question: SAME if answer == SAME else sets[side(answer)]
        for question, answer in rating.answers.items()
    }


def _is_right(rating: Rating, trial: Mapping[str, Any], answer: str) -> bool | None:
    """Whether an answer to a control trial is right; None for other trials."""
    if trial["kind"] == IDENTICAL:
        return answer == SAME
    if trial["answer"] is None:
        return None
    if rating.right is None:
        return answer == trial["answer"]
    return answer != SAME and (rating.left if answer == LEFT else rating.right) == trial["answer"]


def _add(count: tuple[int, int], hit: bool) -> tuple[int, int]:
    return count[0] + hit, count[1] + 1


def summary(scores: Mapping[str, RaterScore]) -> dict[str, Any]:
    """The control results of all raters together, and the number that the filter keeps."""
    together = lambda name: tuple(
        sum(getattr(score, name)[i] for score in scores.values()) for i in range(2)
    )
    right, repeats = together("right"), together("repeats")
    return {
        "raters": len(scores),
        "kept": sum(score.is_kept for score in scores.values()),
        "without_controls": sum(score.right[1] == 0 for score in scores.values()),
        "threshold": THRESHOLD,
        "right": statistics.proportion(*right) if right[1] else None,
        "same_on_repeat": statistics.proportion(*repeats) if repeats[1] else None,
        "removed": sorted(rater for rater, score in scores.items() if not score.is_kept),
    }


def agreement(units: Int[np.ndarray, " n"], values: Int[np.ndarray, " n"]) -> float | None:
    """Krippendorff's alpha of ordered values 0, 1, 2, for votes on the same unit.

    None if no unit has two votes, or all votes are equal.
    """
    _, codes = np.unique(units, return_inverse=True)
    counts = np.zeros((codes.max() + 1, 3), int)
    np.add.at(counts, (codes, values), 1)
    paired = counts[counts.sum(axis=1) > 1]
    if np.count_nonzero(paired.sum(axis=0)) < 2:
        return None
    return statistics.number(
        krippendorff.alpha(value_counts=counts, level_of_measurement="ordinal")
    )
