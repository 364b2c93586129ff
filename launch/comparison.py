"""The paired comparison of an ablation's arms, from the evaluations of all arms and seeds."""

import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.evals.statistics import paired_hits_error
from imagen_jax.object_storage import AnyPath, bucket_errors
from imagen_jax.storage import exists, read_object
from launch.ablation import Arm

CHECKPOINT = "provenance.checkpoint.sha256"  # in evaluation.json


def read_evaluations(
    workdir: AnyPath, arms: Sequence[Arm], seeds: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """{arm: [{"measures": evaluation.json, "rows": {path: one value per row}} for each seed]}.

    "rows" is empty where evaluate wrote no rows.npz; hits are booleans.
    """
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        for seed in seeds:
            directory = workdir / arm.name / f"seed_{seed}" / "evaluation"
            rows = {}
            if exists(directory / "rows.npz"):
                with bucket_errors(directory):
                    content = (directory / "rows.npz").read_bytes()
                with np.load(io.BytesIO(content)) as file:
                    rows = {name: file[name] for name in file.files}
            remedy = f"remove {directory}, and run the same command again"
            measures = read_object(directory / "evaluation.json", {}, remedy)
            evaluations.setdefault(arm.name, []).append({"measures": measures, "rows": rows})
    return evaluations


def compare(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    evaluations: Mapping[str, Sequence[Mapping[str, Any]]],
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Compares each arm with the first one, the reference, column by column.

    evaluations: as `read_evaluations` returns them. names: as for `measure.columns`.

    Returns {"seeds", "reference", "overrides", "columns"}; a column is {"name", "place",
    "less_is_better", "arms": {arm: ...}}. Each arm has "values" (one per seed) and their "mean".
    The others also have "difference", the mean over seeds of value minus reference, with its
    standard errors: "se_seeds" (None for one seed) and "se_rows" (None without rows; of a
    proportion, `paired_hits_error`).

    A column lacks the arms that did not measure it. A column is left out if the reference did not
    measure it, or if arms differ in a field that must be the same for a comparison.
    """
    from imagen_jax.evals.measures.measure import columns

    check_same_weights(arms, evaluations)
    reference = evaluations[arms[0].name]
    fields = {field for arm in arms for field in arm.overrides}
    shown = []
    for column in columns(names):
        if any(field.startswith(column.needs_same) for field in fields):
            continue
        path = column.path.replace("SPLIT", split_of(reference[0]["measures"]))
        measured = [
            arm.name
            for arm in arms
            if all(at(one["measures"], path) is not None for one in evaluations[arm.name])
        ]
        if arms[0].name not in measured:
            continue
        compared = {name: against(evaluations[name], reference, path) for name in measured}
        about = {"name": column.name, "place": path, "less_is_better": column.less_is_better}
        shown.append(about | {"arms": compared})
    overrides = {arm.name: dict(arm.overrides) for arm in arms}
    about = {"seeds": list(seeds), "reference": arms[0].name, "overrides": overrides}
    return about | {"columns": shown}


def check_same_weights(
    arms: Sequence[Arm], evaluations: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Raises ValueError if arms that share a training were evaluated at different checkpoints.

    Their difference would be one of training and sampling together.
    """
    first: dict[str, tuple[str, Sequence[Any]]] = {}
    for arm in arms:
        used = [one["measures"] for one in evaluations[arm.name]]
        training = json.dumps(arm.training, sort_keys=True)
        other, expected = first.setdefault(training, (arm.name, used))
        for a, b in zip(expected, used):
            if at(a, CHECKPOINT) != at(b, CHECKPOINT):
                steps = f"step {a.get('step')} and step {b.get('step')}"
                raise ValueError(
                    f"arms {other} and {arm.name} evaluated different checkpoints of one training"
                    f" ({steps}): remove the evaluation directory of the older one and run the"
                    " same command again"
                )


def split_of(measures: Mapping[str, Any]) -> str:
    """The split to compare on: heldout if a measure has it, else train."""
    results = [result for result in measures.values() if isinstance(result, Mapping)]
    return "heldout" if any("heldout" in result for result in results) else "train"


def at(measures: Mapping[str, Any], path: str) -> Any:
    """The number at a dotted path; None if it does not exist."""
    for key in path.split("."):
        measures = measures.get(key) if isinstance(measures, Mapping) else None
    return measures


def against(
    evaluations: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], path: str
) -> dict[str, Any]:
    """An arm's values and its differences to the reference, paired by seed and by row."""
    values = [at(one["measures"], path) for one in evaluations]
    result = {"values": values, "mean": statistics.mean(values)}
    if evaluations is reference:
        return result
    differences = [value - at(other["measures"], path) for value, other in zip(values, reference)]
    pairs = [
        (one["rows"].get(path), other["rows"].get(path))
        for one, other in zip(evaluations, reference)
    ]
    complete = all(a is not None and b is not None and len(a) == len(b) for a, b in pairs)
    # All seeds are measured on the same rows: a row is one observation, whatever the number of
    # seeds.
    by_row = np.mean([1.0 * a - b for a, b in pairs], axis=0) if complete else np.zeros(0)
    hits = complete and all(a.dtype == bool for a, _ in pairs)
    return result | {
        "difference": statistics.mean(differences),
        "se_seeds": standard_error(differences),
        "se_rows": paired_hits_error(by_row) if hits else standard_error(by_row.tolist()),
    }


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def table(result: Mapping[str, Any]) -> str:
    """One block per column: each arm's mean, its difference to the first arm, and its errors."""
    width = max(len("arm"), *(len(arm) for arm in result["overrides"]))
    lines = []
    for column in result["columns"]:
        better = "less" if column["less_is_better"] else "more"
        heading = f"{column['name']} ({column['place']}; {better} is better)"
        lines += ["", f"{heading}, seeds {result['seeds']}"]
        lines += [f"{'arm':<{width}} {'mean':>9} {'difference':>11} {'se rows':>9} {'se seeds':>9}"]
        for arm, numbers in column["arms"].items():
            cells = (
                shown(numbers["mean"]),
                shown(numbers.get("difference"), "+"),
                shown(numbers.get("se_rows")),
                shown(numbers.get("se_seeds")),
            )
            lines.append("{:<{}} {:>9} {:>11} {:>9} {:>9}".format(arm, width, *cells))
    return "\n".join(lines)


def shown(number: float | None, sign: str = "") -> str:
    """A number of the table: four decimals, or two digits of one that is too small for them.

    sign: "+" to show that of a positive number. None is "-".
    """
    if number is None:
        return "-"
    return f"{number:{sign}.{'2g' if 0 < abs(number) < 1e-3 else '4f'}}"
