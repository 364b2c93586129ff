"""Fixtures that the tests of prepare_data share."""

import pytest

from imagen_jax.encoders_in_turn import Encoders
from tests.data.synthetic_source import named, prepare, write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("source") / "ramps")


@pytest.fixture(scope="session")
def whole(folder, tmp_path_factory):
    """The directory that one process prepares."""
    output = tmp_path_factory.mktemp("whole") / "data"
    prepare(folder, output)
    return output


@pytest.fixture(scope="session")
def two(folder, tmp_path_factory):
    """The directory that one process prepares with two named encoders."""
    output = tmp_path_factory.mktemp("two") / "data"
    prepare(folder, output, named())
    return output


@pytest.fixture(scope="session")
def texts(folder, tmp_path_factory):
    """The directory that one process prepares without an encoder."""
    output = tmp_path_factory.mktemp("texts") / "data"
    prepare(folder, output, Encoders({}))
    return output
