"""The import rules, read from the source.

Commands import planning, planning imports training and evals, and so on down to the modules that
import nothing of the package. Some modules must not be imported by anything.
"""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMANDS = {"demo", "evaluate", "export", "plan", "prepare_data", "rate", "sample", "train"}
# From the lowest layer up. A unit (a folder, or a module at the root) may import units of lower
# layers, and of its own layer if there is no circle.
LAYERS = (
    {
        "object_storage",
        "caption_text",
        "checksums",
        "config_options",
        "data_fields",
        "encoder_identity",
        "encoders_in_turn",
        "exit_codes",
        "field",
        "goodput",
        "stage_sizes",
        "interrupts",
        "line_logs",
        "locks",
        "many_files",
        "run_fields",
        "network_fields",
        "output_paths",
        "run_log",
        "schema",
        "storage",
        "text_inputs",
        "wandb_log",
    },
    {"distributed"},
    {
        "cli",
        "data",
        "diffusion",
        "hardware",
        "models",
        "picture_set",
        "pictures",
        "set_reservations",
        "set_rows",
        "text",
    },
    {"row_batches", "sharded_attention", "sharding", "weights"},
    {"cascade", "drawing", "drawn_sets", "online_text", "sampling_parameters", "stage"},
    {"evals", "training"},
    {"planning"},
    COMMANDS,
)
LAYER = {unit: i for i, units in enumerate(LAYERS) for unit in units}
# None of these may import another unit of its layer.
APART = {"data", "diffusion", "hardware", "models", "text", *COMMANDS}


def imported(path):
    """The absolute dotted names that a file imports, at the top or inside a function."""
    package = path.relative_to(ROOT).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            names |= {
                f"{base}{node.module or ''}.{alias.name}".replace("..", ".") for alias in node.names
            }
    return names


def sources(*folders):
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    return files


def unit(path):
    """The folder or root module of the package that a file belongs to."""
    return path.relative_to(ROOT / "imagen_jax").parts[0].removesuffix(".py")


def units_imported(path):
    parts = [name.split(".") for name in imported(path)]
    return {p[1] for p in parts if p[0] == "imagen_jax" and len(p) > 1 and p[1] in LAYER}


def is_circular(graph):
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return " -> ".join(error.args[1])
    return ""


def test_every_module_has_its_place():
    """Catches a new module or folder without a rule; add it to LAYERS above."""
    assert {unit(path) for path in sources("imagen_jax")} - {"__init__"} == LAYER.keys()


