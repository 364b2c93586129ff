"""One interface over safetensors and torch files: every layout, absent and damaged files."""

import json

import numpy as np
import pytest

from imagen_jax.weights.tensor_files import open_tensors, shard_names
from tests.weights import layouts

WEIGHTS = {f"part.{i}": np.arange(6, dtype=np.float32).reshape(2, 3) + i for i in range(5)}


def every(name: str) -> bool:
    return True


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_layout_has_the_same_tensors(tmp_path, layout):
    """Catches a layout that is not read, a tensor read from another's shard, a lost shape."""
    with open_tensors(layouts.write(tmp_path, WEIGHTS, layout), every) as tensors:
        assert tensors.shapes == dict.fromkeys(WEIGHTS, (2, 3))
        for name, array in WEIGHTS.items():
            np.testing.assert_array_equal(tensors.read(name), array)


@pytest.mark.parametrize("name", ["any_name.safetensors", "any_name.pth"])
def test_a_file_alone(tmp_path, name):
    """Catches a reader that only takes directories, or torch files of one suffix."""
    layouts.write_file(tmp_path / name, WEIGHTS)
    with open_tensors(tmp_path / name, every) as tensors:
        np.testing.assert_array_equal(tensors.read("part.3"), WEIGHTS["part.3"])
    with pytest.raises(FileNotFoundError, match=f"absent_{name} does not exist"):
        with open_tensors(tmp_path / f"absent_{name}", every):
            pass


@pytest.mark.parametrize("layout", ["safetensors shards", "bin shards"])
def test_only_wanted_shards_are_needed(tmp_path, layout):
    """Catches a decoder's shard that must be there to read the encoder."""
    directory = layouts.write(tmp_path, WEIGHTS, layout)
    index = next(directory.glob("*.index.json"))
    wanted = {"part.0", "part.3", "part.4"}.__contains__
    needed = shard_names(index, wanted)
    assert len(needed) == 2
    unneeded = set(json.loads(index.read_text())["weight_map"].values()) - set(needed)
    for shard in unneeded:
        (directory / shard).unlink()
    with open_tensors(directory, wanted) as tensors:
        assert set(tensors.shapes) == {"part.0", "part.3", "part.1", "part.4"}
    with pytest.raises(FileNotFoundError, match="names the shard"):
        with open_tensors(directory, every):
            pass


def test_absent_files_are_named(tmp_path):
    """Catches a directory without weights, or a lost shard, that ends in more than one line."""

    def opened():
        with open_tensors(tmp_path, every) as tensors:
            return tensors

    with pytest.raises(FileNotFoundError, match="has no weights: none of model.safetensors"):
        opened()
    layouts.write(tmp_path, WEIGHTS, "safetensors shards")
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names the shard 'model-1.safetensors'"):
        opened()
    index = {"weight_map": {"part.0": f"../{tmp_path.name}/model-0.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="which is not in"):
        opened()
    (tmp_path / "model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        opened()
