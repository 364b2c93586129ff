"""Checkpoints: exact restores on any mesh, leaves that do not fit, saving twice, load_params."""

import errno
import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from imagen_jax import checksums
from imagen_jax.weights.checkpoint import CheckpointError, Checkpoints, load_params
from imagen_jax.weights.retention import Retention
from tests.weights.states import META, State, assert_equal, assert_restores, make_state, save, shard


def test_state_comes_back_exactly(two_steps):
    """Catches lost dtypes, optax tuples restored as lists, dropped empty states, lost meta."""
    assert_restores(two_steps, 20)
    state, abstract = shard(make_state(10))
    restored, meta = Checkpoints(two_steps, Retention(1)).restore(10, abstract)
    assert_equal(restored, state)
    assert meta["at"] == 10 and meta["config"] == META["config"]
    assert isinstance(restored, State) and isinstance(restored.opt_state, tuple)


@pytest.mark.parametrize("before,after", [(8, 1), (1, 8), (8, 2)])
def test_any_mesh_to_any_mesh(tmp_path, before, after):
    """Catches a restore with the saved sharding, and shards joined in the wrong order."""
    state, _ = shard(make_state(4), before)
    expected, abstract = shard(make_state(4), after)
    checkpoints = Checkpoints(tmp_path, Retention(1))
    checkpoints.save(4, state, META)
    checkpoints.wait()
    restored, _ = checkpoints.restore(4, abstract)
    assert_equal(restored, expected)
    for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(expected)):
        assert leaf.sharding == want.sharding
    kernel = restored.ema["down_0"]["block_0"]["conv_1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 3, 8, 16 // after)
    assert_equal(load_params(tmp_path)[0], jax.tree.map(np.asarray, state.ema))


def test_each_ema_track_is_read_by_its_number(tmp_path):
    """Catches tracks counted from 0, the first track returned for all, a missing track unnamed."""
    arrays = {
        name: jnp.full((3,), value)
        for name, value in (("params", 0.0), ("ema", 1.0), ("first", 2.0), ("second", 3.0))
    }
    tree = lambda name: {"w": arrays[name]}
    state = {
        "params": tree("params"),
        "ema": tree("ema"),
        "ema_tracks": (tree("first"), tree("second")),
    }
    checkpoints = Checkpoints(tmp_path, Retention(1))
    checkpoints.save(1, state, META)
    checkpoints.wait()
    result = {
        which: load_params(tmp_path, which)[0]["w"][0]
        for which in ("params", "ema", "ema_1", "ema_2")
    }
    assert result == {"params": 0.0, "ema": 1.0, "ema_1": 2.0, "ema_2": 3.0}
    with pytest.raises(ValueError, match="has no 'ema_3'; it holds ema, ema_1, ema_2, params"):
        load_params(tmp_path, "ema_3")


def test_save_holds_what_the_state_was_at_the_call(tmp_path):
    """Catches an async save that reads buffers which the next step overwrites by donation."""
    sharding = shard(jnp.zeros(()))[1].sharding
    rows = [np.random.default_rng(i).normal(size=(256, 1024)).astype(np.float32) for i in range(16)]
    state = {f"w_{i}": jax.device_put(row, sharding) for i, row in enumerate(rows)}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    given, state = state, step(state)
    assert all(x.is_deleted() for x in given.values())
    checkpoints = Checkpoints(tmp_path, Retention(1))
    with jax.transfer_guard("disallow"):  # as in the training loop
        checkpoints.save(1, state, {})
        for _ in range(6):
            state = step(state)
        checkpoints.wait()
    restored, _ = checkpoints.restore(
        1, {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for k, x in state.items()}
    )
    assert all(
        np.array_equal(restored[f"w_{i}"], row + np.float32(1)) for i, row in enumerate(rows)
    )


def changed(abstract, change):
    params = {k: dict(v) for k, v in abstract.params.items()}
    change(params["text"])
    return abstract.replace(params=params)


def test_leaves_that_do_not_fit_are_named(two_steps):
    """Catches a restore that pads, cuts, casts or invents leaves, or an error without the path."""
    checkpoints = Checkpoints(two_steps, Retention(2))
    _, abstract = shard(make_state(20))
    scale = abstract.params["text"]["norm.scale"]

    def like(shape=(16,), dtype=jnp.bfloat16, sharding=scale.sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    scale_is = r"leaf params/text/norm\.scale is bfloat16\[16\] in the checkpoint, but the state "
    cases = {
        r"leaf params/text/extra is missing from the checkpoint": lambda t: t.update(extra=like()),
        r"the checkpoint has an extra leaf params/text/norm\.scale": lambda t: t.pop("norm.scale"),
        scale_is + r"needs bfloat16\[8\]": lambda t: t.update({"norm.scale": like((8,))}),
        r"needs bfloat16\[1, 16\]": lambda t: t.update({"norm.scale": like((1, 16))}),
        r"needs float32\[16\]": lambda t: t.update({"norm.scale": like(dtype=jnp.float32)}),
        r"leaf params/text/norm\.scale of the abstract state has no sharding": lambda t: t.update(
            {"norm.scale": like(sharding=None)}
        ),
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            checkpoints.restore(20, changed(abstract, change))
        assert "\n" not in str(caught.value) and not isinstance(caught.value, CheckpointError)
    with pytest.raises(ValueError, match=r"and 1 more such fault"):
        checkpoints.restore(20, changed(abstract, lambda t: t.update(a=like(), b=like())))


def test_saving_twice(saved):
    """Catches a SIGTERM save that fails because the step exists, and an overwritten checkpoint of
    another run.
    """
    checkpoints = Checkpoints(saved, Retention(5))
    state, abstract = shard(make_state(20))
    checkpoints.restore(20, abstract)
    checkpoints.save(20, state, META)
    save(checkpoints, 30)
    checkpoints.save(30, shard(make_state(31))[0], META)
    checkpoints.wait()
    assert_restores(saved, 30)
    with pytest.raises(ValueError, match="20 already holds an intact checkpoint"):
        checkpoints.save(20, state, META)
    save(checkpoints, 32)
    assert checkpoints.steps() == [10, 20, 30, 32]


def test_a_file_system_that_is_away_costs_one_save(tmp_path, monkeypatch, caplog):
    """Catches a training that ends because a bucket did not answer a listing before a save."""
    checkpoints = Checkpoints(tmp_path / "c", Retention(2))
    save(checkpoints, 10)

    def away():
        raise OSError(errno.EIO, "injected, 503")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "steps", away)
        checkpoints.save(20, shard(make_state(20))[0], META)
    with pytest.raises(CheckpointError, match="checkpoint 20 was not saved in .*: injected, 503"):
        checkpoints.wait()
    save(checkpoints, 30)
    assert checkpoints.steps() == [10, 30]


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    """Catches a save that fails in the background: orbax waits 5 minutes for an empty array."""
    checkpoints = Checkpoints(tmp_path / "c", Retention(1))
    x = jnp.zeros(2)
    cases = {
        "leaf a/b has shape .0, 3.": ({"a": {"b": jnp.zeros((0, 3))}}, {}),
        "leaf a is a float": ({"a": 1.0}, {}),
        "a/b/c is ambiguous": ({"a/b": {"c": x}}, {}),
        "meta cannot be written as JSON": ({"a": x}, {"config": object()}),
    }
    for message, (state, meta) in cases.items():
        with pytest.raises(ValueError, match=message):
            checkpoints.save(1, state, meta)
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, Retention(0))
    with pytest.raises(ValueError, match="s3://bucket/run has the scheme s3://"):
        Checkpoints("s3://bucket/run", Retention(1))
    assert not (tmp_path / "c").exists()


def test_format_of_a_later_version_is_refused(saved):
    """Catches a newer layout that is read as the current one."""
    document = json.loads((saved / "20" / "meta.json").read_text())
    (saved / "20" / "meta.json").write_text(json.dumps(document | {"format_version": 2}))
    (saved / "20" / "SHA256SUMS").unlink()
    checksums.seal(saved / "20")
    with pytest.raises(
        CheckpointError, match="has format 2; this version of imagen_jax reads format 1"
    ):
        load_params(saved / "20")


@pytest.mark.parametrize("where", ["workdir", "workdir/checkpoints", "workdir/checkpoints/20"])
@pytest.mark.parametrize("which", ["ema", "params"])
def test_load_params(saved, where, which):
    """Catches EMA and parameters swapped, the oldest step, arrays on a device, lost bf16."""
    params, meta = load_params(saved.parent.parent / where, which=which)
    want = jax.tree.map(np.asarray, getattr(make_state(20), which))
    assert_equal(params, want)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(params))
    assert params["text"]["norm.scale"].dtype == ml_dtypes.bfloat16
    sums = saved.parent.parent / "workdir" / "checkpoints" / "20" / "SHA256SUMS"
    source = {"which": which, "sha256": hashlib.sha256(sums.read_bytes()).hexdigest()}
    assert meta == META | {"at": 20, "step": 20, "format_version": 1} | source


def test_load_params_names_what_there_is(saved):
    """Catches an empty tree for an absent subtree, and optimizer state read as weights."""
    with pytest.raises(ValueError, match="has no 'ema_1'; it holds ema, params"):
        load_params(saved, which="ema_1")
    for part in ("weights", "opt_state", "ema_tracks"):
        with pytest.raises(
            ValueError, match=f"weights '{part}' are unknown: choose ema, params, or ema_1"
        ):
            load_params(saved, which=part)


def test_a_misspelt_kind_of_weights_is_refused_for_files_too(tmp_path):
    """Catches a misspelt name that is ignored because an exported file holds one tree."""
    (tmp_path / "x.safetensors").write_bytes(b"not read")
    with pytest.raises(ValueError, match="weights 'emma' are unknown"):
        load_params(tmp_path / "x.safetensors", which="emma")