@pytest.mark.parametrize(
    "path", sources("imagen_jax"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_go_one_way(path):
    """Catches an import from a higher layer, a folder that imports another one of its layer, and a
    command that imports a command.
    """
    own = unit(path)
    others = units_imported(path) - {own}
    if own == "__init__":
        return
    upwards = {
        other
        for other in others
        if LAYER[other] > LAYER[own] or (LAYER[other] == LAYER[own] and {own, other} <= APART)
    }
    assert not upwards, f"{own} may not import {sorted(upwards)}"


def test_units_form_no_circle():
    """Catches circular imports between folders, also through a third folder or by a lazy import."""
    graph = {}
    for path in sources("imagen_jax"):
        graph.setdefault(unit(path), set()).update(units_imported(path) - {unit(path)})
    assert not is_circular(graph)


@pytest.mark.parametrize(
    "folder",
    sorted({path.parent for path in sources("imagen_jax")}),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_modules_of_a_folder_form_no_circle(folder):
    """Catches two modules of a folder that import each other, which a lazy import would hide."""
    graph = {}
    for path in folder.glob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name] = {
            other
            for other in imported(path)
            for other in (other, other.rpartition(".")[0])
            if (ROOT / f"{other.replace('.', '/')}.py").exists()
        }
    assert not is_circular(graph)


def test_each_folder_says_what_lives_there():
    """Catches a folder whose docstring does not say what it must not know."""
    for path in sources("imagen_jax"):
        if path.name == "__init__.py" and path.parent.name != "imagen_jax":
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert len(said.splitlines()) > 2 and "must not" in " ".join(said.split()), path


def test_nobody_imports_a_command():
    """Catches a script that imports a command; it must run it as a process, as a user would."""
    for path in sources("launch", "tools", "configs"):
        assert not units_imported(path) & COMMANDS, path


@pytest.mark.parametrize("path", sources("configs"), ids=lambda path: str(path.relative_to(ROOT)))
def test_configs_import_nothing_of_the_package(path):
    """Catches a config that cannot be read on a login node. Configs may import the standard
    library, ml_collections and other configs.
    """
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots <= sys.stdlib_module_names | {"ml_collections", "configs"}


@pytest.mark.parametrize(
    "path", sources("imagen_jax", "configs", "launch"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_neither_torch_nor_tensorflow(path):
    """Catches an import of torch, torchvision, TensorFlow or sentencepiece, lazy or not."""
    assert not {name.split(".")[0] for name in imported(path)} & {
        "torch",
        "torchvision",
        "tensorflow",
        "sentencepiece",
    }


def test_modules_with_parameters_live_in_few_folders():
    """Catches a layer outside the folders of networks, and a network or diffusion module that uses
    meshes.
    """
    for path in sources("imagen_jax"):
        names = imported(path)
        # Planning inspects networks.
        holds_networks = unit(path) in {"models", "text", "evals", "planning"}
        assert holds_networks or not any(f"{name}.".startswith("flax.linen.") for name in names), (
            path
        )
        assert unit(path) not in {"models", "diffusion"} or not any(
            name.startswith("jax.sharding") for name in names
        ), path


def test_shardings_are_made_in_one_module():
    """Catches a sharding made outside sharding.py, and a mesh axis named by a network, by the
    diffusion process or by a text encoder. Planning looks into compiled programs and is exempt.
    """
    for path in sources("imagen_jax"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        made = {getattr(node, "id", getattr(node, "attr", "")) for node in nodes}
        assert unit(path) in {"sharding", "planning"} or "NamedSharding" not in made, path
        strings = {node.value for node in nodes if isinstance(node, ast.Constant)}
        apart = {"models", "diffusion", "text"}
        assert unit(path) not in apart or not strings & {"data", "fsdp", "spatial"}, path


@pytest.mark.parametrize("folder", ["imagen_jax", "launch", "configs", "tools"])
def test_files_are_short(folder):
    """Catches a file that grows beyond the 450 lines of CONTRIBUTING.md."""
    long = {path: path.read_text().count("\n") for path in sources(folder)}
    assert not {path for path, lines in long.items() if lines > 450}


IMPORT_ALL = """
import importlib, socket, sys
from absl import flags

def refuse(*args, **kwargs):
    raise OSError("a module used the network while being imported")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
for name in sys.argv[1:]:
    before = set(flags.FLAGS)
    importlib.import_module(name)
    for flag in set(flags.FLAGS) - before:  # two commands may have a flag of the same name
        delattr(flags.FLAGS, flag)
print(sorted({"torch", "torchvision", "tensorflow"} & set(sys.modules)))
"""


def test_importing_needs_no_network():
    """Catches a download at import, and torch or TensorFlow imported indirectly."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sources("imagen_jax")
        if "apache_beam" not in {name.partition(".")[0] for name in imported(path)}  # an extra
    ]
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_rating_needs_neither_networks_nor_training():
    """Catches a rating page that imports jax: whoever rates pictures may not have it."""
    stems = [path.stem for path in sources("imagen_jax/evals/rating")]
    names = [f"imagen_jax.evals.rating.{stem}" for stem in stems if stem != "__init__"]
    code = f"import sys, imagen_jax.rate, {', '.join(names)}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    loaded = set(ran.stdout.split())
    forbidden = ("jax", "flax", "imagen_jax.models", "imagen_jax.training", "imagen_jax.stage")
    assert not loaded & set(forbidden)
