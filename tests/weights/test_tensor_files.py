"""One interface over safetensors and torch files: every layout, absent and damaged files."""

import json

import numpy as np
import pytest

from imagen_jax.weights.tensor_files import open_tensors, shard_names
from tests.test_storage import POINTER
from tests.weights import layouts

WEIGHTS = {f"part.{i}": np.arange(6, dtype=np.float32).reshape(2, 3) + i for i in range(5)}


def every(name: str) -> bool:
    return True


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_layout_has_the_same_tensors(tmp_path, layout):
    """Catches a layout that is not read, a tensor read from another shard, a lost shape."""
    with open_tensors(layouts.write(tmp_path, WEIGHTS, layout), every) as tensors:
        assert tensors.shapes == dict.fromkeys(WEIGHTS, (2, 3))
        for name, array in WEIGHTS.items():
            np.testing.assert_array_equal(tensors.read(name), array)


@pytest.mark.parametrize("name", ["any_name.safetensors", "any_name.pth"])
def test_a_file_alone(tmp_path, name):
    """Catches a reader of directories only, or of one suffix of torch files."""
    layouts.write_file(tmp_path / name, WEIGHTS)
    with open_tensors(tmp_path / name, every) as tensors:
        np.testing.assert_array_equal(tensors.read("part.3"), WEIGHTS["part.3"])
    with pytest.raises(FileNotFoundError, match=f"absent_{name} does not exist"):
        with open_tensors(tmp_path / f"absent_{name}", every):
            pass


@pytest.mark.parametrize("layout", ["safetensors shards", "bin shards"])
def test_only_wanted_shards_are_needed(tmp_path, layout):
    """Catches a decoder shard that must exist to read the encoder."""
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
    """Catches missing weights or shards whose error does not name the file."""

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


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: POINTER.encode(), r"x\.\w+ is a Git LFS pointer .*`git lfs pull`"),
        (lambda data: b"", r"x\.\w+ is empty; download"),
        (lambda data: data[:-60], r"x\.\w+ is .*: download it again"),
        (lambda data: data[:20], r"x\.\w+ is .*: download it again"),
    ],
)
def test_files_without_their_content_are_named(tmp_path, name, change, message):
    """Catches "header too large" for a Git LFS pointer, and a cut download without advice."""
    layouts.write_file(tmp_path / name, WEIGHTS)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=message):
        with open_tensors(tmp_path / name, every):
            pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "index.json is a Git LFS pointer"),
        ('{"weight_map": {"a"', "index.json is not valid JSON"),
        ("[]", "index.json is not an index of shards: it has no valid weight_map"),
        ('{"weight_map": {"part.0": 3}}', "index.json is not an index of shards"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, message):
    """Catches a traceback, or a model without weights, from an index that is not whole."""
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        with open_tensors(tmp_path, every):
            pass


def test_a_number_type_that_numpy_lacks_is_named(tmp_path):
    """Catches a KeyError of safetensors for a file with newer number types."""
    header = b'{"w":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    data = len(header).to_bytes(8, "little") + header + b"ab"
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="x.safetensors.*download"):
        with open_tensors(tmp_path / "x.safetensors", every) as tensors:
            print(tensors.read("w"))
