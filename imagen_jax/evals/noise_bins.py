"""Numbers by noise level: t in equal bins, one value an image and bin, all images in all bins."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from imagen_jax.evals.statistics import summary


def by_bin(
    values: Float[np.ndarray, "n k"],
    logsnr_edges: Float[np.ndarray, " k1"],
    describe: Callable[[np.ndarray], dict[str, Any]] = summary,
) -> dict[str, Any]:
    """{"overall": ..., "bins": [{"t": [from, to], "logsnr": [from, to], ...}, ...]} of values[image, bin], bin i being t in [i/k, (i+1)/k].

    "overall" describes each image's mean over the bins, which estimates the training loss (t uniform); as the bins of an image are
    not independent, its error comes from the images alone. `logsnr_edges` are the log-SNR at t = 0, 1/k ... 1.
    """
    k = values.shape[1]
    if len(logsnr_edges) != k + 1:
        raise ValueError(f"{k} bins have {k + 1} edges, not {len(logsnr_edges)}")
    bins = [
        {"t": [i / k, (i + 1) / k], "logsnr": [float(logsnr_edges[i]), float(logsnr_edges[i + 1])]} | describe(values[:, i])
        for i in range(k)
    ]
    return {"overall": describe(values.mean(axis=1)), "bins": bins}
