"""Inner products and distances of many features, in float64 tiles of bounded memory."""

import numpy as np
from jaxtyping import Float

ELEMENTS = 2**23  # numbers of a tile: 64 MB


def spans(n: int, columns: int, elements: int | None = None) -> list[slice]:
    """Divides n rows into tiles [rows, columns] of about `elements` numbers."""
    size = max(1, (elements or ELEMENTS) // columns)
    return [slice(i, min(n, i + size)) for i in range(0, n, size)]


def products(x: Float[np.ndarray, "a d"], y: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "a b"]:
    """Inner products of all pairs. The rows of y are converted in chunks."""
    x = x.astype(np.float64, copy=False)
    out = np.empty((len(x), len(y)))
    for span in spans(len(y), y.shape[1]):
        np.matmul(x, y[span].astype(np.float64, copy=False).T, out=out[:, span])
    return out


def squares(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """The squared length of each row."""
    out = np.empty(len(x))
    for span in spans(len(x), x.shape[1]):
        rows = x[span].astype(np.float64, copy=False)
        out[span] = np.einsum("nd,nd->n", rows, rows)
    return out


def squared_distances(
    x: Float[np.ndarray, "a d"],
    y: Float[np.ndarray, "b d"],
    y_squares: Float[np.ndarray, " b"],
) -> Float[np.ndarray, "a b"]:
    """Squared Euclidean distances of all pairs, at least 0. y_squares: `squares` of y."""
    out = products(x, y)
    out *= -2
    out += squares(x)[:, None]
    out += y_squares
    return np.maximum(out, 0, out=out)
