"""The results of a study: preference rates with intervals, tests, and checks of the raters."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Bool, Int

from imagen_jax.evals.rating import clustered, rater_checks, strengths
from imagen_jax.evals.rating.design import REGULAR
from imagen_jax.evals.rating.protocols import LEFT, QUESTIONS, SAME, SCORES
from imagen_jax.evals.rating.rating_exports import Key, Rating, Ratings
from imagen_jax.evals.rating.strengths import LOSS, TIE, WIN

OVERALL = "overall"


@dataclasses.dataclass(frozen=True)
class Votes:
    """The votes on one question about pairs of systems, one per regular trial and rater.

    prompt, rater, category: ids or indices.
    first, second: indices of the two systems in the key, first < second.
    outcome: WIN, TIE or LOSS of the first system.
    first_is_left: whether the first system was shown on the left.
    """

    prompt: Int[np.ndarray, " n"]
    rater: Int[np.ndarray, " n"]
    category: Int[np.ndarray, " n"]
    first: Int[np.ndarray, " n"]
    second: Int[np.ndarray, " n"]
    outcome: Int[np.ndarray, " n"]
    first_is_left: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.outcome)

    def where(self, mask: Bool[np.ndarray, " n"]) -> "Votes":
        """The votes that a mask selects."""
        return Votes(*(getattr(self, field.name)[mask] for field in dataclasses.fields(self)))

    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of systems that have votes."""
        return sorted(set(zip(self.first.tolist(), self.second.tolist())))

    def of_pair(self, pair: tuple[int, int]) -> "Votes":
        """The votes on one pair."""
        return self.where((self.first == pair[0]) & (self.second == pair[1]))


def analyse(key: Key, ratings: Ratings) -> dict[str, Any]:
    """The result of a study as JSON: for all raters, and for those who pass the control trials."""
    scores = rater_checks.score(ratings.rows, key)
    kept = [row for row in ratings.rows if scores[row.rater].is_kept]
    skipped = sum(row.skipped for row in ratings.rows)
    return {
        "study": key.study,
        "settings": dict(key.settings),
        "systems": [dict(system) for system in key.systems],
        "files": ratings.files,
        "trials": len(ratings.rows),
        "skipped": skipped,
        "problems": list(ratings.problems),
        "controls": rater_checks.summary(scores),
        "response_ms": _response_times(ratings.rows),
        "all_raters": _results(key, ratings.rows),
        "filtered": _results(key, kept),
    }


def _response_times(rows: Sequence[Rating]) -> dict[str, float]:
    """The median response time of each question in milliseconds."""
    times: dict[str, list[float]] = {}
    for row in rows:
        for question, value in row.ms.items():
            if question in QUESTIONS:
                times.setdefault(question, []).append(value)
    return {question: float(np.median(values)) for question, values in sorted(times.items())}


def _results(key: Key, rows: Sequence[Rating]) -> dict[str, Any]:
    """{question: its results} for some raters. A question without votes is left out."""
    asked = dict.fromkeys(name for trial in key.trials.values() for name in trial["questions"])
    results = {}
    for question in asked:
        regular = [row for row in rows if _is_vote(row, key, question)]
        if not regular:
            continue
        if QUESTIONS[question].is_pair:
            results[question] = preferences(
                votes_of(key, regular, question), key.names, _categories(key)
            )
        else:
            results[question] = _scores(key, regular, question)
    return results


def _is_vote(row: Rating, key: Key, question: str) -> bool:
    return key.trials[row.trial]["kind"] == REGULAR and question in row.answers


def _categories(key: Key) -> list[str]:
    return list(dict.fromkeys(trial["category"] for trial in key.trials.values()))


def votes_of(key: Key, rows: Sequence[Rating], question: str) -> Votes:
    """The votes of regular trials on a question about two sets."""
    index = {name: i for i, name in enumerate(key.names)}
    categories = {name: i for i, name in enumerate(_categories(key))}
    raters = {name: i for i, name in enumerate(sorted({row.rater for row in rows}))}
    table = []
    for row in rows:
        trial = key.trials[row.trial]
        left, right = (index[trial["sets"][token]] for token in (row.left, row.right))
        answer = row.answers[question]
        won = TIE if answer == SAME else WIN if (answer == LEFT) == (left < right) else LOSS
        table.append(
            (
                trial["prompt"],
                raters[row.rater],
                categories[trial["category"]],
                min(left, right),
                max(left, right),
                won,
                left < right,
            )
        )
    *integers, is_left = np.array(table, np.int64).T
    return Votes(*integers, is_left.astype(bool))


def preferences(votes: Votes, names: Sequence[str], categories: Sequence[str]) -> dict[str, Any]:
    """The results of a question about pairs: overall, by category, side bias, agreement."""
    result: dict[str, Any] = {"pairs": [], "side_bias": side_bias(votes)}
    for pair in votes.pairs():
        own = votes.of_pair(pair)
        entry = {"first": names[pair[0]], "second": names[pair[1]], OVERALL: preference(own)}
        entry["categories"] = {
            categories[c]: preference(own.where(own.category == c)) for c in np.unique(own.category)
        }
        result["pairs"].append(entry)
    units = votes.prompt * len(names) ** 2 + votes.first * len(names) + votes.second
    result["alpha"] = rater_checks.agreement(units, votes.outcome)
    if len(names) > 2:
        result["strengths"] = strength_table(votes, names)
    return result


