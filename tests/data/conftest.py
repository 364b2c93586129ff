"""Fixtures that the tests of prepare_data share."""

import pytest

from tests.data.synthetic_source import prepare, write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("source") / "ramps")


@pytest.fixture(scope="session")
def whole(folder, tmp_path_factory):
    """The directory that one process prepares."""
    output = tmp_path_factory.mktemp("whole") / "data"
    prepare(folder, output)
    return output
