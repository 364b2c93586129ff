"""Evaluates a cascade on a prompt suite: pictures, features, metrics, one result.

All processes of a run call it together. The order is: check everything, compute the features of the
real images, draw the pictures, compute their features in shards, compute the metrics in process 0.
Every part that is complete is kept, so an interrupted evaluation continues, and one more metric or
network samples nothing again.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from imagen_jax import cascade, drawing, drawn_sets, picture_set
from imagen_jax.checksums import sha256_file
from imagen_jax.distributed import agreement
from imagen_jax.evals import (
    data_suite,
    earlier_result,
    image_metrics,
    provenance,
    reference,
    report,
    statistics,
    suite_features,
    suite_figures,
    suite_references,
)
from imagen_jax.evals.distances import clip_score
from imagen_jax.evals.suite_settings import Identities, Settings, check_networks
from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import check_outputs, write_json

RESULT = "evaluation.json"
FILES = (RESULT, suite_figures.EXTRAPOLATION, suite_figures.CATEGORIES)
DIRECTORIES = ("pictures", "reference", "features")


def evaluate(settings: Settings, output: AnyPath) -> dict[str, Any] | None:
    """Runs the whole evaluation in the directory `output`. Returns the result in process 0.

    Raises ValueError in one line for settings, files and weights that do not fit, before anything
    is sampled.
    """
    check_outputs(output, FILES, DIRECTORIES)
    image_metrics.check_known(settings.metrics)
    networks = check_networks(settings)
    cascade.run_stages(settings.config, settings.stages, "--cascade")
    drawer = drawing.Drawer(settings.config, settings.stages)
    cascade.check_intervals(drawer.stages)
    sizes, record = drawer.sizes, drawer.record
    side = sizes[-1][0]
    requests = settings.requests
    earlier_result.check(output / RESULT, drawn_from(settings, record))
    missing = drawn_sets.missing(requests, record | drawn_sets.NO_IMAGE, output / "pictures", sizes)
    drawing.check_disk(output, missing)
    warnings = suite_references.check(settings, networks, side)
    references = suite_references.make(settings, side, output / "reference")
    drawing.check_prompts(drawer, requests.prompts)
    manifest = drawing.draw(drawer, requests, output / "pictures", drawn_sets.NO_IMAGE)
    del drawer
    loaded = suite_features.load_networks(settings)
    rows, place = picture_set.manifest_rows(manifest), output / "features"
    features = suite_features.caption_features(settings, loaded, rows, place)
    features |= suite_features.picture_features(settings, loaded, manifest, rows, side, place)
    result = None
    if jax.process_index() == 0:
        scores = score(settings, features, references)
        described = describe(settings, record, references, networks)
        described["pictures"] |= described_manifest(manifest)
        result = scores | {"warnings": warnings, "provenance": described}
        result["by_prompt"] = by_prompt(settings, scores, features)
        write_json(output / RESULT, result)
        suite_figures.write(result, manifest, sizes, output)
    agreement.gather()  # all files are there
    return result


def score(
    settings: Settings,
    features: Mapping[str, Float[np.ndarray, "n _"]],
    references: Mapping[str, reference.Reference],
) -> dict[str, Any]:
    """The metrics: {"metrics": {network: {metric: result}}, "left_out", "retrieval"}."""
    prompts = settings.prompt_of_row
    results: dict[str, Any] = {"metrics": {}, "left_out": {}}
    for name in settings.networks:
        metrics = image_metrics.applicable(name, settings.metrics, name in references)
        if not metrics:
            continue
        others = {}
        if f"{name} text" in features:
            others["captions"] = features[f"{name} text"]
        if name in references:
            others["reference"] = references[name].features
        found, left_out = image_metrics.score_all(metrics, features[name], others, prompts)
        results["metrics"][name] = found
        results["left_out"] |= {f"{name}: {metric}": why for metric, why in left_out.items()}
        if "clip_score" in found and "categories" not in results:  # of the first CLIP
            values = clip_score.per_prompt(features[name], others["captions"], prompts)
            results["categories"] = _by_category(settings, values)
    if "retrieval" in features:
        results["retrieval"] = data_suite.summary(features["retrieval"], settings.per_prompt)
    return results


def by_prompt(
    settings: Settings,
    scores: Mapping[str, Any],
    features: Mapping[str, Float[np.ndarray, "n _"]],
) -> dict[str, Any]:
    """What pairs two results, besides the jackknife's values in the metrics themselves.

    {"scores": {network: CLIP score of each prompt}, "ranks": of the captioned image, [prompts,
    pictures], None without retrieval}; rounded to what the comparison needs.
    """
    values = {
        name: clip_score.per_prompt(
            features[name], features[f"{name} text"], settings.prompt_of_row
        ).round(4)
        for name, found in scores["metrics"].items()
        if "clip_score" in found
    }
    ranks = features.get("retrieval")
    if ranks is not None:
        ranks = ranks[:, 0].reshape(-1, settings.per_prompt).tolist()
    return {"scores": {name: found.tolist() for name, found in values.items()}, "ranks": ranks}


def _by_category(settings: Settings, values: Float[np.ndarray, " p"]) -> dict[str, Any]:
    """{category: mean of a value per prompt}, if the suite has several categories."""
    groups: dict[str, list[float]] = {}
    for prompt, value in zip(settings.suite.prompts, values, strict=True):
        groups.setdefault(prompt.category, []).append(value)
    if len(groups) < 2:
        return {}
    return {name: statistics.summary(np.array(group)) for name, group in groups.items()}


def drawn_from(settings: Settings, record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `describe` that determines the pictures."""
    return {
        "suite": settings.suite.identity | {"categories": settings.suite.categories()},
        "pictures": {
            "count": len(settings.requests),
            "per_prompt": settings.per_prompt,
            "seeds": f"{settings.seed} + row of the manifest",
            "format": "uint8 RGB, PNG; features are computed from the files",
            "refused_or_filtered": 0,
        },
        **{name: record[name] for name in ("stages", "config", "checkpoints", "encoder")},
    }


def describe(
    settings: Settings,
    record: Mapping[str, Any],
    references: Mapping[str, reference.Reference],
    networks: Identities,
) -> dict[str, Any]:
    """Everything that is needed to repeat the evaluation, except the manifest."""
    return {
        **drawn_from(settings, record),
        "references": {name: dict(ref.identity) for name, ref in references.items()},
        "networks": {name: dict(identity) for name, identity in networks.items()},
        **provenance.software(),
        "devices": provenance.devices(),
    }


def described_manifest(manifest: AnyPath) -> dict[str, str]:
    """The path and the checksum of a manifest."""
    return {"manifest": str(manifest), "manifest_sha256": sha256_file(manifest)}


def lines(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, text) of each line of the printed table."""
    for name, found in result["metrics"].items():
        yield from image_metrics.lines(name, found)
    if "retrieval" in result:
        gallery = result["retrieval"]["gallery"]
        yield "retrieval", f"of {gallery} images: {report.proportions(result['retrieval'])}"
    for name, mean in result.get("categories", {}).items():
        yield f"CLIP score, {name}", report.mean(mean)
    for name, reason in result["left_out"].items():
        yield name, f"left out: {reason}"
    for warning in result.get("warnings", ()):
        yield "warning", warning
