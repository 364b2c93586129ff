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
from jaxtyping import Float, Int

from imagen_jax import cascade, drawing, picture_set
from imagen_jax.distributed import agreement
from imagen_jax.evals import (
    data_suite,
    image_metrics,
    provenance,
    reference,
    report,
    statistics,
    suite_figures,
)
from imagen_jax.evals.distances import clip_score
from imagen_jax.evals.networks import clip_text, network
from imagen_jax.evals.networks.network import FeatureNetwork
from imagen_jax.evals.real_images import PreparedImages, RealImages
from imagen_jax.evals.row_shards import Compute, Row, RowShards, rows_per_shard
from imagen_jax.evals.suites import Suite
from imagen_jax.storage import sha256_file, write_json

RESULT = "evaluation.json"
Identities = Mapping[str, Mapping[str, Any]]  # of networks, by name
log = logging.getLogger("imagen_jax.evaluate")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of an evaluation.

    config: a complete cascade config. stages: the stages to run, from base on.
    suite: the prompts. per_prompt: pictures per prompt. seed: of the first picture.
    networks: {name: path of its weights}. metrics: their names, [] for all that apply.
    images: size in pixels -> the real images; None without a reference. references: files of other
        references.
    gallery: size in pixels -> the images among which the captioned one is to be found; only for a
        suite of prepared data.
    requests: the pictures to draw. Raises ValueError if they need invalid seeds.
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
    requests: picture_set.Requests = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        texts = [prompt.text for prompt in self.suite.prompts]
        requests = picture_set.Requests(texts, self.per_prompt, self.seed)
        object.__setattr__(self, "requests", requests)

    @property
    def prompt_of_row(self) -> Int[np.ndarray, " n"]:
        """The index of the prompt of each picture."""
        return np.repeat(np.arange(len(self.suite.prompts)), self.per_prompt)


def evaluate(settings: Settings, output: Path) -> dict[str, Any] | None:
    """Runs the whole evaluation in the directory `output`. Returns the result in process 0.

    Raises ValueError in one line for settings, files and weights that do not fit, before anything
    is sampled.
    """
    image_metrics.check_known(settings.metrics)
    networks = check_networks(settings)
    cascade.run_stages(settings.config, settings.stages, "--cascade")
    drawer = drawing.Drawer(settings.config, settings.stages)
    cascade.check_intervals(drawer.stages)
    sizes, record = [loaded.stage.image_size for loaded in drawer.stages], drawer.record
    requests = settings.requests
    check_disk(output, missing(requests, record, output / "pictures", sizes))
    warnings = check_counts(settings, networks, sizes[-1])
    references = make_references(settings, sizes[-1], output / "reference")
    drawing.check_prompts(drawer, requests.prompts)
    manifest = drawing.draw(drawer, requests, output / "pictures", drawing.NO_IMAGE)
    del drawer
    loaded = load_networks(settings)
    rows = picture_set.manifest_rows(manifest)
    features = caption_features(settings, loaded, rows, output / "features")
    features |= picture_features(settings, loaded, manifest, rows, sizes[-1], output / "features")
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


def check_networks(settings: Settings) -> Identities:
    """The identities of the networks, of a CLIP with that of its text tower as "captions".

    Raises ValueError for weights that do not fit, a metric without network, and the like.
    """
    found = {}
    for name, path in settings.networks.items():
        found[name] = dict(network.load(name, path).identity)
        if name in image_metrics.CLIP:
            found[name]["captions"] = dict(clip_text.load(name, path).identity)
    for metric in settings.metrics:
        if not set(image_metrics.METRICS[metric].networks) & set(settings.networks):
            raise ValueError(
                f"--metrics {metric} needs one of the networks"
                f" {', '.join(image_metrics.METRICS[metric].networks)}: give --network NAME=PATH"
            )
    return found


def check_counts(settings: Settings, networks: Identities, size: int) -> list[str]:
    """Logs and returns warnings about the numbers of pictures and of real images.

    size: of the pictures in pixels. Raises ValueError if a metric of --metrics cannot be computed
    with so few, and for a reference file of another image size.
    """
    warnings = []
    for name, identity in networks.items():
        if (real := _real_images(settings, name, size)) is None:
            continue
        counts = {"pictures": len(settings.requests), "real images": real["count"]}
        wanted = image_metrics.applicable(name, settings.metrics, True)
        reasons = image_metrics.too_few(wanted, identity["dim"], counts)
        if reasons and settings.metrics:
            raise ValueError(f"--metrics: {name}: {reasons[0]}, or leave the metric out")
        warnings += [f"{name}: {reason}" for reason in reasons]
        if reason := settings.suite.other_reference(real["count"]):
            warnings.append(reason)
    warnings = list(dict.fromkeys(warnings))
    if jax.process_index() == 0:
        for warning in warnings:
            log.warning(warning)
    return warnings


def _real_images(settings: Settings, name: str, size: int) -> Mapping[str, Any] | None:
    """The identity of the real images of a network: of a reference file, or those to read."""
    if given := _reference_of(settings.references, name):
        found = reference.images_of(Path(given))
        if found.get("size", size) != size:
            raise ValueError(
                f"--reference {given} is of images of {found['size']} pixels, but the pictures of"
                f" the last stage have {size}: give a reference of that size, or other --stages"
            )
        return found
    return None if settings.images is None else settings.images(size).identity


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
    found = None
    if jax.process_index() == 0:
        images.check_sizes()
        try:
            found = reference.load(path, loaded, images.identity)
        except ValueError:
            images.check()
            found = reference.make(images, loaded, path)
    agreement.share_files([] if found is None else [path])
    return found or reference.load(path, loaded, images.identity)


