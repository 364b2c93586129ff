"""KID, the kernel Inception distance, of the samples from real images of the same split.

Features are those of EfficientNet-Lite0, whose weights an installed package has. So numbers compare
checkpoints and arms, not with published ones. Samples are those of the right captions.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from imagen_jax.distributed import host_work
from imagen_jax.evals import report, statistics
from imagen_jax.evals.distances import kid
from imagen_jax.evals.evaluation import Evaluation
from imagen_jax.evals.measures.measure import Column, Line, Result, RowValues
from imagen_jax.evals.networks import network
from imagen_jax.evals.rows import CHUNK, Data, Settings
from imagen_jax.stage import Stage

ORDER = 45
COLUMNS = (Column("KID", "SPLIT.mean", less_is_better=True),)
NETWORK = "efficientnet-lite0"
FEWEST = 3  # samples, for a standard error
REFERENCE = 500  # real images of a split, or as many as samples if those are more


def excluded(stage: Stage, settings: Settings) -> str:
    return ""


def too_few(stage: Stage, data: Data) -> dict[str, str]:
    if reason := network.no_package(NETWORK):
        return {"": reason}
    counts = {split: len(data.wholes(split)) for split in data.counts}
    reasons = {
        f", {split}": f"it needs {FEWEST} {split} samples, and there are {n}"
        for split, n in counts.items()
        if n < FEWEST
    }
    return {"": "; ".join(reasons.values())} if len(reasons) == len(counts) else reasons


def measure(e: Evaluation) -> dict[str, Any]:
    """{"network": its identity, split: the mean of `pseudo_values`, which is KID, "n_reference"}.

    KID is not multiplied by 1000. Its standard error is that of new captions and samples, measured
    with the same real images.
    """
    return {"network": dict(_network().identity)} | {
        split: statistics.summary(_values(e, split))
        | {"n_reference": len(_reference_rows(e, split))}
        for split in _splits(e)
    }


def row_values(e: Evaluation) -> RowValues:
    return {f"{split}.mean": _values(e, split) for split in _splits(e)}


def lines(result: Result) -> Iterator[Line]:
    for split, score in result.items():
        if split != "network":
            text = f"{report.mean(score)}, {score['n']} samples"
            yield f"KID, {split}", f"{text} and {score['n_reference']} real images"


@functools.cache
def _network() -> network.FeatureNetwork:
    """The feature network on the devices of this process, loaded once for all checkpoints."""
    return network.load(NETWORK, "")


def _splits(e: Evaluation) -> list[str]:
    return [split for split in e.data.counts if len(e.data.wholes(split)) >= FEWEST]


def _values(e: Evaluation, split: str) -> Float[np.ndarray, " n"]:
    """The pseudo-value of each sample."""

    def compute():
        drawn = e.samples(split)
        samples = _features(len(drawn), lambda positions: drawn[positions])
        return kid.pseudo_values(samples, _reference(e, split))

    return e.once(("kid", split), compute)


def _reference_rows(e: Evaluation, split: str) -> Int[np.ndarray, " m"]:
    return e.data.choose(split, max(REFERENCE, len(e.data.wholes(split))))


def _reference(e: Evaluation, split: str) -> Float32[np.ndarray, "m d"]:
    """The features of the real images, computed once for all checkpoints."""
    rows = _reference_rows(e, split)
    read = lambda positions: e.data.images(split, rows[positions])
    return e.data.once(("kid", split), lambda: _features(len(rows), read))


def _features(
    n: int, read: Callable[[Int[np.ndarray, " k"]], UInt8[np.ndarray, "k s s 3"]]
) -> Float32[np.ndarray, "n d"]:
    """The features of n images, shared by the processes. read: positions -> images."""

    def compute(positions):
        chunks = range(0, len(positions), CHUNK)
        return np.concatenate(
            [_network().features(read(positions[start : start + CHUNK])) for start in chunks]
        )

    return host_work.for_rows(n, compute)
