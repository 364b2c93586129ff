"""Compares the points of a grid: the best point of each metric, and those that are tied with it.

All points have the same prompts and seeds, so differences are paired by prompt: what the points
share cancels, and a difference has a smaller error than the two values suggest.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from imagen_jax.evals import image_metrics, report
from imagen_jax.evals.distances.jackknife import Replicates, paired_jackknife
from imagen_jax.evals.statistics import Z95, difference, number, paired_hits_error

TIED = 2.0  # standard errors of a paired difference
BEST_MARK, TIED_MARK = "*", "~"
RETRIEVAL = "retrieval"
Result = Mapping[str, Any]
# Exceptions that a damaged result raises when its numbers are compared.
DAMAGE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)


@dataclasses.dataclass(frozen=True)
class PointResult:
    """The metrics of one point.

    scores: as of `suite_evaluation.score`.
    per_prompt: {network: CLIP score of each prompt}.
    ranks: [pictures of each prompt]: the rank of the captioned image; None without retrieval.
    """

    scores: Result
    per_prompt: Mapping[str, Float[np.ndarray, " p"]]
    ranks: Float[np.ndarray, "p k"] | None = None


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One number of every point.

    group: the network, or "retrieval". metric: its key in the results. label: of the number.
    heading: the label of printed numbers. scale: the factor of printed numbers.
    less_is_better: whether smaller numbers are better.
    estimates: {"mean", "se"} of each point, also "low" and "high" for a rate, in printed units;
        None where it could not be computed.
    compare: (point, other) -> {"value", "se"} of their paired difference, in the units of files.
    """

    group: str
    metric: str
    label: str
    heading: str
    scale: float
    less_is_better: bool
    estimates: Sequence[Result | None]
    compare: Callable[[int, int], Result]

    @property
    def complete(self) -> bool:
        """Whether every point has a number."""
        return all(found is not None for found in self.estimates)


def quantities(points: Sequence[PointResult]) -> list[Quantity]:
    """All numbers of the points, by network."""
    found = []
    names = {name: None for point in points for name in point.scores["metrics"]}
    for network in names:
        results = [point.scores["metrics"].get(network, {}) for point in points]
        for name, metric in image_metrics.METRICS.items():
            if any(name in result for result in results):
                for label, key in metric.values.items():
                    found.append(_of_metric(points, network, name, label, key))
    if any(point.ranks is not None for point in points):
        found += [_of_retrieval(points, k) for k in (1, 5)]
    return found


def _of_metric(
    points: Sequence[PointResult], network: str, name: str, label: str, key: str
) -> Quantity:
    metric = image_metrics.METRICS[name]
    results = [point.scores["metrics"].get(network, {}).get(name) for point in points]

    def estimate(result: Result | None) -> Result | None:
        value = None if result is None else image_metrics.value_of(metric, result, key)
        return None if value is None or value["mean"] is None else value

    def by_blocks(i: int, j: int) -> Result:
        first, second = (results[n][key] if key else results[n] for n in (i, j))
        paired = paired_jackknife(Replicates.from_result(first), Replicates.from_result(second))
        return {part: paired[part] for part in ("value", "se")}

    def by_prompt(i: int, j: int) -> Result:
        paired = difference(points[i].per_prompt[network] - points[j].per_prompt[network])
        return {"value": paired["mean"], "se": paired["se"]}

    heading = image_metrics.heading(network, name, label)
    label = heading if metric.scale == 1 else label
    estimates = [estimate(result) for result in results]
    compare = by_prompt if metric.against == "captions" else by_blocks
    less, scale = metric.less_is_better, metric.scale
    return Quantity(network, name, label, heading, scale, less, estimates, compare)