def missing(
    requests: picture_set.Requests, record: Mapping[str, Any], directory: Path, sizes: Sequence[int]
) -> list[tuple[int, int]]:
    """(pictures to draw, size in pixels) of each stage of a set; other sets do not count.

    sizes: of the stages in pixels.
    """
    job = drawing.job_of(requests, record | drawing.NO_IMAGE)
    left = len(requests) - picture_set.count_written(directory, job, len(requests))
    return [(left, size) for size in sizes]


def check_disk(output: Path, missing: Sequence[tuple[int, int]]) -> None:
    """Raises ValueError if the pictures to draw may not fit on the disk.

    missing: (number of pictures, size in pixels) of each set.
    """
    output.mkdir(parents=True, exist_ok=True)
    needed = sum(3 * count * size**2 for count, size in missing)
    free = shutil.disk_usage(output).free
    if needed > free:
        raise ValueError(
            f"{sum(count for count, _ in missing):,} pictures need up to {needed / 2**30:.1f} GiB,"
            f" but {output} has {free / 2**30:.1f} GiB: give another --output, or fewer prompts"
        )


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A feature network, with the text tower of its CLIP if a metric needs captions."""

    images: FeatureNetwork
    captions: clip_text.CaptionNetwork | None


def load_networks(settings: Settings) -> dict[str, Loaded]:
    """{name: network} of the networks that a metric needs."""
    found = {}
    for name, path in settings.networks.items():
        wanted = image_metrics.applicable(name, settings.metrics, True).values()
        captions = any(metric.against == "captions" for metric in wanted)
        if wanted:
            tower = clip_text.load(name, path) if captions else None
            found[name] = Loaded(network.load(name, path), tower)
    return found


def caption_features(
    settings: Settings, networks: Mapping[str, Loaded], rows: Sequence[Row], directory: Path
) -> dict[str, Float[np.ndarray, "n _"]]:
    """{"NETWORK text": CLIP's features of the prompt of each row}; see `picture_features`."""
    texts = [{**row, "sha256": ""} for row in rows]  # whatever the pictures
    shards: dict[str, RowShards] = {}
    for name, loaded in networks.items():
        if tower := loaded.captions:
            of_part = lambda part, tower=tower: tower.features([row["prompt"] for row in part])
            place = directory / f"{name}_text"
            shards[f"{name} text"] = _computed(
                settings, place, tower.identity, texts, _network_shard(texts), of_part
            )
    return _joined(shards)


def picture_features(
    settings: Settings,
    networks: Mapping[str, Loaded],
    manifest: Path,
    rows: Sequence[Row],
    size: int,
    directory: Path,
) -> dict[str, Float[np.ndarray, "n _"]]:
    """{kind: values of all rows}, computed by all processes; empty except in process 0.

    Kinds are the networks, and "retrieval". size: of the pictures in pixels.
    """
    shards: dict[str, RowShards] = {}
    open_pictures = lambda part: picture_set.Pictures(manifest.parent, part)
    for name, loaded in networks.items():
        of_part = lambda part, loaded=loaded: loaded.images.features(open_pictures(part))
        shards[name] = _computed(
            settings, directory / name, loaded.images.identity, rows, _network_shard(rows), of_part
        )
    if settings.gallery is not None:
        gallery = settings.gallery(size)
        own = [gallery.position(prompt.category, prompt.id) for prompt in settings.suite.prompts]
        own_of = lambda part: np.array([own[row["row"] // settings.per_prompt] for row in part])
        ranks = lambda part: data_suite.ranks(open_pictures(part), own_of(part), gallery)
        shards["retrieval"] = _computed(
            settings,
            directory / "retrieval",
            gallery.identity,
            rows,
            rows_per_shard(len(rows), jax.process_count(), 1, data_suite.pictures_at_once(size)),
            ranks,
        )
    return _joined(shards)


def _network_shard(rows: Sequence[Row]) -> int:
    """Rows per file of the features of a network."""
    # From numbers that are the same in all processes.
    batch = network.BATCH_SIZE * (jax.device_count() // jax.process_count())
    return rows_per_shard(len(rows), jax.process_count(), batch)


def _computed(
    settings: Settings,
    directory: Path,
    what: Mapping[str, Any],
    rows: Sequence[Row],
    size: int,
    function: Compute,
) -> RowShards:
    """The values of rows, of which this process computes its share. size: rows per file."""
    shards = RowShards(directory, what, rows, settings.per_prompt, size)
    shards.compute(function, jax.process_index(), jax.process_count(), directory.name)
    return shards


def _joined(shards: Mapping[str, RowShards]) -> dict[str, Float[np.ndarray, "n _"]]:
    """The values of all processes, in process 0."""
    place = jax.process_index(), jax.process_count()
    agreement.share_files(path for shard in shards.values() for path in shard.files(*place))
    if jax.process_index():
        return {}
    return {kind: shard.joined() for kind, shard in shards.items()}


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


def describe(
    settings: Settings,
    record: Mapping[str, Any],
    references: Mapping[str, reference.Reference],
    networks: Identities,
) -> dict[str, Any]:
    """Everything that is needed to repeat the evaluation, except the manifest."""
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
        "references": {name: dict(ref.identity) for name, ref in references.items()},
        "networks": {name: dict(identity) for name, identity in networks.items()},
        **provenance.software(),
        "devices": provenance.devices(),
    }


def described_manifest(manifest: Path) -> dict[str, str]:
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
