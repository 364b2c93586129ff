"""What every test runs under: CPU with eight virtual devices, shapes and types of the package
checked at each call, no implicit rank promotion, no network.

IMAGEN_JAX_TEST_PLATFORM=cuda runs tests that need one device on a GPU instead.

Compiled programs, small ones too, are kept in .pytest_cache/jax (or $JAX_COMPILATION_CACHE_DIR): a
second run takes a third of the time. Everything is set through the environment before jax is
imported, so that processes started by a test get the same; the checker of types is for this process
alone.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
for path in (ROOT, ROOT / "tests"):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

from tests import xla  # noqa: E402

PLATFORM = os.environ.get("IMAGEN_JAX_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM if PLATFORM == "cpu" else f"{PLATFORM},cpu"
if PLATFORM == "cpu" and "xla_force_host_platform_device_count" not in os.environ.get(
    "XLA_FLAGS", ""
):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(devices=8)}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["HF_HUB_OFFLINE"] = "1"

import logging  # noqa: E402

import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jaxtyping.install_import_hook("imagen_jax", "typecheck.checked")


@pytest.fixture(autouse=True)
def logging_of_this_test():
    """Removes the handlers of a test, whose stream pytest closes at its end."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    root.handlers[:] = before


def pytest_collection_modifyitems(items):
    """The modules that start processes begin the list and its second half, where two workers begin:
    no worker is left with them at the end.
    """
    of = lambda name: [item for item in items if item.path.stem == name]
    first, second = of("test_train"), of("test_multihost") + of("test_commands") + of("test_cli")
    rest = [item for item in items if item not in first and item not in second]
    half = max(0, len(items) // 2 - len(first))
    items[:] = first + rest[:half] + second + rest[half:]
