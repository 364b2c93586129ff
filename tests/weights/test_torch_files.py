"""The reader of torch.save files: real, hostile and damaged files."""

import os
import pathlib
import pickle

import numpy as np
import pytest

from imagen_jax.weights.torch_files import TorchFile
from tests.text.random_t5 import GOLDENS
from tests.weights import torch_files
from tests.weights.torch_files import Call

DTYPES = {
    "bfloat16": "bfloat16",
    "half": "float16",
    "double": "float64",
    "long": "int64",
    "bool": "bool",
}


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_reads_what_torch_wrote(layout):
    """Catches ignored strides or offsets, wrong element types, and storages in the wrong order."""
    values = np.load(GOLDENS / "t5_torch_values.npz")
    with TorchFile(GOLDENS / f"t5_torch_{layout}.bin") as file:
        assert set(file.shapes) == set(values)
        for name in values:
            array = file.read(name)
            assert file.shapes[name] == array.shape
            assert array.dtype == DTYPES.get(name, "float32")
            np.testing.assert_array_equal(array.astype(np.float32), values[name])


def test_stand_in_writer_is_read(tmp_path):
    """Catches hostile files below that are refused only because they are malformed."""
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}
    with TorchFile(torch_files.write(tmp_path / "x.bin", *torch_files.plain(arrays))) as file:
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.read(name), array)


def _evil(tmp_path: pathlib.Path) -> dict[str, object]:
    mark = str(tmp_path / "ran")
    good = torch_files.tensor("0", 2, 0, (2,), (1,))
    return {
        "os.system": {"w": Call("os", "system", f"touch {mark}")},
        "posix.system beside a tensor": {"a": good, "w": Call("posix", "system", f"touch {mark}")},
        "exec": {"w": Call("builtins", "exec", f"open({mark!r}, 'w')")},
        "getattr": {"w": Call("builtins", "getattr", good, "__class__")},
        "torch's own loader": {"w": Call("torch.storage", "_load_from_bytes", b"")},
        "a dotted name": {"w": Call("torch", "_utils._rebuild_tensor_v2.__globals__")},
        "numpy": {"w": Call("numpy.core.multiarray", "_reconstruct")},
        "inside a list": {"a": good, "w": [Call("subprocess", "call", ["touch", mark])]},
        "as a key": {Call("os", "system", f"touch {mark}"): good},
        "eval in a tensor's hooks": {
            "w": Call(
                "torch._utils",
                "_rebuild_tensor_v2",
                0,
                0,
                (),
                (),
                False,
                Call("builtins", "eval", "1"),
            )
        },
    }


@pytest.mark.parametrize("attack", _evil(pathlib.Path()))
def test_code_is_refused_and_never_runs(tmp_path, attack):
    """Catches a reader that resolves other globals: plain pickle.load creates the file."""
    path = torch_files.write(
        tmp_path / "x.bin", _evil(tmp_path)[attack], {"0": np.zeros(2, np.float32)}
    )
    with pytest.raises(ValueError, match="refused.*only plain tensors"):
        TorchFile(path)
    assert os.listdir(tmp_path) == ["x.bin"]


def test_the_attack_would_work(tmp_path):
    """Catches attacks above that are harmless, so that refusing them proves nothing."""
    import zipfile

    path = torch_files.write(tmp_path / "x.bin", _evil(tmp_path)["os.system"])
    pickle.loads(zipfile.ZipFile(path).read("archive/data.pkl"))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"w": 3},
        {"w": "text"},
        {5: torch_files.tensor("0", 2, 0, (2,), (1,))},
        {"w": {"deeper": 1}},
        b"junk",
        b"",
    ],
)
def test_anything_but_named_tensors_is_refused(tmp_path, content):
    """Catches a reader that returns whatever the pickle holds."""
    with pytest.raises(ValueError, match="refused"):
        TorchFile(torch_files.write(tmp_path / "x.bin", content, {"0": np.zeros(2, np.float32)}))


@pytest.mark.parametrize(
    "layout",
    [
        (8, 0, (3, 3), (3, 1)),
        (8, 1, (8,), (1,)),
        (8, -1, (2,), (1,)),
        (8, 4, (2, 2), (-1, 1)),
        (8, 0, (2, 2), (1,)),
        (-8, 0, (), ()),
    ],
)
def test_tensors_stay_inside_their_storage(tmp_path, layout):
    """Catches a strided view without checks: it would read memory outside the storage."""
    path = torch_files.write(
        tmp_path / "x.bin", {"w": torch_files.tensor("0", *layout)}, {"0": np.zeros(8, np.float32)}
    )
    with pytest.raises(ValueError, match="refused"):
        TorchFile(path)


def test_one_file_cannot_poison_the_next(tmp_path):
    """Catches stand-ins shared between files: the BUILD opcode may set attributes on them."""
    poison = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__K\x05sb."
    build = b"\x80\x02ctorch\nFloatStorage\nN}X\x05\x00\x00\x00dtypeK\x05s\x86b."
    for content in (poison, build):
        with pytest.raises(ValueError, match="refused"):
            TorchFile(torch_files.write(tmp_path / "x.bin", content))
        test_reads_what_torch_wrote("zip")


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_damage_is_an_error(tmp_path, layout):
    """Catches numbers from a cut file, or from a zip archive with one flipped bit."""
    raw = bytearray((GOLDENS / f"t5_torch_{layout}.bin").read_bytes())
    path = tmp_path / "x.bin"
    path.write_bytes(raw[:-40])
    with pytest.raises(ValueError, match="cut|refused|damaged"):
        TorchFile(path)
    if layout == "zip":
        at = raw.index(np.arange(24, dtype=np.float32).tobytes()) + 41
        raw[at] ^= 4
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="damaged"):
            TorchFile(path).read("view")


def test_storage_of_another_length_is_an_error(tmp_path):
    """Catches a storage that is shorter or longer than the pickle's length and read anyway."""
    path = torch_files.write(
        tmp_path / "x.bin",
        {"w": torch_files.tensor("0", 4, 0, (4,), (1,))},
        {"0": np.zeros(9, np.float32)},
    )
    with pytest.raises(ValueError, match="damaged"):
        TorchFile(path).read("w")
    path = torch_files.write(
        tmp_path / "y.bin",
        {"w": torch_files.tensor("1", 4, 0, (4,), (1,))},
        {"0": np.zeros(4, np.float32)},
    )
    with pytest.raises(ValueError, match="lacks storage"):
        TorchFile(path).read("w")


def test_missing_file(tmp_path):
    """Catches an absent file that is reported as damaged."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TorchFile(tmp_path / "x.bin")
