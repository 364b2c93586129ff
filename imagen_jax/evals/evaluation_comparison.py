"""Compares two evaluations of cascades on the same prompts, paired by prompt.

    python -m imagen_jax.evaluate --compare DIR_A --compare DIR_B

Differences are B minus A. They are paired as those of a grid: what A and B share cancels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.evals import grid_comparison, report
from imagen_jax.evals.grid_comparison import PointResult, Quantity
from imagen_jax.evals.reference import SAME_NETWORK
from imagen_jax.evals.statistics import number
from imagen_jax.evals.suite_evaluation import RESULT
from imagen_jax.object_storage import AnyPath, check_bucket
from imagen_jax.storage import read_object

FILE = "comparison.json"
FIELDS = {"metrics": dict, "left_out": dict, "provenance": dict}
REMEDY = "remove it and run evaluate --cascade again, or give another directory"
NO_PAIRS = "cannot be paired: a result has no numbers by prompt; run evaluate again there"


def compare(first: AnyPath, second: AnyPath) -> dict[str, Any]:
    """The comparison of two output directories of `evaluate --cascade`, or their files, as JSON.

    {"a", "b", "differences", "not_paired": {number: reason}}. Raises ValueError in one line if the
    prompts, the pictures per prompt, the real images or the networks differ, or a file is damaged.
    """
    (a, first_point), (b, second_point) = map(read, (first, second))
    check_same(a, b)
    points = [first_point, second_point]
    differences, not_paired = [], {}
    for quantity in grid_comparison.quantities(points):
        if reason := why_not_paired(points, quantity):
            not_paired[f"{quantity.group}: {quantity.label}"] = reason
        else:
            try:
                differences.append(_difference(quantity))
            except grid_comparison.DAMAGE as error:
                raise ValueError(
                    f"{quantity.group}: {quantity.label} of {first} and {second} cannot be compared"
                    f" ({error}); evaluate both again with the same settings"
                ) from error
    if "retrieval" in a and "retrieval" in b and all(point.ranks is None for point in points):
        not_paired["retrieval"] = NO_PAIRS
    return {"a": str(first), "b": str(second), "differences": differences, "not_paired": not_paired}


def read(path: AnyPath) -> tuple[dict[str, Any], PointResult]:
    """A result and its numbers. Raises ValueError in one line if the file is damaged.

    path: an output directory, or its evaluation.json.
    """
    check_bucket("--compare", path)
    file = path if path.is_file() else path / RESULT
    found = read_object(file, FIELDS, REMEDY)
    try:
        facts(found)
        point = PointResult(found, *paired_numbers(found))
        pairs = lambda quantity: not why_not_paired([point], quantity)
        prompts = found["provenance"]["suite"].get("count")
        grid_comparison.check_complete(point, prompts, pairs)
    except grid_comparison.DAMAGE as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{file} is damaged, or not of evaluate --cascade ({reason}); {REMEDY}"
        ) from error
    return found, point


def paired_numbers(result: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """(CLIP scores by prompt of each network, ranks [prompts, pictures]) of a result's file."""
    found = result.get("by_prompt", {})
    scores = {name: np.array(values, float) for name, values in found.get("scores", {}).items()}
    ranks = found.get("ranks")
    return scores, None if ranks is None else np.array(ranks, float)


def check_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raises ValueError unless two results can be paired; skips fields that one of them lacks."""
    a, b = facts(a), facts(b)
    for what in a:
        if what in b and a[what] != b[what]:
            raise ValueError(
                f"the two evaluations have different {what}: {a[what]} and {b[what]}; evaluate"
                " both with the same --suite, --per_prompt, real images and --network"
            )


def facts(result: Mapping[str, Any]) -> dict[str, Any]:
    """{name: value} of everything in a result that two results must share to be paired."""
    told = result["provenance"]
    found = {
        "prompts (SHA-256)": told["suite"].get("prompts_sha256"),
        "numbers of pictures per prompt": told["pictures"]["per_prompt"],
    }
    networks = dict(told["networks"])
    for name, reference in told["references"].items():
        images = {key: value for key, value in reference["images"].items() if key != "path"}
        found[f"real images ({name})"] = images
        networks[name] = reference["network"] | networks.get(name, {})
    for name, network in networks.items():
        for part, identity in ((name, network), (f"{name} text", network.get("captions", {}))):
            for key in SAME_NETWORK:
                if key in identity:
                    found[f"networks ({part}, {key})"] = identity[key]
    return found


def why_not_paired(points: Sequence[PointResult], quantity: Quantity) -> str:
    """The reason why a number has no paired difference; "" if it has one."""
    if not quantity.complete:
        return "only one of the results has it"
    results = [point.scores["metrics"].get(quantity.group, {}) for point in points]
    found = [result.get(quantity.metric, {}) for result in results]
    by_blocks = all(map(_has_blocks, found))
    by_prompt = all(quantity.group in point.per_prompt for point in points)
    if quantity.group == grid_comparison.RETRIEVAL:
        return "" if all(point.ranks is not None for point in points) else NO_PAIRS
    return "" if by_blocks or by_prompt else NO_PAIRS


def _has_blocks(result: Mapping[str, Any]) -> bool:
    """Whether a metric, or each of its parts, has the values of the jackknife."""
    parts = [part for part in result.values() if isinstance(part, dict) and "value" in part]
    return "deleted" in result or any("deleted" in part for part in parts)


def _difference(quantity: Quantity) -> dict[str, Any]:
    found = quantity.compare(1, 0)
    ratio = number(found["value"] / found["se"]) if found["se"] else None
    unscaled = [number(estimate["mean"] / quantity.scale) for estimate in quantity.estimates]
    names = {"of": quantity.group, "metric": quantity.metric, "label": quantity.label}
    values = {"a": unscaled[0], "b": unscaled[1], "difference": found["value"], "se": found["se"]}
    printed = {"heading": quantity.heading, "scale": quantity.scale}
    return names | values | {"ratio": ratio} | printed


def table(result: Mapping[str, Any]) -> str:
    """The printed comparison, in printed units."""
    rows = []
    for found in result["differences"]:
        scale = found["scale"]
        a, b = (f"{scale * found[side]:.4g}" for side in ("a", "b"))
        times = lambda value, scale=scale: None if value is None else scale * value
        paired = {"mean": times(found["difference"]), "se": times(found["se"])}
        text = report.difference(paired | {"ratio": found["ratio"]})
        rows.append((f"{found['of']}: {found['heading']}", f"A {a}, B {b}, B - A {text}"))
    rows += list(result["not_paired"].items())
    return report.table([("A", result["a"]), ("B", result["b"]), *rows])
