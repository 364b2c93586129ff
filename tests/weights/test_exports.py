"""One-file exports: bfloat16, metadata, damaged and foreign files, interrupted writes."""

import hashlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from imagen_jax.weights import exports, leaves
from imagen_jax.weights.checkpoint import CheckpointError, load_params
from imagen_jax.weights.exports import export_params
from tests.test_storage import POINTER

# As `load_params` returns it of a checkpoint.
META = {
    "config": {"seed": 3, "model": {"width": 64, "levels": [1, 2]}},
    "encoder": {"name": "t5_tiny"},
    "which": "ema",
    "step": 20,
    "format_version": 1,
}


def make_params(scale: float = 1.0):
    """fp32 and bf16 leaves at several depths, with a dot in a key."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 8, 16)).astype(np.float32)
    norm = rng.normal(size=16).astype(ml_dtypes.bfloat16)
    tree = {"down_0": {"block_0": {"conv_1": {"kernel": kernel}}}, "text": {"norm.scale": norm}}
    return jax.tree.map(lambda x: x * np.asarray(scale, x.dtype), tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def test_export_is_bf16_and_carries_its_meta(tmp_path):
    """Catches other rounding than jax's, lost nesting or meta, exports that differ from each other,
    and the checkpoint's checksum in place of the file's.
    """
    params, path = make_params(), tmp_path / "exports" / "base.safetensors"
    export_params(params, META | {"sha256": "the checkpoint's", "unlogged": [1]}, path)
    back, back_meta = load_params(path)
    assert_equal(back, jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)), params))
    first = path.read_bytes()
    assert back_meta == META | {"sha256": hashlib.sha256(first).hexdigest()}
    assert len(first) < 1200 + 2 * sum(x.size for x in jax.tree.leaves(params))
    export_params(back, back_meta, path)
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == [path.name]


def test_sharded_params_and_keys_that_are_numbers(tmp_path):
    """Catches one device's shard exported alone, and a checksum over meta before JSON turned its
    keys into strings.
    """
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    split = jax.device_put(make_params(), NamedSharding(mesh, P(None)))
    kernel = split["down_0"]["block_0"]["conv_1"]["kernel"]
    sharding = NamedSharding(mesh, P(None, None, None, "fsdp"))
    split["down_0"]["block_0"]["conv_1"]["kernel"] = jax.device_put(kernel, sharding)
    path, whole = tmp_path / "base.safetensors", tmp_path / "whole.safetensors"
    export_params(split, {"sizes": {2: 1, 10: 1}}, path)
    export_params(make_params(), {"sizes": {2: 1, 10: 1}}, whole)
    assert path.read_bytes() == whole.read_bytes()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    meta = {"sizes": {"2": 1, "10": 1}, "format_version": 1, "which": "exported", "sha256": sha256}
    assert load_params(path)[1] == meta


def test_damaged_export_is_refused_in_one_line(tmp_path):
    """Catches an export without a checksum: safetensors alone reads a flipped bit as a weight."""
    path, rng = tmp_path / "base.safetensors", np.random.default_rng(0)
    export_params(make_params(), META, path)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    damages = [whole[:-1], whole[:100], b"", whole + b"\0"]
    named = [8 + whole[8:].index(part) for part in (b"t5_tiny", b"norm.scale", b"16]")]
    drawn = rng.integers(8 + header, len(whole), 20)
    for at in (3, 12, *named, header + 8, len(whole) - 1, *drawn):
        damages.append(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="base.safetensors is ") as caught:
            load_params(path)
        assert "\n" not in str(caught.value)


def test_foreign_files_and_integer_exports_are_refused(tmp_path):
    """Catches another program's weights accepted, and integers rounded to bfloat16."""
    from safetensors.numpy import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(3, np.float32)}, path)
    with pytest.raises(CheckpointError, match="not one written by imagen_jax"):
        load_params(path)
    path.write_text("no tensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_params(path)
    with pytest.raises(ValueError, match="leaf a/count is int32"):
        export_params({"a": {"count": np.int32(1)}}, {}, path)


def test_format_of_a_later_version_is_refused(tmp_path, monkeypatch):
    """Catches a newer layout that is read as the current one."""
    path = tmp_path / "later.safetensors"
    with monkeypatch.context() as later:
        later.setattr(leaves, "FORMAT_VERSION", 2)
        export_params(make_params(), META, path)
    with pytest.raises(CheckpointError, match="later.safetensors has format 2.* reads format 1"):
        load_params(path)


def test_interrupted_export_leaves_the_old_file(tmp_path, monkeypatch):
    """Catches an export written in place."""
    path = tmp_path / "base.safetensors"
    export_params(make_params(), META, path)
    before = path.read_bytes()

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        export_params(make_params(scale=2.0), META, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_that_of_the_export(tmp_path, monkeypatch):
    """Catches the traceback of safetensors, whose errors are no OSError."""

    def fails(*_, **__):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(exports, "save_file", fails)
    with pytest.raises(OSError, match="No space left on device: .*base.safetensors"):
        export_params(make_params(), META, tmp_path / "base.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_pointer_and_a_url_are_named(tmp_path):
    """Catches "header too large" for a Git LFS pointer, and a bucket that becomes a directory."""
    path = tmp_path / "base.safetensors"
    path.write_text(POINTER)
    with pytest.raises(CheckpointError, match="base.safetensors is a Git LFS pointer"):
        load_params(path)
    for url in ("s3://b/base.safetensors", Path("s3://b/base.safetensors")):
        with pytest.raises(ValueError, match="has the scheme s3://"):
            load_params(url)
        with pytest.raises(ValueError, match="has the scheme s3://"):
            export_params(make_params(), META, url)


@pytest.mark.parametrize(
    ("held", "which", "said"),
    [
        ("ema", "ema", ""),
        ("ema_1", "ema_1", ""),
        ("ema_1", "ema", "holds the weights 'ema_1', which are used as 'ema'"),
        (None, "ema_1", "does not record which weights it holds; they are used as 'ema_1'"),
    ],
)
def test_weights_that_an_export_holds_are_loaded(tmp_path, caplog, held, which, said):
    """Catches older files that no longer load, and weights of another kind without a warning."""
    path = tmp_path / "base.safetensors"
    meta = {name: value for name, value in META.items() if name != "which"}
    export_params(make_params(), meta | ({"which": held} if held else {}), path)
    for _ in range(2):
        assert load_params(path, which)[1]["which"] == (held or "exported")
    assert [record.getMessage() for record in caplog.records] == (
        [f"{path} {said}"] if said else []
    )


@pytest.mark.parametrize(
    ("held", "which"), [("ema", "ema_1"), ("ema", "params"), ("ema_2", "ema_1")]
)
def test_weights_that_an_export_does_not_hold_are_refused(tmp_path, held, which):
    """Catches --which ignored: the EMA evaluated in place of another track."""
    path = tmp_path / "base.safetensors"
    export_params(make_params(), META | {"which": held}, path)
    with pytest.raises(ValueError, match=f"holds the weights '{held}', not '{which}': choose"):
        load_params(path, which)


def test_weights_of_another_model_are_named():
    """Catches a wrong shape that only the network finds, after everything is loaded."""
    params = make_params()
    model = make_params()
    model["text"]["norm.scale"] = np.zeros(8)
    leaves.check_fit(params, make_params())
    with pytest.raises(
        ValueError, match=r"x: 1 weights do not fit the model, text/norm.scale first: it is \(16,\)"
    ):
        leaves.check_fit(params, model, "x: ")
    del model["text"]
    with pytest.raises(ValueError, match="text/norm.scale first: .* the model has none"):
        leaves.check_fit(params, model)
