"""The metrics of generated images: which networks each one uses, its result and its lines.

`METRICS` is the only list of them. A metric compares the features of the pictures with those of
real images, or with those of the captions.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from imagen_jax.evals import report
from imagen_jax.evals.distances import clip_score, cmmd, frechet, guards, kid, mind, neighbours
from imagen_jax.evals.distances.jackknife import BLOCKS

Result = Mapping[str, Any]
CLIP = ("clip-b32", "clip-l14", "clip-l14-336")
PICTURES = ("inception", "inception-clean", "dinov2-b14", "dinov2-l14", "efficientnet-lite0")
FRECHET_NAMES = {"inception": "FID", "inception-clean": "FID (clean)"}


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric.

    networks: the feature networks that it is computed with.
    against: "reference" or "captions".
    score: (features of the pictures, features of the other side, prompt of each picture) -> result.
    values: {label: key of a `jackknife.estimate` in the result, "" for the result itself}.
    scale: factor of the printed numbers; files have numbers without it.
    less_is_better: whether smaller numbers are better.
    """

    networks: tuple[str, ...]
    against: str
    score: Callable[..., dict[str, Any]]
    values: Mapping[str, str]
    less_is_better: bool
    scale: float = 1.0


METRICS = {
    "fd": Metric(
        PICTURES, "reference", frechet.score, {"Fréchet distance": ""}, less_is_better=True
    ),
    "kid": Metric(PICTURES, "reference", kid.score, {"KID": ""}, True, scale=1000.0),
    "mind": Metric(PICTURES, "reference", mind.score, {"MIND": ""}, less_is_better=True),
    "neighbours": Metric(
        PICTURES,
        "reference",
        neighbours.score,
        {name: name for name in ("precision", "recall", "density", "coverage")},
        less_is_better=False,
    ),
    "cmmd": Metric(
        CLIP,
        "reference",
        cmmd.score,
        {"CMMD": "biased", "CMMD (unbiased)": "unbiased", "mean distance": "mean_distance"},
        less_is_better=True,
    ),
    "clip_score": Metric(
        CLIP, "captions", clip_score.score, {"CLIP score": ""}, less_is_better=False
    ),
}


def check_known(names: Sequence[str]) -> None:
    """Raises ValueError for an unknown metric."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"--metrics {name} is unknown; use {', '.join(METRICS)}")


def applicable(network: str, names: Sequence[str], has_reference: bool) -> dict[str, Metric]:
    """The metrics to compute with a network; `names` is a choice, empty for all."""
    return {
        name: metric
        for name, metric in METRICS.items()
        if network in metric.networks
        and (not names or name in names)
        and (has_reference or metric.against == "captions")
    }


def against_reference(network: str, names: Sequence[str]) -> dict[str, Metric]:
    """The metrics to compute with a network that need real images."""
    found = applicable(network, names, True)
    return {name: metric for name, metric in found.items() if metric.against == "reference"}


def too_few(metrics: Mapping[str, Metric], dimensions: int, counts: Mapping[str, int]) -> list[str]:
    """The reasons why metrics with a smallest number of images cannot be computed.

    dimensions: features of the network. counts: {name: number of images} of each side.
    """
    reasons = []
    for name, count in counts.items() if "fd" in metrics else ():
        try:
            guards.check_count(name, count, dimensions)
        except ValueError as error:
            reasons.append(str(error))
    return reasons


def score_all(
    metrics: Mapping[str, Metric],
    features: Float[np.ndarray, "n d"],
    others: Mapping[str, Float[np.ndarray, "_ _"]],
    prompts: Int[np.ndarray, " n"],
) -> tuple[dict[str, Result], dict[str, str]]:
    """({metric: result}, {metric: reason why it has none}).

    others: {"reference": features [m d], "captions": features [n d]}. A metric that cannot be
    computed, as there are too few pictures or the two sides are equal, is left out with its reason;
    the others are computed.
    """
    results: dict[str, Result] = {}
    left_out: dict[str, str] = {}
    blocks = min(BLOCKS, len(np.unique(prompts)))
    for name, metric in metrics.items():
        more = {"blocks": blocks} if metric.against == "reference" else {}
        try:
            results[name] = metric.score(features, others[metric.against], prompts, **more)
        except ValueError as error:
            left_out[name] = str(error)
    return results, left_out


def value_of(metric: Metric, result: Result, key: str) -> Result:
    """An estimate of a result in printed units: {"mean", "se"}."""
    found = result[key] if key else result
    # The CLIP score is a mean over prompts, the others are jackknife estimates.
    value = found["mean"] if "mean" in found else found["value"]
    times = lambda x: None if x is None else metric.scale * x
    return {"mean": times(value), "se": times(found["se"])}


def heading(network: str, name: str, label: str) -> str:
    """The printed name of a number of a metric, with the scale of printed numbers."""
    if name == "fd":
        return FRECHET_NAMES.get(network, label)
    scale = METRICS[name].scale
    return label if scale == 1 else f"{label} x {scale:g}"


def lines(network: str, results: Mapping[str, Result]) -> Iterator[tuple[str, str]]:
    """(label, text) of each printed number of a network."""
    for name, result in results.items():
        metric = METRICS[name]
        for label, key in metric.values.items():
            text = report.mean(value_of(metric, result, key))
            if name == "fd":
                limit = result["infinity"]
                error = {"mean": limit["value"], "se": limit.get("se")}  # none in older results
                text += f", extrapolated to infinitely many {report.mean(error)}"
            yield f"{network}: {heading(network, name, label)}", text
        for warning in result.get("warnings", ()):
            yield f"{network}: {name}", f"warning: {warning}"
