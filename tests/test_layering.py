"""Who may import whom, read from the source: verbs -> joints -> leaves -> ground, one way, and what nobody imports at all."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEAF_FOLDERS = {"data", "diffusion", "distributed", "evals", "hardware", "models", "text"}
GROUND = {"storage"}  # needs nothing and serves all
LEAVES = LEAF_FOLDERS | {"cli", "run_log", "optim", "pictures", "resume", "sharding"}
JOINTS = {"block_costs", "cascade", "checkpoint", "encoder_plan", "grids", "measures", "plan_report", "prediction", "replicas", "report", "stage", "state", "step", "whole_step"}
VERBS = {"demo", "evaluate", "export", "plan", "prepare_data", "sample", "train"}
PACKAGE_MODULES = GROUND | LEAVES | JOINTS | VERBS


def imported(path):
    """Every dotted name that the file imports, at its head or inside a function; relative imports made absolute."""
    package = path.relative_to(ROOT).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            names |= {f"{base}{node.module or ''}.{alias.name}".replace("..", ".") for alias in node.names}
    return names


def sources(*folders):
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    return files


def unit(path):
    """The leaf, joint or verb that a file of the package belongs to: its folder, or its own name."""
    return path.relative_to(ROOT / "imagen_jax").parts[0].removesuffix(".py")


def units_imported(path):
    parts = [name.split(".") for name in imported(path)]
    return {p[1] for p in parts if p[0] == "imagen_jax" and p[1] in PACKAGE_MODULES}


def test_every_module_has_its_place():
    """Catches a new module that no rule covers: give it a place in GROUND, LEAVES, JOINTS or VERBS above."""
    assert {unit(path) for path in sources("imagen_jax")} - {"__init__"} <= PACKAGE_MODULES


@pytest.mark.parametrize("path", sources("imagen_jax"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    """Catches a leaf that imports another leaf, a joint or a verb; a joint that imports a verb; and a verb that imports a verb."""
    own, others = unit(path), units_imported(path) - {unit(path)}
    allowed = {True: GROUND, own in GROUND: set(), own in JOINTS | VERBS: GROUND | LEAVES | JOINTS}[True]
    assert others <= allowed, f"{own} may not import {sorted(others - allowed)}"


def test_joints_import_one_another_without_a_circle():
    """Catches two joints that need each other, which a lazy import would hide."""
    graph = {joint: units_imported(ROOT / "imagen_jax" / f"{joint}.py") & JOINTS - {joint} for joint in JOINTS}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == JOINTS


def test_nobody_imports_a_verb():
    """Catches a script that calls into a verb where it should start it as a user would, as a process."""
    for path in sources("launch", "tools", "configs"):
        assert not units_imported(path) & VERBS, path


@pytest.mark.parametrize("path", sources("configs"), ids=lambda path: str(path.relative_to(ROOT)))
def test_configs_import_nothing_of_the_package(path):
    """Catches a config that cannot be read on a login node: it may import the standard library, ml_collections and other configs."""
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots <= sys.stdlib_module_names | {"ml_collections", "configs"}


@pytest.mark.parametrize("path", sources("imagen_jax", "configs", "launch"), ids=lambda path: str(path.relative_to(ROOT)))
def test_neither_torch_nor_tensorflow(path):
    """Catches torch, torchvision or TensorFlow, lazily imported or not (tensorflow_datasets needs none of them)."""
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "torchvision", "tensorflow", "sentencepiece"}


def test_modules_with_parameters_live_in_models_text_and_evals():
    """Catches a layer outside the folders that hold networks, and a network that knows of meshes or time steps."""
    for path in sources("imagen_jax"):
        names = imported(path)
        holds_networks = unit(path) in {"models", "text", "evals"}
        assert holds_networks or not any(f"{name}.".startswith("flax.linen.") for name in names), path
        assert unit(path) not in {"models", "diffusion"} or not any(name.startswith("jax.sharding") for name in names), path


IMPORT_ALL = """
import importlib, socket, sys
from absl import flags

def refuse(*args, **kwargs):
    raise OSError("a module used the network while being imported")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
for name in sys.argv[1:]:
    known = set(flags.FLAGS)
    importlib.import_module(name)
    for flag in set(flags.FLAGS) - known:  # two verbs may have a flag of the same name
        delattr(flags.FLAGS, flag)
print(sorted({"torch", "torchvision", "tensorflow"} & set(sys.modules)))
"""


def test_importing_needs_no_network():
    """Catches a download at import (design bug 5), and torch or TensorFlow pulled in by something that is imported."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in sources("imagen_jax")]
    result = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
