"""Numbers by noise level: t in equal bins, one value an image and bin, all images in all bins."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from imagen_jax.evals.statistics import summary


def by_bin(
    values: Float[np.ndarray, "n k"],
    logsnr: Float[np.ndarray, " k2"],
    describe: Callable[[np.ndarray], dict[str, Any]] = summary,
) -> dict[str, Any]:
    """{"overall": ..., "bins": [{"t": [from, to], "logsnr": [from, to], "logsnr_centre", ...}, ...]} of values[image, bin].

    Bin i is t in [i/k, (i+1)/k]; `logsnr` is the log-SNR at the 2k + 1 times that begin, halve and end the bins.

    "overall" describes each image's mean over the bins, which for losses estimates the training loss (t uniform); as the bins of an
    image are not independent, its error comes from the images alone.
    """
    k = values.shape[1]
    if len(logsnr) != 2 * k + 1:
        raise ValueError(f"{k} bins have {2 * k + 1} edges and centres, not {len(logsnr)}")
    bins = []
    for i in range(k):
        start, centre, end = (float(x) for x in logsnr[2 * i : 2 * i + 3])
        bins.append({"t": [i / k, (i + 1) / k], "logsnr": [start, end], "logsnr_centre": centre} | describe(values[:, i]))
    return {"overall": describe(values.mean(axis=1)), "bins": bins}
