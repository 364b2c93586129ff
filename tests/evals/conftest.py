"""The toy stage on marked rows, whose errors and samples are computed once for all tests."""

import pytest

from tests.evals import toys


@pytest.fixture(scope="session")
def toy():
    return toys.evaluation()
