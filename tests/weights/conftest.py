"""Checkpoints on disk that several test files read."""

import shutil
from pathlib import Path

import pytest

from imagen_jax.weights.checkpoint import Checkpoints
from imagen_jax.weights.retention import Retention
from tests.weights.states import save


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A directory with the checkpoints 10 and 20; to be copied before it is changed."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(Checkpoints(directory, Retention(2)), 10, 20)
    return directory


@pytest.fixture
def saved(two_steps, tmp_path):
    return Path(shutil.copytree(two_steps, tmp_path / "workdir" / "checkpoints"))
