"""Checkpoints: exact restores on any mesh, refusal of anything damaged, kills at every moment of a
save, params-only loads.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from imagen_jax import storage
from imagen_jax.weights import checkpoint
from imagen_jax.weights.checkpoint import CheckpointError, Checkpoints, load_params

META = {
    "config": {"seed": 3, "model": {"width": 64, "levels": [1, 2]}},
    "encoder": {"name": "t5_tiny"},
    "manifest": "ab12",
}


@struct.dataclass
class State:
    """Like the trainer's: dicts, optax's named tuples with empty states inside, scalars."""

    step: object
    params: object
    ema: object
    opt_state: object
    bad: object


def make_state(step):
    """A state whose every leaf depends on `step`, with bf16, fp32, int32, bool and Adam's state
    with empty parts.
    """
    rng = np.random.default_rng(step)
    params = {
        "down_0": {
            "block_0": {
                "conv_1": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 8, 16)), jnp.float32)}
            }
        },
        "text": {"norm.scale": jnp.asarray(rng.normal(size=(16,)), jnp.bfloat16)},
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.constant_schedule(1e-3)),
        optax.masked(optax.scale(1.0), False),
    )
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), optimizer.init(params))
    ema = jax.tree.map(lambda x: x * 2, params)
    return State(
        jnp.int32(step), params, ema, opt_state, {"step": jnp.int32(-1), "any": jnp.bool_(step % 2)}
    )


def place(state, devices=1):
    """(state, abstract) with the last axis that divides sharded over `devices`."""
    mesh = jax.make_mesh(
        (devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def sharding(x):
        split = x.ndim > 0 and x.shape[-1] % devices == 0
        return NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp") if split else P())

    state = jax.tree.map(lambda x: jax.device_put(x, sharding(x)), state)
    return state, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, place(make_state(step))[0], META | {"at": step})
    checkpoints.wait()
    return checkpoints


def assert_restores(directory, step):
    """The checkpoint of `step` is found and is, bit for bit, what was saved."""
    state, abstract = place(make_state(step))
    checkpoints = Checkpoints(directory, keep=2)
    assert checkpoints.latest_good() == step
    restored, meta = checkpoints.restore(step, abstract)
    assert_equal(restored, state)
    assert meta == META | {"at": step, "step": step, "format_version": 1}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        assert (
            x.dtype == y.dtype
            and x.shape == y.shape
            and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        ), path


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A directory with the checkpoints 10 and 20; to be copied before it is changed."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(Checkpoints(directory, keep=2), 10, 20)
    return directory


@pytest.fixture
def saved(two_steps, tmp_path):
    return Path(shutil.copytree(two_steps, tmp_path / "workdir" / "checkpoints"))


def test_state_comes_back_exactly(two_steps):
    """Catches lost dtypes, optax tuples restored as lists or dicts, dropped empty states, meta not
    stored.
    """
    assert_restores(two_steps, 20)
    state, abstract = place(make_state(10))
    restored, meta = Checkpoints(two_steps, keep=1).restore(10, abstract)
    assert_equal(restored, state)
    assert meta["at"] == 10 and meta["config"] == META["config"]
    assert isinstance(restored, State) and isinstance(restored.opt_state, tuple)


@pytest.mark.parametrize("before,after", [(8, 1), (1, 8), (8, 2)])
def test_any_mesh_to_any_mesh(tmp_path, before, after):
    """Catches restoring the saved sharding instead of the asked one, and shards put together in the
    wrong order.
    """
    state, _ = place(make_state(4), before)
    expected, abstract = place(make_state(4), after)
    checkpoints = Checkpoints(tmp_path, keep=1)
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
    """Catches tracks counted from 0, the first average returned for every track, and a missing
    track that is not named.
    """
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
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, META)
    checkpoints.wait()
    found = {
        which: load_params(tmp_path, which)[0]["w"][0]
        for which in ("params", "ema", "ema_1", "ema_2")
    }
    assert found == {"params": 0.0, "ema": 1.0, "ema_1": 2.0, "ema_2": 3.0}
    with pytest.raises(ValueError, match="has no 'ema_3'; it holds ema, ema_1, ema_2, params"):
        load_params(tmp_path, "ema_3")


def test_save_holds_what_the_state_was_at_the_call(tmp_path):
    """Catches an async save that still reads buffers which the next step, having been given them,
    overwrites.
    """
    sharding = place(jnp.zeros(()))[1].sharding
    rows = [np.random.default_rng(i).normal(size=(256, 1024)).astype(np.float32) for i in range(16)]
    state = {f"w_{i}": jax.device_put(row, sharding) for i, row in enumerate(rows)}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    given, state = state, step(state)
    assert all(x.is_deleted() for x in given.values())
    checkpoints = Checkpoints(tmp_path, keep=1)
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
    """Catches a restore that pads, truncates, casts or invents leaves, or that fails without the
    path.
    """
    checkpoints = Checkpoints(two_steps, keep=2)
    _, abstract = place(make_state(20))
    scale = abstract.params["text"]["norm.scale"]

    def like(shape=(16,), dtype=jnp.bfloat16, sharding=scale.sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    cases = {
        r"leaf params/text/extra is missing from it": lambda t: t.update(extra=like()),
        r"it has a leaf params/text/norm\.scale that the state does not have": lambda t: t.pop(
            "norm.scale"
        ),
        r"norm\.scale is bfloat16\[16\] in it, but the state needs bfloat16\[8\]": lambda t: (
            t.update({"norm.scale": like((8,))})
        ),
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


def files_of(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


def flip_bit(path, rng):
    data = bytearray(path.read_bytes())
    if data:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


DAMAGE = {
    "deleted": lambda path, rng: path.unlink(),
    "emptied": lambda path, rng: path.write_bytes(b""),
    "cut": lambda path, rng: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path, rng: path.write_bytes(path.read_bytes() + b"\0"),
    "bit flipped": flip_bit,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_never_used(two_steps, saved, kind, caplog):
    """Catches any file of a checkpoint left out of the checks, and a rejection that does not say
    which step and file.
    """
    rng = np.random.default_rng(0)
    originals = files_of(two_steps / "20")
    names = [p.relative_to(two_steps / "20").as_posix() for p in originals]
    assert {"meta.json", "SHA256SUMS"} < set(names) and len(names) > 8
    for original, name in zip(originals, names):
        # The list of checksums is the file whose own damage is hardest to notice: try many places.
        for _ in range(200 if (kind, name) == ("bit flipped", "SHA256SUMS") else 1):
            target = saved / "20" / name
            DAMAGE[kind](target, rng)
            if target.exists() and target.read_bytes() == original.read_bytes():
                continue  # an empty file has nothing to lose
            caplog.clear()
            assert Checkpoints(saved, keep=2).latest_good() == 10, name
            (record,) = caplog.records
            assert record.levelno >= logging.WARNING and f"{saved}/20" in record.getMessage()
            assert name in record.getMessage() or name == "SHA256SUMS"
            shutil.copy2(original, target)
    assert Checkpoints(saved, keep=2).latest_good() == 20


def test_added_file_and_empty_directory_are_rejected(saved, caplog):
    """Catches a check that looks only at the files it lists, and one that a directory without any
    file passes.
    """
    (saved / "20" / "state" / "d" / "more").write_bytes(b"x")
    (saved / "30").mkdir()
    assert Checkpoints(saved, keep=2).latest_good() == 10
    assert "state/d/more is not listed in SHA256SUMS" in caplog.text


def test_flipped_bit_would_be_restored_silently_without_the_checks(saved, monkeypatch):
    """Catches a corruption test that proves nothing: without checksums, this damage reaches the
    arrays unnoticed.
    """
    path = max(files_of(saved / "20"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(checkpoint, "find_damage", lambda directory: None)
    state, abstract = place(make_state(20))
    try:
        restored, _ = Checkpoints(saved, keep=2).restore(20, abstract)
    except CheckpointError:
        return  # orbax noticed this one
    with pytest.raises(AssertionError):
        assert_equal(restored, state)


def test_restore_and_load_verify_a_named_step(saved):
    """Catches verification in `latest_good` only: a step asked for by number or path must be
    checked too.
    """
    flip_bit(saved / "20" / "meta.json", np.random.default_rng(0))
    with pytest.raises(
        CheckpointError, match="20 cannot be used: meta.json does not match its checksum"
    ):
        Checkpoints(saved, keep=2).restore(20, place(make_state(20))[1])
    with pytest.raises(CheckpointError, match="20 cannot be used: meta.json"):
        load_params(saved / "20")
    with pytest.raises(CheckpointError, match="15 cannot be used: .*No such file"):
        Checkpoints(saved, keep=2).restore(15, place(make_state(20))[1])
    assert load_params(saved)[1]["step"] == 10


def test_damage_after_the_save_is_seen_by_the_same_object(tmp_path):
    """Catches a writer that trusts its own checkpoint for ever and restores what the disk has made
    of it since.
    """
    checkpoints = save(Checkpoints(tmp_path, keep=2), 10, 20)
    flip_bit(tmp_path / "20" / "meta.json", np.random.default_rng(0))
    with pytest.raises(CheckpointError, match="meta.json"):
        checkpoints.restore(20, place(make_state(20))[1])
    assert checkpoints.latest_good() == 10


def test_all_damaged_is_an_error_and_none_is_none(saved, tmp_path):
    """Catches a run that silently starts from scratch because none of its checkpoints is
    readable.
    """
    for step in ("10", "20"):
        (saved / step / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact .20: .*SHA256SUMS"):
        Checkpoints(saved, keep=2).latest_good()
    assert Checkpoints(tmp_path / "nothing", keep=2).latest_good() is None
    with pytest.raises(CheckpointError, match="holds no checkpoint: give a workdir"):
        load_params(tmp_path / "nothing")


def test_keeps_the_newest_and_never_counts_a_damaged_one(saved):
    """Catches a policy that, with a damaged step in the list, deletes the last good one; or that
    deletes the damaged one.
    """
    flip_bit(saved / "20" / "meta.json", np.random.default_rng(0))
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.latest_good() == 10
    save(checkpoints, 15)
    assert checkpoints.steps() == [10, 15, 20]
    save(checkpoints, 17)
    assert checkpoints.steps() == [15, 17, 20]
    save(checkpoints, 20)
    assert checkpoints.steps() == [17, 20] and (saved / "20.damaged").is_dir()
    assert_restores(saved, 20)
    save(checkpoints, 30, 40)
    assert checkpoints.steps() == [30, 40] and (saved / "20.damaged").is_dir()
    flip_bit(saved / "40" / "meta.json", np.random.default_rng(0))
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.latest_good() == 30
    save(checkpoints, 45)
    assert checkpoints.steps() == [30, 40, 45]
    save(checkpoints, 50)
    assert checkpoints.steps() == [40, 45, 50]


def test_leftovers_are_ignored_then_removed(saved, caplog):
    """Catches orbax's own temporary names left for ever, a leftover taken for a step, and one that
    makes the next save fail.
    """
    leftovers = [
        "30.writing",
        "30.writing.orbax-checkpoint-tmp",
        "31.writing.orbax-checkpoint-tmp-17",
        "5.deleting",
    ]
    for name in leftovers:
        shutil.copytree(saved / "20", saved / name)
    checkpoints = Checkpoints(saved, keep=3)
    assert checkpoints.latest_good() == 20 and checkpoints.steps() == [10, 20]
    save(checkpoints, 30)
    assert sorted(p.name for p in saved.iterdir()) == ["10", "20", "30"]
    assert all(f"removing {saved / name}" in caplog.text for name in leftovers)
    assert_restores(saved, 30)


def test_damaged_ones_are_kept_apart(saved, caplog):
    """Catches the second damaged directory of a step replacing the first, or a save that fails
    because of it.
    """
    for n in (1, 2, 3):
        flip_bit(saved / "20" / "meta.json", np.random.default_rng(n))
        save(Checkpoints(saved, keep=2), 20)
    assert sorted(p.name for p in saved.iterdir()) == [
        "10",
        "20",
        "20.damaged",
        "20.damaged_2",
        "20.damaged_3",
    ]
    assert "kept as 20.damaged_3" in caplog.text


def test_step_deleted_while_it_is_read_is_no_fault(saved, monkeypatch, caplog):
    """Catches an evaluator that calls a checkpoint damaged, or gives up, because the trainer
    deleted it in that moment.
    """
    find_damage = checkpoint.find_damage

    def trainer_deletes(directory):
        shutil.rmtree(directory)
        return find_damage(directory)

    monkeypatch.setattr(
        checkpoint,
        "find_damage",
        lambda d: trainer_deletes(d) if d.name == "20" else find_damage(d),
    )
    assert Checkpoints(saved, keep=2).latest_good() == 10
    assert not caplog.records


def test_old_ones_stay_until_a_new_one_is_whole(tmp_path, monkeypatch):
    """Catches deleting first and saving afterwards, and a failed save that passes in silence."""
    checkpoints = save(Checkpoints(tmp_path, keep=1), 10)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "flush", full)
    with pytest.raises(CheckpointError, match="checkpoint 20 was not saved in .*No space left"):
        save(checkpoints, 20)
    monkeypatch.undo()
    assert_restores(tmp_path, 10)
    save(checkpoints, 20)
    assert checkpoints.steps() == [20] and [p.name for p in tmp_path.iterdir()] == ["20"]


def test_saving_twice(saved):
    """Catches a SIGTERM save failing because the step is on disk already, and a run that overwrites
    a good checkpoint of another.
    """
    checkpoints = Checkpoints(saved, keep=5)
    state, abstract = place(make_state(20))
    checkpoints.restore(20, abstract)
    checkpoints.save(20, state, META)
    save(checkpoints, 30)
    checkpoints.save(30, place(make_state(31))[0], META)
    checkpoints.wait()
    assert_restores(saved, 30)
    with pytest.raises(ValueError, match="20 already holds an intact checkpoint"):
        checkpoints.save(20, state, META)
    save(checkpoints, 32)
    assert checkpoints.steps() == [10, 20, 30, 32]


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    """Catches a save that hangs or fails in the background, long after the call: orbax waits five
    minutes on an empty array.
    """
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
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
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="gs://bucket/run is a URL"):
        Checkpoints("gs://bucket/run", keep=1)
    assert not (tmp_path / "c").exists()


def test_format_of_a_later_version_is_refused(saved):
    """Catches reading a layout this version does not know as if it did."""
    document = json.loads((saved / "20" / "meta.json").read_text())
    (saved / "20" / "meta.json").write_text(json.dumps(document | {"format_version": 2}))
    (saved / "20" / "SHA256SUMS").unlink()
    storage.seal(saved / "20")
    with pytest.raises(
        CheckpointError, match="has format 2; this version of imagen_jax reads format 1"
    ):
        load_params(saved / "20")


def test_checksums_are_those_of_sha256sum(two_steps):
    """Catches a checksum file that only we can check, or that leaves a file out."""
    done = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"],
        cwd=two_steps / "20",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(files_of(two_steps / "20")) - 1


def test_every_moment_of_our_part_of_a_save_is_safe(saved, monkeypatch):
    """Catches a wrong order of seal, rename and deletion: each system call is a place where the
    process may die.

    Before each of them the directory is copied, as a kill there would leave it; every copy must
    hold a good checkpoint and take the next save.
    """
    copies = []

    def copied(function):
        def wrapper(*args, **kwargs):
            copies.append(shutil.copytree(saved, saved.parent / f"killed_{len(copies)}"))
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(storage.os, "fsync", copied(os.fsync))
    monkeypatch.setattr(os, "rename", copied(os.rename))
    monkeypatch.setattr(os, "unlink", copied(os.unlink))
    monkeypatch.setattr(shutil, "rmtree", copied(shutil.rmtree))
    save(Checkpoints(saved, keep=1), 30)
    monkeypatch.undo()
    found = []
    for copy in copies:
        found.append(Checkpoints(copy, keep=1).latest_good())
        assert find_all_intact(copy), copy
    assert found == sorted(found) and {20, 30} == set(found) and len(copies) > 15
    assert Checkpoints(saved, keep=1).steps() == [30]
    last_before = copies[found.index(30) - 1]
    save(Checkpoints(last_before, keep=1), 30)
    assert sorted(p.name for p in last_before.iterdir()) == ["30"]
    assert_restores(last_before, 30)


def find_all_intact(directory):
    return all(storage.find_damage(p) is None for p in directory.iterdir() if p.name.isdigit())


# A program of its own, with few imports, so that it starts fast.
CHILD = """
import sys; sys.path.insert(0, sys.argv[2])
import jax, numpy as np
from imagen_jax.weights.checkpoint import Checkpoints

