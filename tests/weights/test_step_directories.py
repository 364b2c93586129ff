"""A step that is being read is not deleted, and a killed reader does not keep it."""

import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from imagen_jax import checksums
from imagen_jax.weights import checkpoint, step_directories
from imagen_jax.weights.checkpoint import CheckpointError, Checkpoints, load_params
from imagen_jax.weights.retention import Retention
from imagen_jax.weights.step_directories import EXPIRY_S, delete_old, marked
from tests import tiny
from tests.weights.states import make_state, save

READER = """
import pathlib, sys, time
from imagen_jax.weights.step_directories import marked
with marked(pathlib.Path(sys.argv[1])):
    print("reading", flush=True)
    time.sleep(600)
"""


def make_steps(directory, *steps):
    for step in steps:
        (directory / str(step)).mkdir(parents=True)
        checksums.seal(directory / str(step))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_step_that_another_process_reads_stays_until_it_is_killed(tmp_path):
    """Catches a trainer that deletes what is being read, one that waits for the reader, and a step
    that a killed reader keeps.
    """
    checkpoints = save(Checkpoints(tmp_path, Retention(1)), 10)
    command = [sys.executable, "-c", READER, tmp_path / "10"]
    env = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as reader:
        try:
            assert reader.stdout.readline() == b"reading\n"
            save(checkpoints, 20, 30)
            assert checkpoints.steps() == [10, 30]
        finally:
            reader.kill()
            reader.wait()
    save(checkpoints, 40)
    assert names(tmp_path) == ["40"]


@pytest.mark.parametrize("given", ["workdir", "step"])
def test_weights_are_read_whole_while_the_trainer_saves(tmp_path, monkeypatch, given):
    """Catches a mark that is set after the verification, or taken away before the arrays are read,
    and one that stays.
    """
    checkpoints = save(Checkpoints(tmp_path / "checkpoints", Retention(1)), 10)
    saves = iter((20, 30))

    def and_meanwhile(function):
        def wrapper(*args, **kwargs):
            save(checkpoints, next(saves))
            return function(*args, **kwargs)

        return wrapper

    module = step_directories if given == "workdir" else checkpoint
    monkeypatch.setattr(module, "find_damage", and_meanwhile(module.find_damage))
    monkeypatch.setattr(checkpoint, "_load", and_meanwhile(checkpoint._load))
    params, meta = load_params(tmp_path if given == "workdir" else checkpoints.directory / "10")
    monkeypatch.undo()
    kernel = params["down_0"]["block_0"]["conv_1"]["kernel"]
    expected = make_state(10).ema["down_0"]["block_0"]["conv_1"]["kernel"]
    np.testing.assert_array_equal(kernel, expected)
    assert meta["step"] == 10 and checkpoints.steps() == [10, 30]
    save(checkpoints, 40)
    assert names(checkpoints.directory) == ["40"]


def test_a_mark_of_another_machine_counts_until_it_is_no_longer_renewed(tmp_path):
    """Catches marks of machines that share no locks ignored, or counted for ever."""
    make_steps(tmp_path, 10, 20)
    mark = tmp_path / "10.reading.some-other-host.123.0a1b2c3d"
    mark.touch()
    delete_old(tmp_path, 20, (), Retention(1).to_delete)
    assert (tmp_path / "10").exists()
    long_ago = time.time() - EXPIRY_S - 60
    os.utime(mark, (long_ago, long_ago))
    delete_old(tmp_path, 20, (), Retention(1).to_delete)
    assert names(tmp_path) == ["20"]


def test_a_mark_is_renewed_and_taken_away(tmp_path):
    """Catches a long read whose mark expires, and a mark that outlives the read."""
    make_steps(tmp_path, 10)
    with marked(tmp_path / "10", renew_s=0.01):
        (mark,) = tmp_path.glob("10.reading.*")
        os.utime(mark, (0, 0))
        end = time.monotonic() + 30
        while mark.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert mark.stat().st_mtime > 0
    assert names(tmp_path) == ["10"]


def test_marks_and_deletions_do_not_overlap(tmp_path):
    """Catches a step that is deleted although its reader has found it after marking it."""
    lost, seen, ended = [], [], threading.Event()

    def read():
        while not ended.is_set():
            for directory in map(tmp_path.joinpath, map(str, step_directories.steps(tmp_path))):
                with marked(directory):
                    if checksums.is_sealed(directory):
                        seen.append(directory)
                        time.sleep(0.001)
                        lost.extend([] if checksums.is_sealed(directory) else [directory])

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for step in range(150):
        make_steps(tmp_path, step)
        delete_old(tmp_path, step, (), Retention(1).to_delete)
    ended.set()
    for reader in readers:
        reader.join()
    assert seen and not lost
    delete_old(tmp_path, 149, (), Retention(1).to_delete)
    assert names(tmp_path) == ["149"]


def test_a_directory_without_write_access_is_read_without_a_mark(tmp_path, monkeypatch):
    """Catches another user's run, or a read-only mount, that cannot be read."""
    save(Checkpoints(tmp_path / "checkpoints", Retention(1)), 10)

    def refuse(mark):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(step_directories, "_created", refuse)
    assert load_params(tmp_path)[1]["step"] == 10


def test_a_step_that_is_gone_is_an_error_in_one_line(tmp_path):
    """Catches a mark that makes a missing step look like another fault."""
    save(Checkpoints(tmp_path, Retention(2)), 10, 20)
    shutil.rmtree(tmp_path / "10")
    with pytest.raises(CheckpointError, match="10 holds no checkpoint"):
        load_params(tmp_path / "10")
