"""Named tensors of foreign files: safetensors or torch.save, one file or shards with an index.

Needs no torch. A tensor is loaded only when it is read.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Shaped

from imagen_jax.storage import check_content, read_json
from imagen_jax.weights.torch_files import TorchFile

# Files with weights in the Hugging Face layout, in order of preference.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class SafetensorsFile:
    """An open safetensors file. `shapes`: by tensor name. `read`: one tensor as stored."""

    def __init__(self, path: str | os.PathLike):
        import safetensors

        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist")
        check_content(pathlib.Path(path))
        self._path = path
        try:
            self._file = safetensors.safe_open(path, framework="numpy").__enter__()
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({error}): download it again"
            ) from error
        names = self._file.keys()
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._file.__exit__(*exc)

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        try:
            return self._file.get_tensor(name)
        except Exception as error:  # number types that numpy or this version lacks, for example
            raise ValueError(
                f"{self._path}: tensor {name} cannot be read ({error}): download the file again,"
                " or update the package safetensors"
            ) from error


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of one or several open files.

    files: tensor name -> file. Names are in the order of the files, so reading the tensors in this
        order reads one file after the other.
    """

    files: Mapping[str, SafetensorsFile | TorchFile]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: file.shapes[name] for name, file in self.files.items()}

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        return self.files[name].read(name)


@contextlib.contextmanager
def open_tensors(path: pathlib.Path, wanted: Callable[[str], bool]) -> Iterator[Tensors]:
    """Opens the tensors at `path`: a file, or a directory in the Hugging Face layout.

    wanted: tensor name -> whether it is needed. Shards without a wanted tensor according to the
    index are not opened and may be absent. The opened files may also hold other tensors.

    Raises:
        FileNotFoundError: the weights or a shard are absent.
        ValueError: a file is empty, a Git LFS pointer, damaged or of another format.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(file)) for file in _weight_files(path, wanted)]
        yield Tensors({name: file for file in files for name in file.shapes})


def shard_names(weights: pathlib.Path, wanted: Callable[[str], bool]) -> list[str]:
    """Names of the files with wanted tensors: `weights` itself, or shards if it is an index."""
    if not weights.name.endswith(".index.json"):
        return [weights.name]
    content = read_json(weights)
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(
            f"{weights} is not an index of shards: it has no valid weight_map; download it again"
        )
    return sorted({file for name, file in index.items() if wanted(name)})


def _open(path: pathlib.Path) -> SafetensorsFile | TorchFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _weight_files(path: pathlib.Path, wanted: Callable[[str], bool]) -> list[pathlib.Path]:
    if not path.is_dir():
        return [path]
    weights = next((name for name in WEIGHTS if (path / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{path} has no weights: none of {', '.join(WEIGHTS)}")
    shards = shard_names(path / weights, wanted)
    for shard in shards:
        if pathlib.Path(shard).name != shard or not (path / shard).is_file():
            raise FileNotFoundError(
                f"{path / weights} names the shard {shard!r}, which is not in {path}: download it"
            )
    return [path / shard for shard in shards]
