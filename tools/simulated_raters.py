"""Simulated raters answer the trials of a study, to check its analysis and its size beforehand.

    python -m tools.simulated_raters STUDY --prefer ours=0.5 --output EXPORTS

A vote compares

    u = preference of the left system - that of the right + prompt effect + rater effect
        + bias to the left + noise

with a threshold: the left set wins above it, the right set below its negative, and neither between
them. Effects and noise are normal, so the expected rates are known (`expected_rate`). A careless
rater answers at random. The results say nothing about people or pictures.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from imagen_jax.evals.rating import study
from imagen_jax.evals.rating.design import BROKEN, IDENTICAL, RIGHT_CAPTION, WRONG_CAPTION
from imagen_jax.evals.rating.protocols import LEFT, QUESTIONS, RIGHT, SAME
from imagen_jax.evals.rating.rating_exports import Key, read_key
from imagen_jax.storage import write_atomically

INTACT = 6.0  # preference for an intact set over a broken one
STUDY_JSON = re.compile(r'<script type="application/json" id="study">(.*?)</script>', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class World:
    """How simulated raters answer. The unit is the standard deviation of the noise of one vote.

    preference: {system: preference}; 0 for other systems. prompt, rater: standard deviations of the
    effects. threshold: half the width of the range of "neither". bias: added to the left side.
    careless: the share of raters who answer at random.
    """

    preference: Mapping[str, float]
    prompt: float = 0.5
    rater: float = 0.3
    threshold: float = 0.3
    bias: float = 0.0
    careless: float = 0.0

    def expected_rate(self, first: str, second: str) -> tuple[float, float, float]:
        """The probabilities (first wins, tie, second wins) for careful raters without bias."""
        gap = self.preference.get(first, 0.0) - self.preference.get(second, 0.0)
        spread = (1 + self.prompt**2 + self.rater**2) ** 0.5
        win = float(scipy.stats.norm.sf((self.threshold - gap) / spread))
        loss = float(scipy.stats.norm.cdf((-self.threshold - gap) / spread))
        return win, 1 - win - loss, loss


def read_page(path: Path) -> dict[str, Any]:
    """The study of a page, as its raters receive it."""
    return json.loads(STUDY_JSON.search(path.read_text(encoding="utf-8"))[1])


def fill_in(
    pages: Mapping[int, Mapping[str, Any]], key: Key, world: World, rng: np.random.Generator
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields (name of the rater, lines of the saved file) for all raters of all runs.

    pages: {number of the run: study of its page}.
    """
    effects: dict[tuple, float] = {}
    for run, page in sorted(pages.items()):
        for number, schedule in enumerate(page["schedules"], 1):
            rater = f"simulated-{run}-{number}"
            person = _Person(world, rng, effects, rng.random() < world.careless)
            lines = []
            for position, (index, swapped) in enumerate(schedule):
                shown = page["trials"][index]
                sets = shown["sets"][::-1] if swapped else shown["sets"]
                answers = person.answers(key.trials[shown["id"]], sets)
                lines.append(
                    {
                        "version": page["version"],
                        "study": page["study"],
                        "run": run,
                        "rater": rater,
                        "number": number,
                        "position": position,
                        "trial": shown["id"],
                        "prompt": shown["prompt"],
                        "left": sets[0],
                        "right": sets[1] if len(sets) == 2 else None,
                        "answers": answers,
                        "ms": {name: int(rng.gamma(4, 900)) for name in answers},
                        "skipped": False,
                        "revision": 0,
                        "records": len(schedule),
                    }
                )
            yield rater, lines


class _Person:
    """One simulated rater."""

    def __init__(
        self, world: World, rng: np.random.Generator, effects: dict[tuple, float], careless: bool
    ):
        """effects: of prompts, shared by all raters."""
        self._world, self._rng, self._effects, self._careless = world, rng, effects, careless
        self._lean: dict[tuple, float] = {}

    def answers(self, trial: Mapping[str, Any], sets: list[str]) -> dict[str, str]:
        """The answers to all questions of a trial whose sets are shown in this order."""
        return {name: self._answer(trial, sets, name) for name in trial["questions"]}

    def _answer(self, trial: Mapping[str, Any], sets: list[str], question: str) -> str:
        choices = list(QUESTIONS[question].answers)
        if self._careless:
            return choices[self._rng.integers(len(choices))]
        if len(sets) == 1:
            return self._about_one(trial, sets[0], choices)
        threshold = self._world.threshold if SAME in choices else 0.0
        if trial["kind"] == IDENTICAL:
            u, threshold = 0.0, 1.0
        else:
            u = self._gap(trial, sets, question) + self._world.bias + self._rng.standard_normal()
        if u > threshold:
            return LEFT
        return SAME if u >= -threshold and SAME in choices else RIGHT

    def _gap(self, trial: Mapping[str, Any], sets: list[str], question: str) -> float:
        """The preference for the left set, without noise and bias."""
        if trial["kind"] == BROKEN:
            return INTACT if trial["answer"] == sets[0] else -INTACT
        left, right = (trial["sets"][token] for token in sets)
        first, second = sorted((left, right))
        sign = 1.0 if left == first else -1.0
        preference = lambda name: self._world.preference.get(name, 0.0)
        shared = self._draw(self._effects, (trial["prompt"], first, second, question))
        own = self._draw(self._lean, (first, second, question))
        lean = self._world.prompt * shared + self._world.rater * own
        return preference(left) - preference(right) + sign * lean

    def _draw(self, table: dict[tuple, float], name: tuple) -> float:
        if name not in table:
            table[name] = float(self._rng.standard_normal())
        return table[name]

    def _about_one(self, trial: Mapping[str, Any], token: str, choices: list[str]) -> str:
        if trial["kind"] in (RIGHT_CAPTION, WRONG_CAPTION):
            return trial["answer"]
        preference = self._world.preference.get(trial["sets"][token], 0.0)
        effect = self._world.prompt * self._draw(self._effects, (trial["prompt"], "caption"))
        u = preference + effect + self._rng.standard_normal()
        return choices[int(u < 0.5) + int(u < -0.5)]


def simulate(directory: Path, world: World, output: Path, seed: int) -> int:
    """Fills in all pages of a study. Writes one file per rater, and returns their number."""
    key = read_key(directory / study.KEY)
    if unknown := set(world.preference) - set(key.names):
        raise ValueError(f"{min(unknown)!r} is none of the systems {', '.join(key.names)}")
    pages = [read_page(path) for path in sorted((directory / study.STUDY).glob("*.html"))]
    by_run = {page["run"]: page for page in pages}
    for rater, lines in fill_in(by_run, key, world, np.random.default_rng(seed)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(output / f"{rater}.jsonl", text.encode())
    return sum(len(page["schedules"]) for page in pages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study", type=Path, help="the directory that `rate make` wrote")
    parser.add_argument("--prefer", action="append", default=[], help="NAME=PREFERENCE")
    fields = ("prompt", "rater", "threshold", "bias", "careless")
    for name in fields:
        parser.add_argument(f"--{name}", type=float, default=getattr(World, name))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        pairs = (text.rpartition("=") for text in args.prefer)
        preference = {name: float(value) for name, _, value in pairs}
    except ValueError:
        parser.error(f"--prefer {' '.join(args.prefer)} must be NAME=PREFERENCE, such as ours=0.5")
    world = World(preference, **{name: getattr(args, name) for name in fields})
    try:
        count = simulate(args.study, world, args.output, args.seed)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{count} simulated raters: {args.output}")


if __name__ == "__main__":
    main()
