"""Strengths of several systems from paired comparisons with ties.

Davidson 1970, "On extending the Bradley-Terry model to accommodate ties in paired comparison
experiments": with strengths p_i and a tie parameter v, the probabilities that i wins, of a tie, and
that j wins are proportional to p_i, v sqrt(p_i p_j), p_j.
"""

import numpy as np
import scipy.optimize
from jaxtyping import Float, Int

WIN, TIE, LOSS = 0, 1, 2  # of the first system of a pair
NO_TIES = -30.0  # log v if there are no ties
LEAST_RISE = 1e-6  # of a linear program whose solution is 0 or of the order of 1


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

    The likelihood has no maximum if it never falls along some direction of log strengths and log v:
    every outcome that was observed then becomes as likely as the others of its pair, or likelier.
    Such a direction is found by linear programming. It exists if a group of systems won every
    comparison with the others, and also if it won or tied all of them, or if all were ties.
    """
    slopes = _slopes(pairs, systems)
    possible = [WIN, LOSS] if not counts[:, TIE].sum() else [WIN, TIE, LOSS]
    gains = [
        of_pair[seen] - of_pair[other]
        for of_pair, row in zip(slopes, counts)
        for seen in possible
        for other in possible
        if row[seen] > 0 and seen != other
    ]
    compared = np.array(gains).reshape(-1, systems + 1)
    # Of full rank but for the mean of the strengths: a lower rank means systems never compared.
    if np.linalg.matrix_rank(compared) == systems - 1 + (TIE in possible):
        rise, zero = compared.sum(axis=0), np.zeros(len(compared))
        found = scipy.optimize.linprog(-rise, -compared, zero, bounds=(-1, 1))
        if -found.fun < LEAST_RISE:
            return ""
    return (
        "some systems won or tied every comparison with the others, or were never compared with"
        " them, or all were ties, so their strength has no limit: read the rates"
    )


def _slopes(pairs: Int[np.ndarray, "p 2"], systems: int) -> Float[np.ndarray, "p 3 m"]:
    """The derivatives of the logits of each pair by (log strengths, log v), which are constant."""
    slopes = np.zeros((len(pairs), 3, systems + 1))
    rows = np.arange(len(pairs))
    slopes[rows, WIN, pairs[:, 0]] = 1.0
    slopes[rows, LOSS, pairs[:, 1]] = 1.0
    slopes[rows, TIE, pairs[:, 0]] = slopes[rows, TIE, pairs[:, 1]] = 0.5
    slopes[:, TIE, systems] = 1.0
    return slopes


def probability(first: float, second: float, log_v: float) -> tuple[float, ...]:
    """The probabilities (first wins, tie, second wins) of two systems with these log strengths."""
    logits = np.array([first, log_v + (first + second) / 2, second])
    weights = np.exp(logits - logits.max())
    return tuple(float(weight) for weight in weights / weights.sum())
