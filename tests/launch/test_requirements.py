"""The third-party imports of every folder are declared in setup.py."""

import ast
import importlib.metadata
import re
import sys

import pytest

from tests import tiny
from tests.test_layering import imported, sources

OWN = {"configs", "imagen_jax", "launch", "tests", "tools"}
# Imports that no extra covers.
UNDECLARED = {
    "tools/accelerator/side_by_side.py": {"diffusers"},  # optional
    "tools/launch_schemas.py": {"kubeflow_trainer_api", "sky"},  # its docstring installs them
}
# Modules that are imported only if their extra is installed: {path: its distributions}.
EXTRA = {
    "imagen_jax/data/prepare/beam_ingest.py": {"apache-beam"},
    "imagen_jax/data/prepare/beam_pipeline.py": {"apache-beam"},
    "imagen_jax/object_storage.py": {"gcsfs"},
    "imagen_jax/wandb_log.py": {"wandb"},
}
SETUP = ast.parse((tiny.ROOT / "setup.py").read_text())
DISTRIBUTIONS = importlib.metadata.packages_distributions()


def declared(keyword: str) -> set[str]:
    """Names of the distributions that an argument of setup() lists."""
    (value,) = (node.value for node in ast.walk(SETUP) if getattr(node, "arg", "") == keyword)
    content = ast.literal_eval(value)
    lists = content.values() if isinstance(content, dict) else [content]
    return {plain(re.split(r"[\[<>=!~ ]", text)[0]) for names in lists for text in names}


def plain(name: str) -> str:
    """A distribution's name in its normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def third_party(path) -> set[str]:
    """Top-level modules that a file imports from other distributions."""
    siblings = {other.stem for other in path.parent.glob("*.py")}  # scripts import their folder
    names = {name.split(".")[0] for name in imported(path)}
    return names - OWN - siblings - sys.stdlib_module_names - {"__future__"}


def undeclared(path, names: set[str]) -> set[str]:
    """Third-party imports of a file that `names`, of distributions, does not cover."""
    return {
        module
        for module in third_party(path)
        if not {plain(name) for name in DISTRIBUTIONS.get(module, [module])} & names
    }


@pytest.mark.parametrize("folder", ["configs", "imagen_jax", "launch"])
def test_imports_are_requirements(folder):
    """Catches a module that works only because another package happens to install its imports."""
    required = declared("install_requires")
    assert "pyyaml" in required and "jax" in required
    assert set().union(*EXTRA.values()) <= declared("extras_require")
    missing = {}
    for path in sources(folder):
        name = path.relative_to(tiny.ROOT).as_posix()
        missing[name] = undeclared(path, required | EXTRA.get(name, set()))
    assert not {path: names for path, names in missing.items() if names}


@pytest.mark.parametrize("folder", ["tests", "tools"])
def test_imports_are_requirements_or_extras(folder):
    """Catches a tool or test whose requirement is in no extra."""
    known = declared("install_requires") | declared("extras_require")
    for path in sources(folder):
        name = path.relative_to(tiny.ROOT).as_posix()
        assert undeclared(path, known) == UNDECLARED.get(name, set()), name
