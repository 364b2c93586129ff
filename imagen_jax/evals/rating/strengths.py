"""Strengths of several systems from paired comparisons with ties.

Davidson 1970, "On extending the Bradley-Terry model to accommodate ties in paired comparison
experiments": with strengths p_i and a tie parameter v, the probabilities that i wins, of a tie, and
that j wins are proportional to p_i, v sqrt(p_i p_j), p_j.
"""

import numpy as np
import scipy.optimize
import scipy.sparse.csgraph
from jaxtyping import Float, Int

WIN, TIE, LOSS = 0, 1, 2  # of the first system of a pair
NO_TIES = -30.0  # log v if there are no ties


def fit(counts: Float[np.ndarray, "p 3"], pairs: Int[np.ndarray, "p 2"], systems: int):
    """Maximum likelihood. Returns (log strengths with mean 0 [systems], log v).

    counts: wins of the first, ties, wins of the second system of each pair.

    Raises ValueError if there is no maximum, see `no_maximum`.
    """
    if reason := no_maximum(counts, pairs, systems):
        raise ValueError(reason)
    ties = counts[:, TIE].sum() > 0
    total = counts.sum()

    def loss(x):
        log_p, log_v = x[:systems], x[systems] if ties else NO_TIES
        first, second = log_p[pairs[:, 0]], log_p[pairs[:, 1]]
        logits = np.stack([first, log_v + (first + second) / 2, second], axis=1)
        top = logits.max(axis=1, keepdims=True)
        norm = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        residual = np.exp(logits - norm) * counts.sum(axis=1, keepdims=True) - counts
        slope = np.zeros(systems + 1)
        np.add.at(slope, pairs[:, 0], residual[:, WIN] + residual[:, TIE] / 2)
        np.add.at(slope, pairs[:, 1], residual[:, LOSS] + residual[:, TIE] / 2)
        slope[systems] = residual[:, TIE].sum() if ties else 0.0
        # The mean of the strengths is free; this term holds it at 0 and changes nothing else.
        slope[:systems] += total * log_p.mean() / systems
        value = -(counts * (logits - norm)).sum() + total * log_p.mean() ** 2 / 2
        return value / total, slope / total

    found = scipy.optimize.minimize(
        loss, np.zeros(systems + 1), jac=True, method="BFGS", options={"gtol": 1e-9}
    )
    log_p = found.x[:systems] - found.x[:systems].mean()
    return log_p, float(found.x[systems]) if ties else NO_TIES


def no_maximum(
    counts: Float[np.ndarray, "p 3"], pairs: Int[np.ndarray, "p 2"], systems: int
) -> str:
    """The reason why the strengths are not defined; "" if they are.

    They are if no group of systems won every comparison with the others (Ford 1957). Ties count as
    half a win for both.
    """
    wins = np.zeros((systems, systems))
    for (first, second), (win, tie, loss) in zip(pairs, counts):
        wins[first, second] += win + tie
        wins[second, first] += loss + tie
    groups, _ = scipy.sparse.csgraph.connected_components(wins, connection="strong")
    if groups == 1:
        return ""
    return (
        "some systems won every comparison with the others, or were never compared with them, so"
        " their strength has no limit: read the rates"
    )


def probability(first: float, second: float, log_v: float) -> tuple[float, ...]:
    """The probabilities (first wins, tie, second wins) of two systems with these log strengths."""
    logits = np.array([first, log_v + (first + second) / 2, second])
    weights = np.exp(logits - logits.max())
    return tuple(float(weight) for weight in weights / weights.sum())