def _of_retrieval(points: Sequence[PointResult], k: int) -> Quantity:
    def estimate(point: PointResult) -> Result:
        rate = point.scores[RETRIEVAL][f"top{k}"]
        low, mean, high = (100 * rate[name] for name in ("low", "rate", "high"))
        return {"mean": mean, "se": (high - low) / (2 * Z95), "low": low, "high": high}

    def compare(i: int, j: int) -> Result:
        hits = [(points[n].ranks <= k).mean(axis=1) for n in (i, j)]
        differences = hits[0] - hits[1]
        return {
            "value": number(differences.mean()),
            "se": number(paired_hits_error(differences)),
        }

    estimates = [estimate(point) for point in points]
    label, heading = f"top-{k}", f"top-{k} %"
    return Quantity(RETRIEVAL, f"top{k}", label, heading, 100.0, False, estimates, compare)


def check_complete(
    point: PointResult, prompts: int | None, pairs: Callable[[Quantity], bool] = lambda _: True
) -> None:
    """Raises one of DAMAGE if a point that was read from a file cannot be compared.

    prompts: their number, None if it is unknown. pairs: whether a number has a paired difference.
    """
    for network, metrics in point.scores["metrics"].items():
        if not isinstance(metrics, dict) or not all(isinstance(v, dict) for v in metrics.values()):
            raise ValueError(f"a metric of {network} is not an object")
    for name, values in {**point.per_prompt, RETRIEVAL: point.ranks}.items():
        if values is None:
            continue
        if values.ndim != (2 if name == RETRIEVAL else 1) or prompts not in (None, len(values)):
            raise ValueError(f"{name} has not one row per prompt")
    for quantity in quantities([point]):
        if quantity.complete and pairs(quantity):
            quantity.compare(0, 0)


def best(quantity: Quantity) -> dict[str, Any] | None:
    """The best point of a quantity and the points tied with it, as JSON; None without any number.

    Tied: the paired difference from the best point is at most TIED standard errors. "differences"
    are point minus best point, in the units of the other numbers of the file.
    """
    known = [i for i, found in enumerate(quantity.estimates) if found is not None]
    if not known:
        return None
    sign = 1 if quantity.less_is_better else -1
    first = min(known, key=lambda i: sign * quantity.estimates[i]["mean"])
    differences = {i: quantity.compare(i, first) for i in known if i != first}
    return {
        "of": quantity.group,
        "metric": quantity.metric,
        "label": quantity.label,
        "less_is_better": quantity.less_is_better,
        "best": first,
        "tied": [i for i, found in differences.items() if is_tied(found)],
        "differences": [{"point": i, **found} for i, found in differences.items()],
    }


def is_tied(found: Result) -> bool:
    """Whether a paired difference is within TIED standard errors of 0."""
    if found["value"] is None:
        return False
    return abs(found["value"]) <= TIED * (found["se"] or 0.0)


def table(labels: Sequence[str], quantities: Sequence[Quantity], found: Sequence[Result]) -> str:
    """A block of text per network: a line per point, a column per number, with the best marked.

    labels: of the points. found: `best` of each quantity that has numbers.
    """
    blocks = []
    for group in {quantity.group: None for quantity in quantities}:
        columns = [list(_column(q, found)) for q in quantities if q.group == group]
        rows = [[group, *(column[0] for column in columns)]]
        rows += [[label, *(column[i + 1] for column in columns)] for i, label in enumerate(labels)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
            for row in rows
        )
        blocks.append("\n".join(lines))
    legend = (
        f"{BEST_MARK} best, {TIED_MARK} tied with it: within {TIED:g} standard errors of the"
        " paired difference"
    )
    return "\n\n".join([*blocks, legend])


def _column(quantity: Quantity, found: Sequence[Result]) -> Iterator[str]:
    """The heading of a column and the text of each point."""
    key = quantity.group, quantity.label
    mine = next((f for f in found if (f["of"], f["label"]) == key), {"best": -1, "tied": []})
    yield quantity.heading
    for i, estimate in enumerate(quantity.estimates):
        mark = BEST_MARK if i == mine["best"] else TIED_MARK if i in mine["tied"] else ""
        yield f"{report.mean(estimate)} {mark}".rstrip() if estimate else "-"