def state(step):
    mesh = jax.make_mesh((1,), ("d",), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    draw = lambda i: np.random.default_rng(i).normal(size=(512, 512)).astype(np.float32)
    rows = {f"w_{i}": draw(i) + np.float32(step) for i in range(24)}
    return jax.device_put({"ema": rows}, sharding)

checkpoints = Checkpoints(sys.argv[1], keep=2)
"""
SAVES_FOR_EVER = """
first = (checkpoints.latest_good() or 0) + 1
print("ready", flush=True)
for step in range(first, 1000):
    checkpoints.save(step, state(step), {})
"""
ENDS_INSIDE_A_SAVE = """
with checkpoints:
    checkpoints.save(20, state(20), {})
    raise KeyError("anything")
"""


def child(ending, directory):
    return [
        sys.executable,
        "-c",
        CHILD + ending,
        str(directory),
        str(Path(__file__).resolve().parents[2]),
    ]


def assert_child_state(directory, step):
    assert Checkpoints(directory, keep=2).latest_good() == step
    params, meta = load_params(directory)
    assert meta["step"] == step and len(params) == 24
    for i in range(24):
        assert np.array_equal(
            params[f"w_{i}"],
            np.random.default_rng(i).normal(size=(512, 512)).astype(np.float32) + np.float32(step),
        )


def test_sigkill_inside_saves(tmp_path, caplog):
    """Catches a half-written checkpoint taken for a whole one, and leftovers that stop the next run
    or stay for ever.
    """
    directory, newest, interrupted = tmp_path / "checkpoints", 0, 0
    for delay_s in (0.0, 0.03, 0.09):
        process = subprocess.Popen(
            child(SAVES_FOR_EVER, directory), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        checkpoints = Checkpoints(directory, keep=2)
        wait_for(lambda: checkpoints.steps()[-1:] > [newest + 1])
        wait_for(lambda: any(".writing" in p.name for p in directory.iterdir()))
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        interrupted += any(".writing" in p.name for p in directory.iterdir())
        caplog.clear()
        step = checkpoints.latest_good()
        assert step is not None and step > newest and not caplog.records
        assert_child_state(directory, step)
        newest = step
    assert interrupted >= 1
    save(checkpoints, newest + 1)
    assert sorted(p.name for p in directory.iterdir()) == [str(newest), str(newest + 1)]
    assert_restores(directory, newest + 1)


def test_program_that_ends_inside_a_save_finishes_it(tmp_path):
    """Catches the hang of an exit with a save under way (orbax waits for a thread pool that is shut
    down), and losing that save.
    """
    done = subprocess.run(
        child(ENDS_INSIDE_A_SAVE, tmp_path), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.strip().endswith("KeyError: 'anything'")
    assert_child_state(tmp_path, 20)


def wait_for(condition, timeout_s=60):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if condition():
                return
        except FileNotFoundError:
            pass
        time.sleep(0.002)
    raise TimeoutError


@pytest.mark.parametrize("where", ["workdir", "workdir/checkpoints", "workdir/checkpoints/20"])
@pytest.mark.parametrize("which", ["ema", "params"])
def test_load_params(saved, where, which):
    """Catches EMA and parameters mixed up, the oldest step taken, arrays left on a device, bf16
    lost on the way.
    """
    params, meta = load_params(saved.parent.parent / where, which=which)
    want = jax.tree.map(np.asarray, getattr(make_state(20), which))
    assert_equal(params, want)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(params))
    assert params["text"]["norm.scale"].dtype == ml_dtypes.bfloat16
    sums = saved.parent.parent / "workdir" / "checkpoints" / "20" / "SHA256SUMS"
    source = {"which": which, "sha256": hashlib.sha256(sums.read_bytes()).hexdigest()}
    assert meta == META | {"at": 20, "step": 20, "format_version": 1} | source


def test_load_params_names_what_there_is(saved):
    """Catches an empty tree returned for a subtree that is not there, and a part of the state that
    is no weights read as such.
    """
    with pytest.raises(ValueError, match="has no 'ema_1'; it holds ema, params"):
        load_params(saved, which="ema_1")
    for part in ("weights", "opt_state", "ema_tracks"):
        with pytest.raises(
            ValueError, match=f"weights '{part}' are unknown: choose ema, params, or ema_1"
        ):
            load_params(saved, which=part)
