"""The real images of an evaluation on a suite: checks before sampling, and their features."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from imagen_jax.distributed import agreement
from imagen_jax.evals import image_metrics, reference, suite_features
from imagen_jax.evals.networks import network
from imagen_jax.evals.networks.network import FeatureNetwork
from imagen_jax.evals.real_images import Images, RealImages
from imagen_jax.evals.suite_settings import Identities, Settings
from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import remove

log = logging.getLogger("imagen_jax.evaluate")


def check(settings: Settings, networks: Identities, size: int) -> list[str]:
    """Logs and returns warnings about the numbers of pictures and of real images.

    size: of the pictures in pixels. Raises ValueError if a metric of --metrics cannot be computed
    with so few, for a network without any metric, and for a reference file of another image size or
    of no network.
    """
    warnings, missing = [], {}
    for name, identity in networks.items():
        if not (wanted := image_metrics.against_reference(name, settings.metrics)):
            continue
        if (real := _real_images(settings, name, size)) is None:
            missing[name] = wanted
            continue
        counts = {"pictures": len(settings.requests), "real images": real["count"]}
        reasons = image_metrics.too_few(wanted, identity["dim"], counts)
        if reasons and settings.metrics:
            raise ValueError(f"--metrics: {name}: {reasons[0]}, or leave the metric out")
        warnings += [f"{name}: {reason}" for reason in reasons]
        if reason := settings.suite.other_reference(real["count"]):
            warnings.append(reason)
    for name, wanted in missing.items():
        others = image_metrics.applicable(name, settings.metrics, False)
        if settings.metrics or not others:
            raise ValueError(
                f"{name}: {', '.join(wanted)} need real images: give --data, --images or"
                " --reference, or leave the metrics out"
            )
        warnings.append(f"{name}: no real images are given, so it has only {', '.join(others)}")
    unused = set(settings.references) - {
        given for name in settings.networks if (given := _reference_of(settings.references, name))
    }
    if unused:
        raise ValueError(
            f"--reference {sorted(unused)[0]} is of none of the networks"
            f" {', '.join(settings.networks)}: give its network with --network"
        )
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


def make(settings: Settings, size: int, directory: AnyPath) -> dict[str, reference.Reference]:
    """{network: features of the real images}: of the given files, or computed and kept.

    Computed ones are in process 0 only, which computes the metrics. Networks without a metric that
    needs real images are left out.
    """
    found: dict[str, reference.Reference] = {}
    for name, path in settings.networks.items():
        if not image_metrics.against_reference(name, settings.metrics):
            continue
        loaded = network.load(name, path)
        if given := _reference_of(settings.references, name):
            found[name] = reference.load(Path(given), loaded, None)
        elif settings.images is not None:
            images = settings.images(size)
            made = _kept(images, loaded, directory / f"{name}.npz")
            found |= {} if made is None else {name: made}
    return found


def _reference_of(paths: Sequence[str], name: str) -> str:
    """The reference file that was made with a network; "" if there is none."""
    return next((path for path in paths if reference.network_of(Path(path)) == name), "")


def _kept(images: RealImages, loaded: FeatureNetwork, path: AnyPath) -> reference.Reference | None:
    """The reference file in the output directory, in process 0; all make it if it is missing."""
    found = _read(images, loaded, path) if jax.process_index() == 0 else None

    def check_images() -> None:
        images.check_sizes()
        if found is None:
            images.check()

    agreement.check_in_first(check_images)
    if agreement.gather("found" if found else "")[0]:
        return found
    rows = [{"row": i, "prompt": "", "sha256": ""} for i in range(len(images))]
    what = {"network": dict(loaded.identity), "images": dict(images.identity)}
    of_part = lambda part: loaded.features(Images(images, part[0]["row"], part[-1]["row"] + 1))
    parts = path.with_name(f"{loaded.name}_parts")
    label = f"{loaded.name} features of real images"
    shards = suite_features.computed(
        parts, what, rows, 1, suite_features.network_shard(rows), of_part, label
    )
    features = suite_features.joined({loaded.name: shards})
    if not features:
        return None
    made = reference.write(images, loaded, features[loaded.name], path)
    remove(parts)
    return made


def _read(images: RealImages, loaded: FeatureNetwork, path: AnyPath) -> reference.Reference | None:
    """The file of an earlier evaluation; None if it is missing, damaged or of something else."""
    try:
        return reference.load(path, loaded, images.identity)
    except ValueError:
        return None
