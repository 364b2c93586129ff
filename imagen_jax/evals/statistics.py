"""Means with their uncertainty, and the permutation of the "shuffled" controls.

An undefined number (the standard error of one value, the mean of a NaN) is None, so that every
result is valid JSON.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

Z95 = 1.959964  # two-sided 95 % of the normal distribution


def summary(values: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """{"mean", "se", "n"} of independent values, one per image.

    "se" is the sample's standard deviation (n - 1) over sqrt(n). Raises ValueError for no values.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    if n == 0:
        raise ValueError("there are no values to average")
    se = values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return {"mean": number(values.mean()), "se": number(se), "n": n}


def difference(values: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """`summary` of paired differences, with "ratio": the mean in standard errors.

    A ratio above 3 is significant.
    """
    out = summary(values)
    out["ratio"] = (
        number(out["mean"] / out["se"]) if out["se"] and out["mean"] is not None else None
    )
    return out


def proportion(hits: int, n: int) -> dict[str, Any]:
    """{"rate", "low", "high", "hits", "n"} with Wilson's 95 % interval."""
    low, high = wilson(hits, n)
    return {"rate": hits / n, "low": low, "high": high, "hits": hits, "n": n}


def grouped_proportion(hits: Bool[np.ndarray, "p k"]) -> dict[str, Any]:
    """`proportion` of k rows of each of p groups, such as the pictures of a prompt.

    Rows of a group are alike, so the error is that of the mean rate per group. Wilson's interval is
    that of the number of independent rows with this error, which is between p and p k. For k = 1 it
    is `proportion`.
    """
    groups, n, rate = len(hits), hits.size, float(hits.mean())
    if groups == n:
        return proportion(int(hits.sum()), n)
    error = summary(hits.mean(axis=1))["se"]
    independent = rate * (1 - rate) / error**2 if error else n if 0 < rate < 1 else groups
    independent = min(max(independent, groups), n)
    low, high = wilson(rate * independent, independent)
    return {"rate": rate, "low": low, "high": high, "hits": int(hits.sum()), "n": n}


def wilson(hits: int | float, n: int | float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); z: quantile, by default for 95 %.

    It holds near 0 and 1 too, where the normal interval has no width.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} hits of {n} are not a proportion")
    p, shrink = hits / n, 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_hits_error(differences: Float[np.ndarray, " n"]) -> float:
    """The standard error of a difference of two proportions of hits on the same rows.

    With one row of +1 and one of -1 added: Bonett and Price 2012, "Adjusted Wald confidence
    interval for a difference of binomial proportions based on paired data". So it is not 0 where
    no row differs, as in 0 of 8 hits twice.

    differences: hit minus hit of each row, 1, 0 or -1; or their means over several seeds.
    """
    adjusted = np.append(differences, (1.0, -1.0))
    return float(adjusted.std() / math.sqrt(len(adjusted)))


def derangement(labels: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " n"]:
    """A random permutation that maps every row to a row with another label.

    Rows sorted by label, with labels and the rows of a label in random order, are rotated by the
    size of the largest group. Raises ValueError if there is none (see `no_derangement`).
    """
    if reason := no_derangement(labels):
        raise ValueError(reason)
    n = len(labels)
    _, groups, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)
    rank = rng.permutation(len(sizes))
    order = np.lexsort((rng.random(n), rank[groups]))
    other = np.empty(n, np.int64)
    other[order] = np.roll(order, -sizes.max())
    return other


def no_derangement(labels: Int[np.ndarray, " n"]) -> str:
    """The reason why no permutation gives every row another label; "" if one does."""
    n, largest = len(labels), max(np.unique(labels, return_counts=True)[1], default=0)
    if n >= 2 and 2 * largest <= n:
        return ""
    return (
        f"{n} rows cannot be shuffled: every row needs another caption, and one caption has"
        f" {largest} rows"
    )


def number(value: Any) -> float | None:
    """A finite float; None for any other number."""
    value = float(value)
    return value if math.isfinite(value) else None
