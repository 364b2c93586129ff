"""Evaluates a cascade on a prompt suite: pictures, features, metrics, one result.

All processes of a run call it together. The order is: check everything, compute the features of the
real images, draw the pictures, compute their features in shards, compute the metrics in process 0.
Every part that is complete is kept, so an interrupted evaluation continues, and one more metric or
network samples nothing again.
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from imagen_jax import cascade, drawing, picture_set, pictures
from imagen_jax.distributed import agreement
from imagen_jax.evals import data_suite, image_metrics, provenance, reference, report, statistics
from imagen_jax.evals.distances import clip_score
from imagen_jax.evals.networks import clip_text, network
from imagen_jax.evals.networks.network import FeatureNetwork
from imagen_jax.evals.real_images import PreparedImages, RealImages
from imagen_jax.evals.row_shards import Row, RowShards, rows_per_shard
from imagen_jax.evals.suites import Suite
from imagen_jax.storage import sha256_file, write_json

RESULT = "evaluation.json"
log = logging.getLogger("imagen_jax.evaluate")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is evaluated.

    config: a complete cascade config. stages: the stages to run, from base on.
    suite: the prompts. per_prompt: pictures per prompt. seed: of the first picture.
    networks: {name: path of its weights}. metrics: their names, [] for all that apply.
    images: size in pixels -> the real images; None without a reference. references: files of other
        references.
    gallery: size in pixels -> the images among which the captioned one is to be found; only for a
        suite of prepared data.
    """

    config: Mapping[str, Any]
    stages: Sequence[str]
    suite: Suite
    per_prompt: int
    seed: int
    networks: Mapping[str, str]
    metrics: Sequence[str]
    images: Callable[[int], RealImages] | None
    references: Sequence[str] = ()
    gallery: Callable[[int], PreparedImages] | None = None


def evaluate(settings: Settings, output: Path) -> dict[str, Any] | None:
    """Runs the whole evaluation in the directory `output`. Returns the result in process 0.

    Raises ValueError in one line for settings, files and weights that do not fit, before anything
    is sampled.
    """
    image_metrics.check_known(settings.metrics)
    check_networks(settings)
    drawer = drawing.Drawer(settings.config, settings.stages)
    cascade.check_intervals(drawer.stages)
    size, record = drawer.stages[-1].stage.image_size, drawer.record
    check_disk(output, len(settings.suite.prompts) * settings.per_prompt, size)
    references = make_references(settings, size, output / "reference")
    texts = [prompt.text for prompt in settings.suite.prompts]
    requests = picture_set.Requests(texts, settings.per_prompt, settings.seed)
    if jax.process_index() == 0:
        drawing.warn_of_prompts(drawer.encoder, texts)
    manifest = drawing.draw(drawer, requests, output / "pictures", drawing.NO_IMAGE)
    del drawer
    rows = [row for chunk in picture_set.chunks(manifest, 10**6, 10**6) for row in chunk]
    features = picture_features(settings, manifest, rows, size, output / "features")
    result = None
    if jax.process_index() == 0:
        scores = score(settings, features, references)
        result = scores | {"provenance": describe(settings, record, manifest, references)}
        write_json(output / RESULT, result)
    agreement.gather()  # all files are there
    return result


def check_networks(settings: Settings) -> None:
    """Raises ValueError for weights that do not fit, a metric without network, and the like."""
    for name, path in settings.networks.items():
        network.load(name, path)
        if name in image_metrics.CLIP:
            clip_text.load(name, path)
    for metric in settings.metrics:
        if not set(image_metrics.METRICS[metric].networks) & set(settings.networks):
            raise ValueError(
                f"--metrics {metric} needs one of the networks"
                f" {', '.join(image_metrics.METRICS[metric].networks)}: give --network NAME=PATH"
            )


def make_references(
    settings: Settings, size: int, directory: Path
) -> dict[str, reference.Reference]:
    """{network: features of the real images}: of the given files, or computed and kept."""
    found: dict[str, reference.Reference] = {}
    for name, path in settings.networks.items():
        loaded = network.load(name, path)
        if given := _reference_of(settings.references, name):
            found[name] = reference.load(Path(given), loaded, None)
        elif settings.images is not None:
            images = settings.images(size)
            found[name] = _kept_reference(images, loaded, directory / f"{name}.npz")
    unused = set(settings.references) - {
        given for name in settings.networks if (given := _reference_of(settings.references, name))
    }
    if unused:
        raise ValueError(
            f"--reference {sorted(unused)[0]} is of none of the networks"
            f" {', '.join(settings.networks)}: give its network with --network"
        )
    return found


def _reference_of(paths: Sequence[str], name: str) -> str:
    """The reference file that was made with a network; "" if there is none."""
    return next((path for path in paths if reference.network_of(Path(path)) == name), "")


def _kept_reference(images: RealImages, loaded: FeatureNetwork, path: Path) -> reference.Reference:
    """The reference file in the output directory; process 0 makes it if it is missing or old."""
    if jax.process_index() == 0:
        try:
            reference.load(path, loaded, images.identity)
        except ValueError:
            images.check()
            reference.make(images, loaded, path)
    agreement.gather()
    return reference.load(path, loaded, images.identity)


