"""Writes hostile, damaged and plain files in the layout of torch.save, without torch."""

import collections
import io
import pathlib
import pickle
import types
import zipfile

import numpy as np


def _stub(module: str, name: str):
    """An object that pickles as the global module.name."""
    return types.FunctionType((lambda *args: None).__code__, {"__name__": module}, name)


class _Pickler(pickle._Pickler):  # the Python one: its save_global can be told not to import
    def persistent_id(self, obj):
        return obj if isinstance(obj, tuple) and obj[:1] == ("storage",) else None

    def save_global(self, obj, name=None):
        self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__name__}\n".encode())

    dispatch = pickle._Pickler.dispatch | {types.FunctionType: save_global, type: save_global}


class Call:
    """Pickles as the result of module.name(*args)."""

    def __init__(self, module: str, name: str, *args):
        self.reduced = (_stub(module, name), args)

    def __reduce__(self):
        return self.reduced


def tensor(key: str, length: int, offset: int, shape: tuple, strides: tuple) -> Call:
    """The pickle of a float tensor; its storage is `key`."""
    storage = ("storage", _stub("torch", "FloatStorage"), key, "cpu", length)
    return Call(
        "torch._utils",
        "_rebuild_tensor_v2",
        storage,
        offset,
        shape,
        strides,
        False,
        Call("collections", "OrderedDict"),
    )


def write(
    path: pathlib.Path, content, storages: dict[str, np.ndarray] | None = None
) -> pathlib.Path:
    """Writes a zip archive like torch.save's. content: any object, or the bytes of a pickle."""
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=2).dump(content)
        content = buffer.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        for key, values in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", values.tobytes())
    return path


def plain(names: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
    """(content, storages) of a dict of fp32 arrays."""
    content, storages = collections.OrderedDict(), {}
    for i, (name, array) in enumerate(names.items()):
        strides = tuple(s // 4 for s in array.strides)
        content[name] = tensor(str(i), array.size, 0, array.shape, strides)
        storages[str(i)] = array
    return dict(content), storages
