"""Evaluates a cascade on a prompt suite at every point of a grid of sampling settings.

The order is that of `suite_evaluation`: check everything, compute the features of the real images,
draw all pictures, compute the features and the metrics of each point, compare the points. Every
part that is complete is kept.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from imagen_jax import cascade, drawing, picture_set
from imagen_jax.distributed import agreement
from imagen_jax.evals import (
    earlier_result,
    grid_comparison,
    grid_pictures,
    image_metrics,
    pareto,
    reference,
    settings_grid,
    suite_evaluation,
    suite_features,
    suite_references,
)
from imagen_jax.evals.distances import clip_score
from imagen_jax.evals.grid_comparison import PointResult
from imagen_jax.evals.settings_grid import Axis, Node
from imagen_jax.evals.suite_features import Loaded
from imagen_jax.evals.suite_settings import Settings, check_networks
from imagen_jax.object_storage import AnyPath
from imagen_jax.stage_sizes import Size
from imagen_jax.storage import check_outputs, read_object, remove, write_atomically, write_json

RESULT, FIGURE, DIRECTORY = "grid.json", "pareto.png", "grid"
SCORES = "scores.json"  # of a point, in its directory
SCORES_VERSION = 2  # raise it when a metric changes, so that all are computed again
SCORES_FIELDS = {
    "of": str,
    "scores.metrics": dict,
    "scores.left_out": dict,
    "per_prompt": dict,
}
log = logging.getLogger("imagen_jax.evaluate")


def evaluate(settings: Settings, options: Sequence[str], output: AnyPath) -> str | None:
    """Runs the whole grid in the directory `output`. Returns its table in process 0.

    options: of --grid. Raises ValueError in one line for options, settings, files and weights that
    do not fit, before anything is sampled.
    """
    check_outputs(output, (RESULT, FIGURE), (DIRECTORY, "reference"))
    stages = cascade.run_stages(settings.config, settings.stages, "--cascade")
    axes = settings_grid.parse(options, settings.config, stages)
    points = settings_grid.points(axes, settings.config, stages)
    image_metrics.check_known(settings.metrics)
    networks = check_networks(settings)
    drawer = drawing.Drawer(settings.config, stages)
    check_loaded(drawer, points, axes)
    size, record = drawer.stages[-1].stage.image_size, drawer.record
    directory, requests = output / DIRECTORY, settings.requests
    earlier_result.check(
        output / RESULT,
        suite_evaluation.drawn_from(settings, record),
        [axis.name for axis in axes],
    )
    drawing.check_disk(output, list(missing(drawer, points, directory, requests)))
    warnings = suite_references.check(settings, networks, size)
    references = suite_references.make(settings, size, output / "reference")
    drawing.check_prompts(drawer, requests.prompts)
    manifests = grid_pictures.draw(drawer, points, requests, directory)
    del drawer
    scored = score_points(settings, points, manifests, size, references, directory)
    text = None
    if jax.process_index() == 0:
        described = suite_evaluation.describe(settings, record, references, networks)
        more = {"warnings": warnings, "provenance": described}
        text = write_results(axes, points, manifests, scored, more, output)
    agreement.gather()  # all files are there
    return text


def check_loaded(drawer: drawing.Drawer, points: Sequence[Node], axes: Sequence[Axis]) -> None:
    """Raises ValueError for settings of the grid that the loaded stages cannot draw with."""
    loaded = dict(zip(points[0].stages, drawer.stages))
    inputs = {name: stage.stage.texts for name, stage in loaded.items()}
    settings_grid.check_settings(points, axes, inputs)
    for i, level in enumerate(settings_grid.levels(points)):
        for node in level:
            cascade.check_intervals([loaded[node.stage].with_sampling(node.sampling, i)])


def missing(
    drawer: drawing.Drawer,
    points: Sequence[Node],
    directory: AnyPath,
    requests: picture_set.Requests,
) -> Iterator[tuple[int, Size]]:
    """Yields (pictures to draw, their size) of each set."""
    for loaded, level in zip(drawer.stages, settings_grid.levels(points)):
        for node in level:
            place = directory / node.directory / grid_pictures.PICTURES
            job = grid_pictures.job(drawer, node, requests)
            written = picture_set.count_written(place, job, len(requests))
            yield len(requests) - written, loaded.size


def score_points(
    settings: Settings,
    points: Sequence[Node],
    manifests: Mapping[Node, AnyPath],
    size: int,
    references: Mapping[str, reference.Reference],
    directory: AnyPath,
) -> list[PointResult]:
    """The metrics of each point, in process 0; points that are scored already are read."""
    networks = suite_features.load_networks(settings)
    digests = [_digest(settings, networks, references, manifests[node], size) for node in points]
    paths = [directory / node.directory / SCORES for node in points]
    prompts = len(settings.suite.prompts)
    kept = [read_scores(path, digest, prompts) for path, digest in zip(paths, digests)]
    # Process 0 decides, because the others may see its files late.
    done = json.loads(agreement.gather(json.dumps([found is not None for found in kept]))[0])
    captions = {}
    if not all(done):
        rows = picture_set.manifest_rows(manifests[points[0]])
        captions = suite_features.caption_features(settings, networks, rows, directory)
    results = []
    for number, node in enumerate(points):
        found = kept[number]
        if not done[number]:
            log.info("point %d of %d: %s", number + 1, len(points), node.label)
            manifest = manifests[node]
            rows, place = picture_set.manifest_rows(manifest), paths[number].parent / "features"
            features = captions | suite_features.picture_features(
                settings, networks, manifest, rows, size, place
            )
            if jax.process_index() == 0:
                found = score_point(settings, features, references)
                write_scores(paths[number], digests[number], found)
        results.append(found)
    return results


def score_point(
    settings: Settings, features: Mapping[str, Any], references: Mapping[str, reference.Reference]
) -> PointResult:
    """The metrics of one point, and the values by prompt that pair it with other points."""
    scores = suite_evaluation.score(settings, features, references)
    prompts = settings.prompt_of_row
    per_prompt = {
        name: clip_score.per_prompt(features[name], features[f"{name} text"], prompts)
        for name, found in scores["metrics"].items()
        if "clip_score" in found
    }
    ranks = features.get(grid_comparison.RETRIEVAL)
    if ranks is not None:
        ranks = ranks[:, 0].astype(float).reshape(-1, settings.per_prompt)
    return PointResult(scores, per_prompt, ranks)


def _digest(
    settings: Settings,
    networks: Mapping[str, Loaded],
    references: Mapping[str, reference.Reference],
    manifest: AnyPath,
    size: int,
) -> str:
    """Of everything that determines the metrics of a point."""
    what = {
        "version": SCORES_VERSION,
        "manifest": suite_evaluation.described_manifest(manifest)["manifest_sha256"],
        "networks": {
            name: [dict(part.identity) for part in (loaded.images, loaded.captions) if part]
            for name, loaded in networks.items()
        },
        "references": {name: found.identity["sha256"] for name, found in references.items()},
        "metrics": list(settings.metrics),
        "gallery": settings.gallery(size).identity if settings.gallery else None,
        "suite": settings.suite.identity["prompts_sha256"],
        "per_prompt": settings.per_prompt,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def write_scores(path: AnyPath, digest: str, found: PointResult) -> None:
    """Writes the metrics of a point."""
    content = {"of": digest, "scores": found.scores}
    content["per_prompt"] = {name: values.tolist() for name, values in found.per_prompt.items()}
    content["ranks"] = None if found.ranks is None else found.ranks.tolist()
    write_json(path, content)


def read_scores(path: AnyPath, digest: str, prompts: int) -> PointResult | None:
    """The metrics of a point; None if they are missing, damaged or of something else.

    prompts: their number.
    """
    try:
        content = read_object(path, SCORES_FIELDS)
        if content["of"] != digest:
            return None
        per_prompt = {name: np.array(found, float) for name, found in content["per_prompt"].items()}
        ranks = content["ranks"]
        ranks = None if ranks is None else np.array(ranks, float)
        point = PointResult(content["scores"], per_prompt, ranks)
        grid_comparison.check_complete(point, prompts)
    except (FileNotFoundError, *grid_comparison.DAMAGE):
        return None
    return point


def write_results(
    axes: Sequence[Axis],
    points: Sequence[Node],
    manifests: Mapping[Node, AnyPath],
    scored: Sequence[PointResult],
    more: Mapping[str, Any],
    output: AnyPath,
) -> str:
    """Writes grid.json and the figure; returns the table. more: "warnings" and "provenance"."""
    quantities = grid_comparison.quantities(scored)
    found = [best for quantity in quantities if (best := grid_comparison.best(quantity))]
    result = {
        "grid": {axis.name: list(axis.values) for axis in axes},
        "points": [
            {
                "settings": dict(node.settings),
                **result.scores,
                "pictures": suite_evaluation.described_manifest(manifests[node]),
            }
            for node, result in zip(points, scored)
        ],
        "best": found,
        **more,
    }
    write_json(output / RESULT, result)
    left_out = {name: why for point in scored for name, why in point.scores["left_out"].items()}
    lines = [f"{name} left out: {why}" for name, why in left_out.items()]
    lines += [f"warning: {warning}" for warning in more["warnings"]]
    if shown := pareto.choose(quantities):
        write_atomically(output / FIGURE, pareto.figure(axes, *shown))
        lines.append(f"figure: {output / FIGURE}")
    else:
        remove(output / FIGURE)  # of an earlier result
        log.info(
            "no %s: it needs real images, and a CLIP network or --suite data, for its two axes",
            FIGURE,
        )
    table = grid_comparison.table([node.label for node in points], quantities, found)
    return "\n".join([table, *lines, f"all results: {output / RESULT}"])
