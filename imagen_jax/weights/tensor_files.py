"""Named tensors of foreign files: safetensors or torch.save, one file or shards with an index.

No torch, and no tensor is in memory before it is read.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from imagen_jax.weights.torch_files import TorchFile

# In a directory in the Hugging Face layout, in order of preference.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class SafetensorsFile:
    """An open safetensors file: `shapes` by name, `read` copies one tensor out as it is stored."""

    def __init__(self, path: str | os.PathLike):
        import safetensors

        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            self._file = safetensors.safe_open(path, framework="numpy").__enter__()
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        names = self._file.keys()
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._file.__exit__(*exc)

    def read(self, name: str) -> np.ndarray:
        return self._file.get_tensor(name)


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of one or several open files, as if they were one file.

    Names are in the order of the files, so reading them in turn finishes one file after the other.
    """

    files: Mapping[str, SafetensorsFile | TorchFile]  # by the name of the tensor

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: file.shapes[name] for name, file in self.files.items()}

    def read(self, name: str) -> np.ndarray:
        return self.files[name].read(name)


@contextlib.contextmanager
def open_tensors(path: pathlib.Path, wanted: Callable[[str], bool]) -> Iterator[Tensors]:
    """The tensors at `path`: a file, or a directory in the Hugging Face layout.

    wanted: whether a tensor is needed, by its name. Shards that an index lists without a wanted
    tensor are not opened and may be absent; the opened files may hold unwanted tensors too.

    Raises:
        FileNotFoundError: the weights or a shard are absent.
        ValueError: a file is damaged, or is not of its format.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(file)) for file in _weight_files(path, wanted)]
        yield Tensors({name: file for file in files for name in file.shapes})


def shard_names(weights: pathlib.Path, wanted: Callable[[str], bool]) -> list[str]:
    """Names of the files with wanted tensors: `weights` itself, or the shards that it lists."""
    if not weights.name.endswith(".index.json"):
        return [weights.name]
    index = json.loads(weights.read_text()).get("weight_map", {})
    return sorted({file for name, file in index.items() if wanted(name)})


def _open(path: pathlib.Path) -> SafetensorsFile | TorchFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _weight_files(path: pathlib.Path, wanted: Callable[[str], bool]) -> list[pathlib.Path]:
    if not path.is_dir():
        return [path]
    found = next((name for name in WEIGHTS if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path} has no weights: none of {', '.join(WEIGHTS)}")
    shards = shard_names(path / found, wanted)
    for shard in shards:
        if pathlib.Path(shard).name != shard or not (path / shard).is_file():
            raise FileNotFoundError(
                f"{path / found} names the shard {shard!r}, which is not in {path}"
            )
    return [path / shard for shard in shards]
