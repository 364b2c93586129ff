"""Draws the pictures of a grid: a tree of sets, one per stage and settings.

Every set is drawn once, with the same prompts, seeds and initial noise, by one stage alone; its
low-res images are the files of another set, which are exactly what the stage reads in a cascade:
uint8 images. So a point of the grid equals the cascade drawn at once. The prompts are encoded once,
the weights of each stage are placed once, and each setting of a stage is compiled once.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imagen_jax import cascade, drawing, drawn_sets, picture_set
from imagen_jax.distributed import agreement, shared_files
from imagen_jax.drawing import Drawer
from imagen_jax.drawn_sets import Reservation
from imagen_jax.evals import settings_grid
from imagen_jax.evals.settings_grid import Node
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.picture_set import Requests
from imagen_jax.storage import absolute

PICTURES = "pictures"  # the set of a node, in its directory
log = logging.getLogger("imagen_jax.evaluate")


def draw(
    drawer: Drawer, points: Sequence[Node], requests: Requests, directory: AnyPath
) -> dict[Node, AnyPath]:
    """Draws the missing pictures of all sets of a grid. Returns their manifests.

    All processes call it together. Raises what `drawing.draw` raises.
    """
    levels = settings_grid.levels(points)
    nodes = [node for level in levels for node in level]
    agreement.check(facts_of(drawer, points, requests) | {"--output": str(absolute(directory))})
    if not in_bucket(directory):
        directory.mkdir(parents=True, exist_ok=True)
    shared_files.check_shared(directory)
    with contextlib.ExitStack() as stack:
        reserved = {
            node: stack.enter_context(
                Reservation(
                    directory / node.directory / PICTURES,
                    requests,
                    record(drawer, node),
                    free_fields(node),
                )
            )
            for node in nodes
        }
        left = [reservation.left for reservation in reserved.values() if reservation.left]
        missing = sum(map(len, left))
        log.info(
            "%d points, %d sets, %d pictures to draw of %d",
            *(len(points), len(nodes), missing, len(nodes) * len(requests)),
        )
        manifests: dict[Node, AnyPath] = {}
        text = drawing.encode_prompts(drawer, requests, left, directory) if left else None
        for loaded, level in zip(drawer.stages, levels):
            _draw_level(drawer, loaded, level, reserved, text, manifests)
    return manifests


def facts_of(drawer: Drawer, points: Sequence[Node], requests: Requests) -> dict[str, str]:
    """Everything that determines the pictures of a grid, for `agreement.check`.

    Points differ in the settings of the axes only, so the job of one point has all other fields.
    """
    first = points[0]
    job = drawn_sets.job_of(requests, record(drawer, first), free_fields(first))
    return drawn_sets.facts_of(job) | {
        "--grid": json.dumps([dict(node.settings) for node in points])
    }


def record(drawer: Drawer, node: Node) -> dict[str, Any]:
    """The fields that all pictures of a set share: those of the cascade up to this stage.

    So `sample --reproduce` draws a picture of the set from the prompt, with all earlier stages.
    """
    return drawn_sets.NO_IMAGE | {
        "stages": list(node.stages),
        "config": dict(node.config),
        "checkpoints": drawer.record["checkpoints"][: len(node.stages)],
        "encoder": drawer.record["encoder"],
    }


def job(drawer: Drawer, node: Node, requests: Requests) -> dict[str, Any]:
    """The inputs that determine the pictures of a set."""
    return drawn_sets.job_of(requests, record(drawer, node), free_fields(node))


def free_fields(node: Node) -> tuple[str, ...]:
    """Fields of the config that do not change the pictures: also all of later stages."""
    return *drawn_sets.FREE_FIELDS, *cascade.STAGES[len(node.stages) :]


def _draw_level(
    drawer: Drawer,
    loaded: cascade.LoadedStage,
    nodes: Sequence[Node],
    reserved: Mapping[Node, Reservation],
    text: Callable[[int], cascade.Features] | None,
    manifests: dict[Node, AnyPath],
) -> None:
    """Draws the sets of one stage, whose parameters are on the devices meanwhile."""
    programs: dict[str, cascade.LoadedStage] = {}
    if any(reserved[node].left for node in nodes):
        loaded = loaded.on_mesh()
    for node in nodes:
        if reserved[node].left:
            label = f"{node.stage}: {node.label or 'all points'}"
            key = json.dumps(node.sampling)
            if key not in programs:
                programs[key] = loaded.with_sampling(node.sampling, len(node.stages) - 1)
            lowres = None
            if node.parent:
                parent = manifests[node.parent]
                lowres = picture_set.Pictures(parent.parent, picture_set.manifest_rows(parent))
            drawing.draw_left(
                reserved[node],
                [programs[key]],
                text,
                drawer.config["batch_size"],
                lowres,
                label,
            )
        manifests[node] = reserved[node].finish()