def check_disk(output: Path, count: int, size: int) -> None:
    """Raises ValueError if `count` pictures of `size` pixels may not fit on the disk."""
    output.mkdir(parents=True, exist_ok=True)
    there = picture_set.count_written(output / "pictures")
    needed, free = (count - there) * 3 * size**2, shutil.disk_usage(output).free
    if needed > free:
        raise ValueError(
            f"{count - there:,} pictures of {size}x{size} pixels need up to"
            f" {needed / 2**30:.1f} GiB, but {output} has {free / 2**30:.1f} GiB: give another"
            " --output, or fewer prompts"
        )


def picture_features(
    settings: Settings, manifest: Path, rows: Sequence[Row], size: int, directory: Path
) -> dict[str, Float[np.ndarray, "n _"]]:
    """{kind: values of all rows}, computed by all processes; empty except in process 0.

    Kinds are the networks, "NETWORK text" for CLIP's captions, and "retrieval".
    """
    shards: dict[str, RowShards] = {}
    process, processes = jax.process_index(), jax.process_count()
    open_pictures = lambda part: _Pictures(manifest.parent, part)

    def compute(kind: str, what: Mapping[str, Any], function: Any) -> None:
        shard = RowShards(
            directory / kind.replace(" ", "_"),
            what,
            rows,
            settings.per_prompt,
            rows_per_shard(size),
        )
        shard.compute(function, process, processes, kind)
        shards[kind] = shard

    for name, path in settings.networks.items():
        wanted = image_metrics.applicable(name, settings.metrics, True)
        if not wanted:
            continue
        loaded = network.load(name, path)
        compute(name, loaded.identity, lambda part: loaded.features(open_pictures(part)))
        if any(metric.against == "captions" for metric in wanted.values()):
            tower = clip_text.load(name, path)
            of_text = lambda part: tower.features([row["prompt"] for row in part])
            compute(f"{name} text", tower.identity, of_text)
    if settings.gallery is not None:
        gallery = settings.gallery(size)
        own = [gallery.position(prompt.category, prompt.id) for prompt in settings.suite.prompts]
        of_part = lambda part: np.array([own[row["row"] // settings.per_prompt] for row in part])
        compute(
            "retrieval",
            gallery.identity,
            lambda part: data_suite.ranks(open_pictures(part), of_part(part), gallery),
        )
    agreement.gather()
    return {kind: shard.joined() for kind, shard in shards.items()} if process == 0 else {}


class _Pictures(Sequence):
    """The pictures of rows, read when they are used."""

    def __init__(self, directory: Path, rows: Sequence[Row]):
        self._directory, self._rows = directory, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return pictures.read_png(self._directory / self._rows[index]["file"])


def score(
    settings: Settings,
    features: Mapping[str, Float[np.ndarray, "n _"]],
    references: Mapping[str, reference.Reference],
) -> dict[str, Any]:
    """The metrics: {"metrics": {network: {metric: result}}, "left_out", "retrieval"}."""
    prompts = np.repeat(np.arange(len(settings.suite.prompts)), settings.per_prompt)
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
        if "clip_score" in found:
            values = clip_score.per_prompt(features[name], others["captions"], prompts)
            results["categories"] = _by_category(settings, values)
    if "retrieval" in features:
        results["retrieval"] = data_suite.summary(features["retrieval"])
    return results


def _by_category(settings: Settings, values: Float[np.ndarray, " p"]) -> dict[str, Any]:
    """{category: mean of a value per prompt}, if the suite has several categories."""
    groups: dict[str, list[float]] = {}
    for prompt, value in zip(settings.suite.prompts, values, strict=True):
        groups.setdefault(prompt.category, []).append(value)
    if len(groups) < 2:
        return {}
    return {name: statistics.summary(np.array(group)) for name, group in groups.items()}


def describe(
    settings: Settings,
    record: Mapping[str, Any],
    manifest: Path,
    references: Mapping[str, reference.Reference],
) -> dict[str, Any]:
    """Everything that is needed to repeat the evaluation."""
    networks = {name: network.NETWORKS[name].preprocessing for name in settings.networks}
    return {
        "suite": settings.suite.identity | {"categories": settings.suite.categories()},
        "pictures": {
            "count": len(settings.suite.prompts) * settings.per_prompt,
            "per_prompt": settings.per_prompt,
            "seeds": f"{settings.seed} + number of the picture",
            "format": "uint8 RGB, PNG; features are computed from the files",
            "refused_or_filtered": 0,
            "manifest": str(manifest),
            "manifest_sha256": sha256_file(manifest),
        },
        **{name: record[name] for name in ("stages", "config", "checkpoints", "encoder")},
        "references": {name: dict(ref.identity) for name, ref in references.items()},
        "networks": {name: {"preprocessing": text} for name, text in networks.items()},
        **provenance.software(),
        "devices": provenance.devices(),
    }


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
