"""Fixtures that the tests of prepare_data share."""

import pytest

from imagen_jax.data.prepare import passes
from imagen_jax.data.sources.folder import FolderSource
from tests.data.synthetic_source import SETTINGS, FakeEncoder, write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("source") / "ramps")


@pytest.fixture(scope="session")
def whole(folder, tmp_path_factory):
    """The directory that one process prepares."""
    output = tmp_path_factory.mktemp("whole") / "data"
    passes.prepare(FolderSource(folder, 0.2), FakeEncoder(), output, passes.Settings(**SETTINGS))
    return output
