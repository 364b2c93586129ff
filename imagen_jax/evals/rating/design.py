"""The trials of a study, and the raters who see them: a pure function of prompts and a seed.

A study has runs, and each run has its own raters. A *trial* shows two sets of pictures of one
prompt, or one set. The order of the two sets is drawn once per trial, and half of its raters see
them swapped. Names of trials and sets are keyed hashes: without the seed they reveal nothing.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from imagen_jax.evals.rating.protocols import PROTOCOLS, QUESTIONS, REFERENCE

REGULAR, IDENTICAL, BROKEN, REPEAT = "regular", "identical", "broken", "repeat"
RIGHT_CAPTION, WRONG_CAPTION = "right caption", "wrong caption"  # controls of one picture
SEED_BITS = 128
LEAST_GAP = 5  # trials between a trial and its repeat, where there are enough
PAIRINGS = ("all", "first")


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt of the study."""

    id: int
    text: str
    category: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a study. With the prompts and systems they determine it.

    protocol: a key of PROTOCOLS.
    per_side: pictures per set.
    raters: raters per run.
    block: regular trials per rater; 0: all of the run.
    controls: control trials per kind and rater.
    by_category: one run per category, instead of one run.
    pairs: "all" pairs of systems, or the "first" system with each other one.
    order: "hidden" shows the caption after the first question, "together" from the beginning.
    seed: of SEED_BITS bits; whoever knows it can compute the names of all sets.
    """

    protocol: str
    per_side: int
    raters: int
    block: int
    controls: int
    by_category: bool
    pairs: str
    order: str
    seed: int

    def token(self, *labels: object) -> str:
        """The name of something in the study: 16 hex digits, keyed by the seed."""
        key = self.seed.to_bytes(SEED_BITS // 8, "big")
        text = "\0".join(map(str, labels)).encode()
        return hashlib.blake2b(text, key=key, digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """The pictures that a trial shows on one side.

    scrambled: whether the tiles of the pictures are exchanged, which everybody sees.
    """

    token: str
    system: str
    prompt: int
    scrambled: bool = False


@dataclasses.dataclass(frozen=True)
class Trial:
    """One screen.

    token: its name in the page and the key.
    kind: one of the constants above.
    prompt: the id of the prompt whose caption is shown.
    questions: the names of the questions.
    sets: two sets in the order before swapping, or one set.
    answer: the index of the right set of a control trial, or the right answer about a single set;
      None for regular trials, repeats and identical sets.
    repeats: the token of the trial that this one repeats, or "".
    """

    token: str
    kind: str
    prompt: int
    questions: tuple[str, ...]
    sets: tuple[PictureSet, ...]
    answer: int | str | None = None
    repeats: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """Trials with their own raters.

    schedules: for each rater, (index of a trial, whether its sets are swapped) in order.
    """

    number: int
    part: str
    category: str
    trials: Sequence[Trial]
    schedules: Sequence[Sequence[tuple[int, bool]]]


def make_runs(items: Sequence[Item], systems: Sequence[str], settings: Settings) -> list[Run]:
    """All runs of a study.

    systems: names; with the protocol "coco" the last is REFERENCE.

    Raises ValueError for fewer than two systems or prompts.
    """
    if len(systems) < 2:
        raise ValueError("a comparison needs two systems: give --pictures NAME=PATH for each")
    if len(items) < 2 and settings.controls:
        raise ValueError("control trials need two prompts: give more prompts, or --controls 0")
    categories = dict.fromkeys(item.category for item in items)
    groups = {
        category: [item for item in items if item.category == category] for category in categories
    }
    if not settings.by_category:
        groups = {"": list(items)}
    runs = []
    for part, questions in PROTOCOLS[settings.protocol].parts.items():
        for category, members in groups.items():
            number = len(runs) + 1
            rng = np.random.default_rng([settings.seed, number])
            builder = _Builder(settings, number, questions, items, systems, rng)
            runs.append(builder.run(part, category, members))
    return runs


def pairs_of(systems: Sequence[str], pairing: str) -> list[tuple[str, str]]:
    """The pairs of systems that are compared. A reference is compared with each system."""
    if systems[-1] == REFERENCE:
        return [(system, REFERENCE) for system in systems[:-1]]
    if pairing == "first":
        return [(systems[0], other) for other in systems[1:]]
    return list(itertools.combinations(systems, 2))


@dataclasses.dataclass
class _Builder:
    """Makes one run."""

    settings: Settings
    number: int
    questions: tuple[str, ...]
    items: Sequence[Item]
    systems: Sequence[str]
    rng: np.random.Generator

    def run(self, part: str, category: str, members: Sequence[Item]) -> Run:
        regular = self._regular(members)
        controls = self._controls(members)
        blocks = deal(len(regular), self.settings.raters, self.settings.block, self.rng)
        trials = regular + controls
        orders = []
        repeats: dict[int, int] = {}  # index of a trial -> index of its repeat
        for block in blocks:
            order = self.rng.permutation([*block, *range(len(regular), len(trials))]).tolist()
            orders.append(self._with_repeats(order, block, trials, repeats))
        trials += [self._repeat(trials[index]) for index in repeats]
        swaps = _balance(orders, {copy: index for index, copy in repeats.items()}, self.rng)
        order = sorted(range(len(trials)), key=lambda index: trials[index].token)
        place = {index: position for position, index in enumerate(order)}
        schedules = [
            [(place[index], swap[index]) for index in sequence]
            for sequence, swap in zip(orders, swaps)
        ]
        return Run(self.number, part, category, [trials[index] for index in order], schedules)

    @property
    def _pair(self) -> bool:
        return QUESTIONS[self.questions[0]].is_pair

    def _regular(self, members: Sequence[Item]) -> list[Trial]:
        groups = [(system,) for system in self.systems]
        if self._pair:
            groups = pairs_of(self.systems, self.settings.pairs)
        trials = []
        for item in members:
            for names in groups:
                sets = [self._set(name, item.id) for name in names]
                trials.append(self._trial(REGULAR, item.id, sets))
        return trials

    def _trial(self, kind: str, prompt: int, sets: Sequence[PictureSet], **fields) -> Trial:
        """A trial whose sets are in random order. `answer` is an index into `sets` as given."""
        order = self.rng.permutation(len(sets))
        if isinstance(answer := fields.get("answer"), int):
            fields["answer"] = int(np.flatnonzero(order == answer)[0])
        labels = (kind, prompt, *(part.token for part in sets))
        token = self.settings.token("trial", self.number, *labels)
        ordered = tuple(sets[index] for index in order)
        return Trial(token, kind, prompt, self.questions, ordered, **fields)

    def _set(self, system: str, prompt: int, scrambled: bool = False, copy: str = "") -> PictureSet:
        token = self.settings.token("set", system, prompt, scrambled, copy)
        return PictureSet(token, system, prompt, scrambled)

    def _controls(self, members: Sequence[Item]) -> list[Trial]:
        """The control trials, which all raters of the run see."""
        kinds = (RIGHT_CAPTION, WRONG_CAPTION)
        if self._pair:
            ties = QUESTIONS[self.questions[0]].has_ties
            kinds = (IDENTICAL, BROKEN) if ties else (BROKEN,)
        trials = []
        for kind in kinds:
            systems = self._shuffled_systems(kind)
            for index in range(self.settings.controls):
                item = members[self.rng.integers(len(members))]
                others = [other.id for other in self.items if other.text != item.text]
                if not others:
                    raise ValueError(
                        "control trials need prompts with different texts: give more prompts, or"
                        " --controls 0"
                    )
                other = others[self.rng.integers(len(others))]
                system = systems[index % len(systems)]
                trials.append(self._control(kind, index, system, item.id, other))
        return trials

    def _shuffled_systems(self, kind: str) -> list[str]:
        """The systems in an order that raters do not know.

        Pictures of a control trial are those of a regular trial, so their files tell which side of
        that trial is of the same system. They must not tell which system it is.
        """
        token = self.settings.token("control systems", self.number, kind)
        order = np.random.default_rng(int(token, 16)).permutation(len(self.systems))
        return [self.systems[index] for index in order]

    def _control(self, kind: str, index: int, system: str, prompt: int, other: int) -> Trial:
        """One control trial. Its sets have names of their own, so files do not give it away."""
        copy = f"{self.number}/{kind}/{index}"
        if REFERENCE in self.systems:
            system = REFERENCE
        if kind == IDENTICAL:
            sets = [self._set(system, prompt, False, f"{copy}/{side}") for side in range(2)]
            return self._trial(kind, prompt, sets)
        if kind == BROKEN:
            sets = [
                self._set(system, prompt, False, copy),
                self._set(system, other, True, copy),
            ]
            return self._trial(kind, prompt, sets, answer=0)
        right = kind == RIGHT_CAPTION
        shown = self._set(system, prompt if right else other, False, copy)
        return self._trial(kind, prompt, [shown], answer="yes" if right else "no")

    def _with_repeats(
        self,
        order: Sequence[int],
        block: Sequence[int],
        trials: Sequence[Trial],
        repeats: dict[int, int],
    ) -> list[int]:
        """A rater's order of trials, with repeats of early trials inserted later.

        repeats: {trial: its repeat}; new repeats are added to it. Raters share repeats where
        possible, because every repeat has its own picture files.
        """
        order = list(order)
        if not self._pair:
            return order
        own = set(block)
        place = {index: position for position, index in enumerate(order) if index in own}
        is_late = lambda index: place[index] + 1 + LEAST_GAP > len(order)
        early = sorted(place, key=lambda i: (is_late(i), i not in repeats, place[i]))
        for index in early[: min(self.settings.controls, len(early) // 2)]:
            copy = repeats.setdefault(index, len(trials) + len(repeats))
            first = min(order.index(index) + 1 + LEAST_GAP, len(order))
            order.insert(int(self.rng.integers(first, len(order) + 1)), copy)
        return order

    def _repeat(self, trial: Trial) -> Trial:
        """The same sets in the same order under other names."""
        rename = lambda part: dataclasses.replace(
            part, token=self.settings.token("repeat", trial.token, part.token)
        )
        return dataclasses.replace(
            trial,
            token=self.settings.token("repeat", trial.token),
            kind=REPEAT,
            sets=tuple(rename(part) for part in trial.sets),
            repeats=trial.token,
        )


def deal(trials: int, raters: int, block: int, rng: np.random.Generator) -> list[list[int]]:
    """A block of trials for each rater. The numbers of raters of two trials differ by at most 1.

    block: the size of a block; 0, or more than `trials`: all trials.
    """
    size = trials if block == 0 else min(block, trials)
    order = rng.permutation(trials)
    dealt = itertools.cycle(int(index) for index in order)
    return [list(itertools.islice(dealt, size)) for _ in range(raters)]


def _balance(
    orders: Sequence[Sequence[int]], originals: Mapping[int, int], rng: np.random.Generator
) -> list[dict[int, bool]]:
    """For each rater, {trial: whether its sets are swapped}; half of a trial's raters see them so.

    originals: {repeat: the trial that it repeats}; a repeat is swapped if its trial is not.
    """
    seen: dict[int, list[int]] = {}
    for rater, order in enumerate(orders):
        for index in order:
            seen.setdefault(index, []).append(rater)
    swaps: list[dict[int, bool]] = [{} for _ in orders]
    for index in sorted(set(seen) - set(originals)):
        first = int(rng.integers(2))
        for position, rater in enumerate(rng.permutation(seen[index])):
            swaps[rater][index] = bool((position + first) % 2)
    for copy, index in originals.items():
        for rater in seen[copy]:
            swaps[rater][copy] = not swaps[rater][index]
    return swaps
