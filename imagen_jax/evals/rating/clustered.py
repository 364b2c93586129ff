"""Means of votes with intervals for new prompts and new raters.

Votes on one prompt agree, and so do the votes of one rater. The variance here is that of resampling
prompts, plus that of resampling raters, minus that of resampling votes, which the first two both
contain (Cameron, Gelbach and Miller 2011, "Robust inference with multiway clustering"). Each of the
three is the limit of infinitely many draws of a bootstrap that is linear in the counts (the
infinitesimal jackknife, Efron 1982), so no random numbers are needed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from imagen_jax.evals import statistics

STEP = 1e-4  # of numerical derivatives, as a share of all votes


@dataclasses.dataclass(frozen=True)
class Variance:
    """A variance, with the degrees of freedom of its estimate (Satterthwaite)."""

    value: float
    dof: float

    @property
    def quantile(self) -> float:
        """The two-sided 95 % quantile of Student's t."""
        return float(scipy.stats.t.ppf(0.975, self.dof))

    @property
    def error(self) -> float:
        """The standard error."""
        return self.value**0.5


def variance(
    influence: Float[np.ndarray, " n"],
    prompts: Int[np.ndarray, " n"],
    raters: Int[np.ndarray, " n"],
) -> Variance:
    """The variance of an estimate that is the sum of influences, one per vote.

    At least the variance of independent votes. The term of a single cluster is 0: one cluster does
    not show how clusters differ.
    """
    cells = prompts * (int(raters.max()) + 1) + raters
    terms, dofs = [], []
    for labels in (prompts, raters, cells):
        _, codes = np.unique(labels, return_inverse=True)
        sums = np.bincount(codes, influence)
        count = len(sums)
        terms.append(count / (count - 1) * float(sums @ sums) if count > 1 else 0.0)
        dofs.append(max(count - 1, 1))
    by_prompt, by_rater, by_vote = terms
    value = max(by_prompt + by_rater - by_vote, by_vote)
    spread = by_prompt**2 / dofs[0] + by_rater**2 / dofs[1]
    dof = (by_prompt + by_rater) ** 2 / spread if spread else float(dofs[2])
    return Variance(value, max(dof, 1.0))


def mean(
    values: Float[np.ndarray, " n"],
    prompts: Int[np.ndarray, " n"],
    raters: Int[np.ndarray, " n"],
    bounds: tuple[float, float],
) -> dict[str, Any]:
    """{"mean", "se", "low", "high", "n"} of values between bounds, such as scores from 0 to 100.

    If all values are equal, the interval is Wilson's for values at the bounds, see `rate`.
    """
    average, (least, most) = float(values.mean()), bounds
    found = variance((values - average) / len(values), prompts, raters)
    if found.value:
        half = found.quantile * found.error
        low, high = max(least, average - half), min(most, average + half)
    else:
        share = (average - least) / (most - least)
        ends = _wilson_of_clusters(share, prompts, raters)
        low, high = (least + end * (most - least) for end in ends)
    return {"mean": average, "se": found.error, "low": low, "high": high, "n": len(values)}


def _wilson_of_clusters(
    share: float, prompts: Int[np.ndarray, " n"], raters: Int[np.ndarray, " n"]
) -> tuple[float, float]:
    """Wilson's interval if all votes agree: of as many votes as prompts, or raters if fewer."""
    independent = min(len(np.unique(prompts)), len(np.unique(raters)))
    return statistics.wilson(share * independent, independent)


def rate(
    hits: Float[np.ndarray, " n"], prompts: Int[np.ndarray, " n"], raters: Int[np.ndarray, " n"]
) -> dict[str, Any]:
    """{"rate", "low", "high", "se", "n", "design_effect"} of votes that are 0 or 1.

    The interval is Wilson's for the number of independent votes with the same variance, with
    Student's quantile. If all votes agree, that number is the smaller of the numbers of prompts and
    of raters. design_effect: the variance divided by that of independent votes.
    """
    n, share = len(hits), float(hits.mean())
    found = variance((hits - share) / n, prompts, raters)
    plain = share * (1 - share) / n
    if found.value and plain:
        independent = n * plain / found.value
        low, high = statistics.wilson(share * independent, independent, found.quantile)
    else:
        low, high = _wilson_of_clusters(share, prompts, raters)
    return {
        "rate": share,
        "low": low,
        "high": high,
        "se": found.error,
        "n": n,
        "design_effect": found.value / plain if plain else None,
    }


def influences(
    statistic: Callable[[Float[np.ndarray, " k"]], Float[np.ndarray, " m"]],
    kinds: Int[np.ndarray, " n"],
    k: int,
) -> Float[np.ndarray, "n m"]:
    """The influence of each vote on a statistic of the counts of k kinds of votes.

    statistic: a function that does not change if all counts are multiplied by the same number.
    """
    counts = np.bincount(kinds, minlength=k).astype(np.float64)
    step = STEP * counts.sum()
    used = np.unique(kinds)
    gradient = np.zeros((k, len(statistic(counts))))
    for kind in used:
        change = np.zeros(k)
        change[kind] = min(step, 0.5 * counts[kind])
        rise = statistic(counts + change) - statistic(counts - change)
        gradient[kind] = rise / (2 * change[kind])
    return gradient[kinds] - (counts @ gradient) / counts.sum()
