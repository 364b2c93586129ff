"""Writes tensors in the four layouts in which weights are published."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from tests.weights import torch_files


def write(directory: pathlib.Path, weights: dict[str, np.ndarray], layout: str) -> pathlib.Path:
    """Writes tensors. layout: "safetensors" or "bin", optionally followed by " shards"."""
    directory.mkdir(parents=True, exist_ok=True)
    suffix, _, shards = layout.partition(" ")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if not shards:
        write_file(directory / f"{stem}.{suffix}", weights)
        return directory
    index = {name: f"{stem}-{i % 3}.{suffix}" for i, name in enumerate(weights)}
    for file in set(index.values()):
        part = {name: weights[name] for name in weights if index[name] == file}
        write_file(directory / file, part)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


def write_file(path: pathlib.Path, weights: dict[str, np.ndarray]) -> None:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch_files.write(path, *torch_files.plain(weights))


LAYOUTS = ("safetensors", "safetensors shards", "bin", "bin shards")
