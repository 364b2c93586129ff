"""Parameters, FLOPs and bytes of a train step, computed without running it."""

from typing import Any

import jax

from tools.accelerator import package

BY_IMAGE = {"batch", "activations"}


def facts(config: dict[str, Any], program: package.TrainProgram) -> dict[str, Any]:
    """Of a program for one image: FLOPs of an image's step, bytes held and bytes an image."""
    parts, stage = package.state_parts(program), package.create_stage(config)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params)),
        "flops_per_image": 3 * package.forward_flops(stage, stage.largest_bucket),
        "parts": parts,
        "held_bytes": sum(size for part, size in parts.items() if part not in BY_IMAGE),
        "image_bytes": sum(size for part, size in parts.items() if part in BY_IMAGE),
    }
