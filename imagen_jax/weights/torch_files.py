"""Reads the tensors of a torch.save file without torch and without executing code of the file.

A torch.save file is a pickle (tensor names, and the layout of each tensor in its storage) and raw
storages. The unpickler accepts three kinds of globals (tensor rebuild, storage types, OrderedDict)
and refuses all others. Storages are read one at a time, on request. Both layouts are supported: the
zip archive (torch >= 1.6) and the older stream.
"""

import collections
import dataclasses
import os
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from imagen_jax.storage import check_content

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

STORAGE_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class StorageRef:
    """A storage that the pickle names: `length` elements under `key`."""

    key: str
    dtype: np.dtype
    length: int

    @property
    def nbytes(self) -> int:
        return self.length * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A tensor's layout in its storage; offset and strides count elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype


def _is_counts(value) -> bool:
    return isinstance(value, tuple) and all(isinstance(n, int) and n >= 0 for n in value)


def _rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None) -> TensorRef:
    """Stands in for torch's function of that name. Checks every argument: the file gives them."""
    if not isinstance(storage, StorageRef) or not isinstance(offset, int) or offset < 0:
        raise pickle.UnpicklingError("a tensor without a proper storage")
    if not _is_counts(shape) or not _is_counts(strides) or len(shape) != len(strides):
        raise pickle.UnpicklingError(f"a tensor of impossible shape {shape} and strides {strides}")
    if (
        0 not in shape
        and offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) >= storage.length
    ):
        raise pickle.UnpicklingError(
            f"a tensor of shape {shape} reaches beyond its storage of {storage.length} elements"
        )
    return TensorRef(storage, offset, shape, strides)


class _TensorUnpickler(pickle.Unpickler):
    """Resolves only the globals that a dict of tensors needs.

    Every file gets stand-ins of its own, so that no file can alter those of the next one.
    """

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        self._names = {("torch", name): type(name, (), {}) for name in STORAGE_DTYPES}
        self._names["torch._utils", "_rebuild_tensor_v2"] = lambda *args: _rebuild_tensor(*args)
        self._names["collections", "OrderedDict"] = type(
            "OrderedDict", (collections.OrderedDict,), {}
        )

    def find_class(self, module, name):
        try:
            return self._names[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}; only plain tensors are accepted"
            ) from None

    def persistent_load(self, pid):
        well_formed = (
            isinstance(pid, tuple)
            and len(pid) in (5, 6)
            and pid[0] == "storage"
            and pid[5:] in ((), (None,))
        )
        kinds = [kind for (module, _), kind in self._names.items() if module == "torch"]
        if not well_formed or not any(pid[1] is kind for kind in kinds):
            raise pickle.UnpicklingError("a storage of unknown form")
        _, kind, key, _, length = pid[:5]
        if not isinstance(key, str) or not isinstance(length, int) or length < 0:
            raise pickle.UnpicklingError("a storage of unknown form")
        return StorageRef(key, STORAGE_DTYPES[kind.__name__], length)


def _load_restricted(file, path: pathlib.Path):
    """Reads one pickle. Any exception of a hostile or damaged pickle becomes a ValueError."""
    try:
        return _TensorUnpickler(file).load()
    except Exception as error:  # a damaged pickle can raise nearly any exception
        raise ValueError(f"{path} is refused: {error}") from error


class TorchFile:
    """The tensors of a torch.save file. `tensors`: by name. `read`: loads one into memory."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist")
        check_content(self.path)
        self._zip = self._open_archive()
        content = self._read_archive_pickle() if self._zip else self._open_legacy()
        if not isinstance(content, dict):
            raise ValueError(
                f"{self.path} is refused: it holds a {type(content).__name__}, not a dict of"
                " tensors"
            )
        for name, value in content.items():
            if not isinstance(name, str) or not isinstance(value, TensorRef):
                raise ValueError(
                    f"{self.path} is refused: its entry {name!r} is not a named tensor"
                )
        self.tensors: dict[str, TensorRef] = dict(content)
        self.shapes = {name: ref.shape for name, ref in self.tensors.items()}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self._zip:
            self._zip.close()

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """Reads one tensor. Raises ValueError if its bytes are missing or fail their checksum."""
        tensor = self.tensors[name]
        raw = self._read_zip(tensor.storage) if self._zip else self._read_legacy(tensor.storage)
        flat = np.frombuffer(raw, tensor.dtype)[tensor.offset :]
        strides = tuple(s * tensor.dtype.itemsize for s in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    # The zip archive: <prefix>/data.pkl, <prefix>/byteorder, <prefix>/data/<key>.

    def _open_archive(self) -> zipfile.ZipFile | None:
        """The file as a zip archive, None if it has the older layout."""
        with open(self.path, "rb") as file:
            if file.read(2) != b"PK":
                return None
        try:
            return zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{self.path} is cut short or damaged ({error}): download it again"
            ) from error

    def _read_archive_pickle(self):
        pickles = [n for n in self._zip.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(f"{self.path} is refused: a zip archive, but not one of torch.save")
        self._prefix = pickles[0].removesuffix("data.pkl")
        byteorder = self._prefix + "byteorder"
        if byteorder in self._zip.namelist() and self._zip.read(byteorder).strip() != b"little":
            raise ValueError(f"{self.path} is refused: its tensors are big-endian")
        with self._zip.open(pickles[0]) as file:
            return _load_restricted(file, self.path)

    def _read_zip(self, storage: StorageRef) -> bytes:
        entry = f"{self._prefix}data/{storage.key}"
        try:
            if self._zip.getinfo(entry).file_size != storage.nbytes:
                raise ValueError(
                    f"{self.path} is damaged: storage {storage.key} does not have the"
                    f" {storage.nbytes} bytes that its tensors need; download it again"
                )
            return self._zip.read(entry)
        except KeyError:
            raise ValueError(
                f"{self.path} is damaged: it lacks storage {storage.key}; download it again"
            ) from None
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): download it again") from error

    # The stream: pickles of magic, protocol, system, content and storage keys; then for each key an
    # int64 length and the elements.

    def _open_legacy(self):
        with open(self.path, "rb") as file:
            header = [_load_restricted(file, self.path) for _ in range(3)]
            if (
                header[0] != LEGACY_MAGIC
                or header[1] != LEGACY_PROTOCOL
                or not isinstance(header[2], dict)
            ):
                raise ValueError(f"{self.path} is refused: not a file of torch.save")
            if header[2].get("little_endian") is not True:
                raise ValueError(f"{self.path} is refused: its tensors are big-endian")
            content = _load_restricted(file, self.path)
            keys = _load_restricted(file, self.path)
            refs = (
                {t.storage.key: t.storage for t in content.values() if isinstance(t, TensorRef)}
                if isinstance(content, dict)
                else {}
            )
            if not isinstance(keys, list) or set(map(str, keys)) != set(refs):
                raise ValueError(
                    f"{self.path} is refused: its list of storages does not match its tensors"
                )
            self._positions, position = {}, file.tell()
            for key in keys:
                self._positions[key] = position
                position += 8 + refs[key].nbytes
        if position > os.path.getsize(self.path):
            raise ValueError(
                f"{self.path} is cut short: {os.path.getsize(self.path)} of {position} bytes;"
                " download it again"
            )
        return content

    def _read_legacy(self, storage: StorageRef) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self._positions[storage.key])
            if struct.unpack("<q", file.read(8))[0] != storage.length:
                raise ValueError(
                    f"{self.path} is damaged: storage {storage.key} does not have the length that"
                    " its tensors need; download it again"
                )
            return file.read(storage.nbytes)
