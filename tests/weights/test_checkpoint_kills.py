"""Checkpoints: a kill at every moment of a save, leftovers of killed processes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from imagen_jax import checksums, storage
from imagen_jax.weights import step_directories
from imagen_jax.weights.checkpoint import Checkpoints, load_params
from imagen_jax.weights.retention import Retention
from tests.weights.states import assert_restores, save


def test_leftovers_are_ignored_then_removed(saved, caplog):
    """Catches temporary names of orbax that stay, a leftover read as a step or blocking a save."""
    leftovers = [
        "30.writing",
        "30.writing.orbax-checkpoint-tmp",
        "31.writing.orbax-checkpoint-tmp-17",
        "5.deleting",
    ]
    for name in leftovers:
        shutil.copytree(saved / "20", saved / name)
    checkpoints = Checkpoints(saved, Retention(3))
    assert checkpoints.latest_good() == 20 and checkpoints.steps() == [10, 20]
    save(checkpoints, 30)
    assert sorted(p.name for p in saved.iterdir()) == ["10", "20", "30"]
    assert all(f"removing {saved / name}" in caplog.text for name in leftovers)
    assert_restores(saved, 30)


def test_every_moment_of_our_part_of_a_save_is_safe(saved, monkeypatch):
    """Catches a wrong order of mark, seal and deletion, at each system call of a save.

    The directory is copied before each call, as a kill there would leave it. Every copy must hold
    an intact checkpoint and accept the next save.
    """
    copies = []

    def copied(function):
        def wrapper(*args, **kwargs):
            copies.append(shutil.copytree(saved, saved.parent / f"killed_{len(copies)}"))
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(storage.os, "fsync", copied(os.fsync))
    monkeypatch.setattr(os, "replace", copied(os.replace))
    monkeypatch.setattr(os, "unlink", copied(os.unlink))
    monkeypatch.setattr(shutil, "rmtree", copied(shutil.rmtree))
    save(Checkpoints(saved, Retention(1)), 30)
    monkeypatch.undo()
    result = []
    for copy in copies:
        result.append(Checkpoints(copy, Retention(1)).latest_good())
        assert find_all_intact(copy), copy
    assert result == sorted(result) and {20, 30} == set(result) and len(copies) > 15
    assert Checkpoints(saved, Retention(1)).steps() == [30]
    last_before = copies[result.index(30) - 1]
    save(Checkpoints(last_before, Retention(1)), 30)
    assert sorted(p.name for p in last_before.iterdir()) == ["30"]
    assert_restores(last_before, 30)


def find_all_intact(directory):
    steps = step_directories.steps(directory)
    return all(checksums.find_damage(directory / str(step)) is None for step in steps)


# A program of its own, with few imports, so that it starts fast.
CHILD = """
import sys; sys.path.insert(0, sys.argv[2])
import jax, numpy as np
from imagen_jax.weights.checkpoint import Checkpoints
from imagen_jax.weights.retention import Retention

def row(i, step):
    values = np.random.default_rng(i).normal(size=(512, 512)).astype(np.float32)
    return values + np.float32(step)

def state(step):
    mesh = jax.make_mesh((1,), ("d",), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_put({"ema": {f"w_{i}": row(i, step) for i in range(24)}}, sharding)

checkpoints = Checkpoints(sys.argv[1], Retention(2))
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
    assert Checkpoints(directory, Retention(2)).latest_good() == step
    params, meta = load_params(directory)
    assert meta["step"] == step and len(params) == 24
    for i in range(24):
        assert np.array_equal(
            params[f"w_{i}"],
            np.random.default_rng(i).normal(size=(512, 512)).astype(np.float32) + np.float32(step),
        )


@pytest.mark.slow
def test_sigkill_inside_saves(tmp_path, caplog):
    """Catches a partial checkpoint read as complete, and leftovers that stay or block the next
    run.
    """
    directory, newest, interrupted = tmp_path / "checkpoints", 0, 0
    for delay_s in (0.0, 0.03, 0.09):
        process = subprocess.Popen(
            child(SAVES_FOR_EVER, directory), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        checkpoints = Checkpoints(directory, Retention(2))
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
    """Catches an exit during a save that hangs (orbax waits for a pool that is shut down) or loses
    the save.
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