def preference(votes: Votes) -> dict[str, Any]:
    """The rates of one pair, with intervals for new prompts and raters, and the sign test."""
    rates = {
        name: clustered.rate((votes.outcome == value).astype(float), votes.prompt, votes.rater)
        for name, value in (("first", WIN), ("tie", TIE), ("second", LOSS))
    }
    difference = np.where(votes.outcome == WIN, 1.0, np.where(votes.outcome == LOSS, -1.0, 0.0))
    return {
        "rates": rates,
        "difference": clustered.mean(difference, votes.prompt, votes.rater, (-1.0, 1.0)),
        "sign_test": sign_test(votes),
        "votes": len(votes),
        "prompts": len(np.unique(votes.prompt)),
        "raters": len(np.unique(votes.rater)),
    }


def sign_test(votes: Votes) -> dict[str, Any]:
    """The exact two-sided sign test over prompts, without prompts that neither system wins.

    Returns {"first", "second": numbers of prompts that the system wins by votes, "equal", "p"}.
    """
    _, codes = np.unique(votes.prompt, return_inverse=True)
    lead = np.bincount(codes, np.where(votes.outcome == WIN, 1.0, 0.0))
    lead -= np.bincount(codes, np.where(votes.outcome == LOSS, 1.0, 0.0))
    first, second = int((lead > 0).sum()), int((lead < 0).sum())
    p = scipy.stats.binomtest(first, first + second).pvalue if first + second else 1.0
    return {"first": first, "second": second, "equal": int((lead == 0).sum()), "p": float(p)}


def side_bias(votes: Votes) -> dict[str, Any] | None:
    """The rate of "left" among the votes for a side: 0.5 without bias, since sides are balanced."""
    decided = votes.where(votes.outcome != TIE)
    if not len(decided):
        return None
    left = (decided.outcome == WIN) == decided.first_is_left
    return clustered.rate(left.astype(float), decided.prompt, decided.rater)


def strength_table(votes: Votes, names: Sequence[str]) -> dict[str, Any]:
    """Davidson's strengths of all systems, as logarithms with mean 0, and their intervals."""
    pairs = votes.pairs()
    codes = {pair: i for i, pair in enumerate(pairs)}
    pair_of = np.array([codes[pair] for pair in zip(votes.first.tolist(), votes.second.tolist())])
    kinds, table = 3 * pair_of + votes.outcome, np.array(pairs)
    counts = np.bincount(kinds, minlength=3 * len(pairs)).astype(float)
    reshape = lambda flat: flat.reshape(-1, 3)
    if reason := strengths.no_maximum(reshape(counts), table, len(names)):
        return {"undefined": reason}
    fitted = lambda flat: strengths.fit(reshape(flat), table, len(names))[0]
    log_p, log_v = strengths.fit(reshape(counts), table, len(names))
    influence = clustered.influences(fitted, kinds, len(counts))
    systems = {}
    for i, name in enumerate(names):
        found = clustered.variance(influence[:, i], votes.prompt, votes.rater)
        half = found.quantile * found.error
        systems[name] = {
            "log_strength": float(log_p[i]),
            "se": found.error,
            "low": float(log_p[i]) - half,
            "high": float(log_p[i]) + half,
        }
    return {"systems": systems, "log_tie_parameter": log_v if log_v > strengths.NO_TIES else None}


def _scores(key: Key, rows: Sequence[Rating], question: str) -> dict[str, Any]:
    """The mean score of each system on a question about one picture, from 0 to 100."""
    raters = {name: i for i, name in enumerate(sorted({row.rater for row in rows}))}
    table: dict[str, list[tuple[int, int, str, float]]] = {name: [] for name in key.names}
    for row in rows:
        trial = key.trials[row.trial]
        value = SCORES[row.answers[question]]
        system = trial["sets"][row.left]
        table[system].append((trial["prompt"], raters[row.rater], trial["category"], value))
    systems = {name: dict(_grouped(entries)) for name, entries in table.items() if entries}
    units, values = [], []
    for number, entries in enumerate(table.values()):
        units += [prompt * len(table) + number for prompt, *_ in entries]
        values += [int(value / 50) for *_, value in entries]
    return {"systems": systems, "alpha": rater_checks.agreement(np.array(units), np.array(values))}


def _grouped(
    entries: Sequence[tuple[int, int, str, float]],
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """("overall" or "categories", results) of the scores of one system."""

    def average(rows: Sequence[tuple[int, int, str, float]]) -> dict[str, Any]:
        prompts, raters, _, values = zip(*rows)
        bounds = min(SCORES.values()), max(SCORES.values())
        return clustered.mean(np.array(values), np.array(prompts), np.array(raters), bounds)

    yield OVERALL, average(entries)
    groups: dict[str, list] = {}
    for entry in entries:
        groups.setdefault(entry[2], []).append(entry)
    yield "categories", {name: average(rows) for name, rows in groups.items()}
